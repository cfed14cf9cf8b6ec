"""The smallest data sets there can be."""


def test_one_video_of_one_frame(place, story) -> None:
    story.write_videos(place.data, ["only"], frames=1)
    own = place.with_sets("dataset.source=videos", "dataset.splits={}", "autoencoder.model.codes=64")
    outcome = own.run("train-autoencoder").ok()
    assert "no validation videos" in outcome.out
    # 4 images a batch of 4 x 4 latents each, 6 steps.
    assert "warning" not in outcome.err
    assert "1 videos, 1 frames" in own.run("encode").ok().out
    own.run("train-flow").refused(2, "a sample needs 3 frames", "encode longer videos")


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
