"""The smallest data sets there can be."""


def test_one_video_of_one_frame(place, story) -> None:
    story.write_videos(place.data, ["only"], frames=1)
    own = place.with_sets("dataset.source=videos", "dataset.splits={}", "autoencoder.model.codes=64")
    outcome = own.run("train-autoencoder").ok()
    assert "no validation videos" in outcome.out
    # 4 images a batch of 4 x 4 latents each, 6 steps.
    assert "warning" not in outcome.err
    assert "1 video, 1 frame," in own.run("encode").ok().out
    own.run("train-flow").refused(2, "a sample needs 3 frames", "encode longer videos")


def test_what_nothing_can_be_measured_with_is_refused_before_any_work(place, story) -> None:
    """One video has no test split, and short ones hold no clip; `predict` needs neither."""
    own = place.with_sets("dataset.source=videos", "dataset.splits={}")
    story.write_videos(place.data, ["one.mp4"])
    assert "no test split: " in own.run("data").ok().out
    story.write_videos(place.data, ["two.mp4", "three.mp4"])
    for words, sets, carried in (
        (["evaluate"], [f"dataset.root={place.data}/alone"], ["test split", "train 1", "3 videos", "cut into clips"]),
        (["sample"], ["evaluation.horizon=20"], ["no video has the 2 + 20 frames", "lower evaluation.horizon"]),
        (["demo"], ["evaluation.horizon=20"], ["no video has the 2 + 20 frames", "lower evaluation.horizon"]),
    ):
        if "alone" in sets[0]:
            (place.data / "alone").mkdir()
            (place.data / "one.mp4").rename(place.data / "alone" / "one.mp4")
        own.run(*words, sets=sets).refused(2, *carried)
    assert not (place.runs / "autoencoder").exists()


def test_a_discriminator_too_deep_for_the_frames(place) -> None:
    sets = ["autoencoder.training.adversarial={weight: 1, layers: 5}"]
    place.run("train-autoencoder", sets=sets).refused(
        2, "autoencoder.training.adversarial.layers: 5 layers", "at least 96 pixels", "dataset.image_size is 32"
    )


def test_only_frames_that_cannot_be_read(place, story) -> None:
    (place.data / "broken.mp4").parent.mkdir(parents=True)
    (place.data / "broken.mp4").write_bytes(b"no video")
    own = place.with_sets("dataset.source=videos", "dataset.splits={}")
    own.run("train-autoencoder").refused(2, "none of its 1 videos can be used: broken cannot be opened")
