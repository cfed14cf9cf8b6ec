"""The story with videos of one's own, and with KTH as it is published, both made here with PyAV."""

import itertools
import json
import shutil
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from safetensors.torch import load_file

import latent_cache
from pipelines.config import load_config
from pipelines.data.datasets import stored_splits
from pipelines.prediction.pictures import RED
from pipelines.report.predictions import read_clip
from stage1_autoencoder.videos import open_source

KTH = ("dataset.source=kth", "dataset.splits={train: 1-4, val: 5, test: 6}", "evaluation.horizon=4")


@pytest.fixture
def own(place, story: ModuleType):
    place = place.with_sets(*story.OWN_VIDEOS)
    story.write_videos(place.data, story.OWN_NAMES)
    return place


def ids(place) -> dict[str, list[str]]:
    return {split: latent_cache.open(place.store, split).video_ids for split in latent_cache.splits(place.store)}


@pytest.mark.slow
def test_a_folder_of_videos_split_by_fractions(own, story: ModuleType) -> None:
    outcome = own.run("demo").ok()
    assert "train: 6 videos" in outcome.out
    found = ids(own)
    assert {split: len(videos) for split, videos in found.items()} == {"train": 6, "val": 2, "test": 2}
    assert sorted(video for videos in found.values() for video in videos) == sorted(
        name.partition(".")[0] for name in story.OWN_NAMES
    )
    shown = {path.stem for path in (own.runs / "samples").glob("*.mp4")}
    assert shown == {video.replace("/", "_") for video in found["test"]}
    result = json.loads((own.runs / "evaluation.json").read_text())
    assert result["protocol"]["clips"] == 2
    assert "objects" not in result  # of no shapes there is no audit
    assert ("silhouettes" in result) != ("silhouettes" in result["protocol"]["missing"])
    assert not (own.runs / "objects.png").exists()
    before = story.stamps(own.store, own.runs / "flow")
    own.run("demo").ok()
    assert story.stamps(own.store, own.runs / "flow") == before


def test_stored_latents_are_those_of_the_files(own) -> None:
    """What lies in the store is what the autoencoder makes of the very video of that name, whatever its container.

    With frames that are not square.
    """
    from pipelines.loading import find_autoencoder, load_trained_autoencoder
    from stage1_autoencoder.autoencoder import image_to_unit
    from stage1_autoencoder.videos import open_video

    wide = own.with_sets("dataset.image_size=[72, 128]", "dataset.fit=pad", "cache.chunk_frames=16")
    wide.run("encode").ok()
    config = load_config(own.runs / "config.yaml")
    autoencoder = load_trained_autoencoder(find_autoencoder(own.runs), torch.device("cpu"))
    for split in latent_cache.splits(own.store):
        cache = latent_cache.open(own.store, split)
        for video in cache.video_ids:
            (file,) = [*own.data.glob(video), *own.data.glob(f"{video}.*")]
            frames = open_video(config.dataset, file).read(0)
            latents = autoencoder.encode(image_to_unit(torch.from_numpy(frames))).numpy()
            np.testing.assert_allclose(cache.video(video), latents, rtol=2e-3, atol=2e-3, err_msg=video)
        assert autoencoder.decode(torch.from_numpy(latents)).shape[2:] == frames.shape[1:3] == (72, 128)
    assert "20 equal" in wide.run("encode", "--verify", "20").ok().out
    wide.with_sets("dataset.fit=crop").run("encode").refused(2, "dataset.fit: pad", "restart")


def test_a_folder_with_split_folders(place, story: ModuleType) -> None:
    place = place.with_sets("dataset.source=videos", "dataset.splits={}")
    story.write_videos(place.data / "train", ["one.mp4", "two.gif", "three"])
    story.write_videos(place.data / "val", ["six.avi"], first_seed=7)
    story.write_videos(place.data / "test", ["four.avi", "five"], first_seed=9)
    place.run("sample").ok()
    divided = {"train": ["one", "three", "two"], "val": ["six"], "test": ["five", "four"]}
    assert ids(place) == divided
    assert (place.runs / "samples" / "five.gif").exists()

    # In one folder fractions divide them, but a store keeps its splits, also one that does not say how it was divided.
    for path in [*place.data.glob("*/*")]:
        path.rename(place.data / path.name)
    for folder in divided:
        (place.data / folder).rmdir()
    latent_cache.unseal(place.store)
    attributes = json.loads((place.store / "zarr.json").read_text())
    del attributes["attributes"]["notes"]["division"]
    (place.store / "zarr.json").write_text(json.dumps(attributes))
    assert "store: done" in place.run("encode").ok().out
    place.run("encode", "--verify", "5").ok()
    place.run("sample", "--videos", "9").ok()
    assert {path.stem for path in (place.runs / "samples").glob("*.mp4")} == {"five", "four"}
    story.write_videos(place.data, ["seven.mp4"], first_seed=20)
    place.run("encode").refused(2, str(place.store), "manifest", "inspect --seal")
    latent_cache.seal(place.store)

    before = story.tree(place.store)
    place.run("encode", "--verify", "2").refused(2, "1 added: seven", "`encode`")
    frames = 12
    assert f"would add 1 video to train: {frames} frames, in about" in place.run("encode", "--dry-run").ok().out
    (place.data / "two.gif").rename(place.folder / "two.gif")
    place.run("encode").refused(2, "1 added: seven", "1 removed: two", "encode --overwrite")
    place.run("encode", "--dry-run").refused(2, "1 added: seven", "1 removed: two")
    (place.folder / "two.gif").rename(place.data / "two.gif")
    assert story.tree(place.store) == before
    mean = latent_cache.open(place.store).mean
    outcome = place.run("encode").ok()
    assert "1 new video" in outcome.out
    assert ids(place) == divided | {"train": ["one", "three", "two", "seven"]}
    np.testing.assert_array_equal(latent_cache.open(place.store).mean, mean)
    assert [path.name for path in place.store.parent.iterdir()] == [place.store.name]
    assert "store: done" in place.run("encode").ok().out
    assert "24 equal" in place.run("encode", "--verify", "24").ok().out
    assert "1 videos were appended" in place.run("inspect").ok().out
    place.run("train-flow").refused(2, "store.fingerprint", "--fine-tune")
    place.run("train-flow", "--fine-tune", "--restart").ok()
    place.run("sample", "--videos", "9").ok()

    shutil.rmtree(place.store)  # the folder of the videos remembers
    place.run("encode").ok()
    found = ids(place)
    assert sorted(itertools.chain(*found.values())) == ["five", "four", "one", "seven", "six", "three", "two"]
    assert {split: [name for name in found[split] if name != "seven"] for split in divided} == divided
    (place.data / ".river_index.sqlite").unlink()  # and so does the store
    before = story.stamps(place.store)
    place.run("encode").ok()
    assert story.stamps(place.store) == before
    assert stored_splits(load_config(place.runs / "config.yaml", ["dataset.split_seed=5"])) == {}


def test_root_elsewhere_and_frame_step(place, story: ModuleType, tmp_path: Path) -> None:
    root = tmp_path / "elsewhere"
    story.write_videos(root, ["a.mp4", "b.avi", "c.gif", "d"], frames=16)
    place = place.with_sets(*story.OWN_VIDEOS, f"dataset.root={root}", "dataset.frame_step=2")
    place.run("train-flow").ok()
    assert not place.data.exists()
    cache = latent_cache.open(place.store, "train")
    assert set(cache.lengths) <= {8, 9}
    assert latent_cache.open_metadata(place.store).preprocessing["frame_step"] == 2
    # Once trained, the flow needs neither the videos nor the autoencoder to be recognised, nor to train further.
    shutil.rmtree(root)
    shutil.rmtree(place.runs / "autoencoder")
    place.run("train-flow", sets=["flow.training.steps=10"]).ok()


def test_the_story_in_wide_frames(place, story: ModuleType) -> None:
    """Frames of 40x24 pixels cut out of videos of 48x40: latents, numbers and every picture have that shape."""
    place = place.with_sets("dataset.source=videos", "dataset.splits={}", "dataset.image_size=[24, 40]")
    place = place.with_sets("autoencoder.training.steps=3", "flow.training.steps=4")
    for split, names in {"train": "abc", "val": "d", "test": "ef"}.items():
        story.write_videos(place.data / split, [f"{name}.mp4" for name in names], first_seed=ord(names[0]))
    place.run("sample").ok()
    assert latent_cache.open(place.store).latent_shape == (4, 3, 5)
    samples, config = place.runs / "samples", load_config(place.runs / "config.yaml")
    source = open_source(config.dataset, config.data_root, "test")
    assert load_file(samples / "predictions.safetensors")["latents"].shape == (2, 8, 4, 3, 5)
    for number, name in enumerate("ef"):
        truth, predicted = read_clip(samples / f"{name}.gif", (24, 40), 8, 10)
        assert np.abs(truth.astype(int) - source.read(number)[:8]).mean() < 2  # a GIF's colors
        assert predicted.shape == truth.shape
    with Image.open(samples / "contact_sheet.png") as sheet:
        edges = (np.asarray(sheet.convert("RGB")) == RED).all(2)[60:]  # below the legend
    # Two clips, 6 predicted frames of each: twice as large, with a border of 3 pixels.
    assert (edges.any(1).sum(), edges.any(0).sum()) == (2 * (2 * 24 + 6), 6 * (2 * 40 + 6))

    place.run("predict", str(place.data / "test" / "f.mp4")).ok()
    with Image.open(place.runs / "predictions" / "f.gif") as image:
        assert image.size == (6 * 40, 6 * 24)
    assert "resized to 40x24" in place.run("evaluate").ok().out
    evaluation = json.loads((place.runs / "evaluation.json").read_text())
    assert evaluation["protocol"]["image_size"] == [24, 40]
    assert evaluation["metrics"].keys() >= {"psnr", "ssim", "sharpness", "latent_frechet"}
    place.run("report").ok()
    page = (place.runs / "report.html").read_text()
    assert page.count('<canvas width="40" height="24"') == 2 * 3
    assert 'width="320" height="72" class="sheet"' in page


def test_each_video_keeps_its_rate(place, story: ModuleType) -> None:
    """In the store, in `sample` and in `predict`; videos of 10 and of 30 frames per second in one folder."""
    place = place.with_sets("dataset.source=videos", "dataset.splits={}", "dataset.frame_step=2")
    for split, names in {"train": "abc", "val": "d", "test": "ef"}.items():
        for number, name in enumerate(names):
            rate = (10, 30)[number % 2]
            story.write_video(place.data / split / f"{name}.mp4", story.moving_square(20, ord(name)), fps=rate)
    place.run("sample").ok()
    cache = latent_cache.open(place.store)
    assert (cache.video_fps.tolist(), cache.metadata.fps) == ([5.0, 15.0, 5.0], 5.0)
    assert cache.video_sizes.tolist() == [[48, 40]] * 3
    assert latent_cache.open(place.store, "test").video_fps.tolist() == [5.0, 15.0]
    assert "5 to 15 frames/s" in place.run("inspect").ok().out
    place.run("predict", str(place.data / "test" / "f.mp4")).ok()
    for file, rate in (("samples/e.mp4", 5), ("samples/f.mp4", 15), ("predictions/f.mp4", 15)):
        with av.open(str(place.runs / file)) as container:
            assert container.streams.video[0].average_rate == rate
    place.run("inspect", "--video", "b", "--gif", str(place.folder / "b.gif")).ok()
    with Image.open(place.folder / "b.gif") as image:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
    assert sum(durations[:-1]) / 1000 == pytest.approx(9 / 15, abs=0.005)
    assert "5 to 15" in place.run("report").ok().err + (place.runs / "report.html").read_text()


def test_videos_of_different_rates_move_equally_fast(place, story: ModuleType) -> None:
    """The same motion filmed with 10 and with 50 frames per second gives the same latents, with dataset.fps."""
    place = place.with_sets("dataset.source=videos", "dataset.splits={}", "dataset.fps=10")
    motion = story.moving_square(60, 1)
    for name, rate in (("train/slow", 10), ("train/fast", 50), ("val/slow", 10), ("test/fast", 50)):
        story.write_video(place.data / f"{name}.gif", motion[:: 50 // rate], rate)
    assert "used     48 of 144 frames (dataset.fps 10, " in place.run("data", "--dry-run").ok().out
    place.run("encode").ok()
    cache = latent_cache.open(place.store)
    assert cache.lengths.tolist() == [12, 12]
    assert cache.video_fps.tolist() == [10.0, 10.0]
    np.testing.assert_array_equal(cache.video("fast"), cache.video("slow"))
    assert cache.metadata.preprocessing["fps"] == 10
    place.run("predict", str(place.data / "test" / "fast.gif"), "--dry-run").ok()
    place.with_sets("dataset.fps=null").run("encode").refused(2, "dataset.fps: 10", "restart")


@pytest.fixture(scope="module")
def kth_mirror(story: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kth") / "mirror"
    story.write_kth_mirror(folder)
    return folder


def test_kth_from_a_mirror(place, kth_mirror: Path, story: ModuleType) -> None:
    place = place.with_sets(*KTH)
    before = story.tree(kth_mirror)
    outcome = place.run("data", "--mirror", str(kth_mirror)).ok()
    assert "boxing: unpacked 6 files" in outcome.out
    assert "train: 24 videos, 336 frames" in outcome.out
    assert story.tree(kth_mirror) == before
    assert "boxing: already unpacked, 6 files" in place.run("data", "--mirror", str(kth_mirror)).ok().out

    place.run("encode").ok()
    place.run("train-flow").ok()
    place.run("sample", "--videos", "3").ok()
    found = ids(place)
    assert {split: len(videos) for split, videos in found.items()} == {"train": 24, "val": 6, "test": 6}
    assert all(video.startswith("person06_") for video in found["test"])
    assert len(list((place.runs / "samples").glob("person06_*.mp4"))) == 3


def test_encoding_fetches_missing_archives_from_a_mirror(place, kth_mirror: Path) -> None:
    place = place.with_sets(*KTH)
    place.run("encode").refused(2, "no such folder", "--mirror ")
    outcome = place.run("encode", "--mirror", str(kth_mirror)).ok()
    assert "boxing: unpacked 6 files" in outcome.out
    assert latent_cache.is_complete(place.store)


def test_kth_cut_into_sequences(place, kth_mirror: Path) -> None:
    splits = "dataset.splits={train: 1-3, val: 4, test: 5-6}"
    place = place.with_sets(*KTH, splits, "dataset.sequences=true", "evaluation.videos=100")
    place.run("data", "--mirror", str(kth_mirror)).ok()
    place.run("encode").ok()
    cache = latent_cache.open(place.store, "val")
    assert cache.video_ids[:2] == ["person04_boxing_d1_1-6", "person04_boxing_d1_8-14"]
    assert list(cache.lengths) == [6, 7] * 6
    # Two sequences of one file are one recording: there are enough in the test split, and too few in the other.
    outcome = place.run("evaluate").ok()
    assert "test split: 24 clips of 12 recordings of 2 persons" in outcome.out
    result = json.loads((place.runs / "evaluation.json").read_text())
    counts = [result["protocol"][name] for name in ("clips", "videos", "recordings", "persons")]
    assert counts == [24, 24, 12, 2]
    for values in result["metrics"].values():
        low, high = values["interval"]["prediction"]
        assert low < values["prediction"] < high
    outcome = place.run("evaluate", sets=["evaluation.split=val"]).ok()
    assert "val split: 12 clips of 6 recordings of 1 person," in outcome.out
    result = json.loads((place.runs / "evaluation.json").read_text())
    assert "interval" in result["protocol"]["missing"]
    assert "interval" not in result["metrics"]["psnr"]
    outcome = place.run("study", "--most-evaluations", "4").ok()
    assert "val split: 12 clips of 6 recordings of 1 person," in outcome.out
    study = json.loads((place.runs / "quality.json").read_text())
    assert (study["protocol"]["recordings"], study["points"][0]["psnr_interval"]) == (6, None)


def test_what_is_there_before_any_work(own, story: ModuleType) -> None:
    """A dry run reads the videos and writes nothing; `data` then leaves the list of them."""
    (own.data / "broken.mp4").write_text("no video")
    (own.data / "notes.txt").write_text("text")
    own = own.with_sets("dataset.frame_step=2")
    before = story.stamps(own.data)
    out = own.run("data", "--dry-run").ok().out
    assert story.stamps(own.data) == before
    assert not (own.folder / "runs").exists()
    assert not (own.folder / "latents").exists()
    count = len(story.OWN_NAMES)
    assert f"found: {count + 1} videos, {count} usable, 1 skipped; other files, ignored: 1 .txt" in out
    frames = [12 + number % 3 for number in range(count)]
    used = sum((length + 1) // 2 for length in frames)
    assert f"used     {used} of {sum(frames)} frames (dataset.frame_step 2)" in out
    assert "48x40" in out
    assert "skipped video broken: cannot be opened as a video" in out

    outcome = own.run("data")
    assert outcome.code == 3
    rows = (own.runs / "videos.tsv").read_text().splitlines()
    assert rows[0].split("\t")[:3] == ["split", "id", "frames"]
    assert len(rows) == count + 1


def test_a_dry_run_of_what_nobody_has_yet(place) -> None:
    missing = place.with_sets("dataset.source=videos", "dataset.splits={}")
    missing.run("data", "--dry-run").refused(2, "no such folder; put the videos of 'tiny' there")
    out = place.with_sets(*KTH).run("data", "--dry-run").ok().out
    assert "not there yet" in out
    assert "boxing" in out
    assert not place.data.exists()
