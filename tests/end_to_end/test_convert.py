"""The command line of `convert`: any source as folders of pictures, and back."""

from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from stage1_autoencoder.videos import open_splits
from stage1_autoencoder.videos.config import DatasetConfig

SHAPES = ("dataset.splits={train: 3, val: 1, test: 2}",)


def read_back(folder: Path, side: int = 32) -> dict:
    dataset = DatasetConfig(name="back", source="videos", root=str(folder), image_size=side)
    return open_splits(dataset, "", remember=False)


def pixels(sources) -> dict[str, dict[str, np.ndarray]]:
    return {
        split: {video.id: source.read(index) for index, video in enumerate(source.videos)}
        for split, source in sources.items()
    }


def assert_same(found, wanted) -> None:
    assert {split: list(videos) for split, videos in found.items()} == {
        split: list(videos) for split, videos in wanted.items()
    }
    for split, videos in wanted.items():
        for name, frames in videos.items():
            np.testing.assert_array_equal(found[split][name], frames)


def test_shapes_there_and_back(place) -> None:
    place = place.with_sets(*SHAPES)
    out = place.folder / "frames"
    outcome = place.run("convert", "--out", str(out)).ok()
    assert "6 videos, 72 frames of 32x32 as png" in outcome.out
    shapes = DatasetConfig(name="tiny", source="shapes", image_size=32, splits={"train": 3, "val": 1, "test": 2},
                           shapes={"frames": 12})  # fmt: skip
    assert_same(pixels(read_back(out)), pixels(open_splits(shapes, "")))
    names = sorted(path.name for path in (out / "train/train_00000").iterdir())
    assert names == [f"{number:05d}.png" for number in range(12)]


def test_own_videos_there_and_back(place, story: ModuleType) -> None:
    """Files and folders of frames, in folders; every second frame of them."""
    place = place.with_sets("dataset.source=videos", "dataset.splits={}", "dataset.frame_step=2")
    names = ("train/a.mp4", "train/deep/b.gif", "train/deep/c", "val/d.avi", "test/e", "test/x2.mp4", "test/x10.mp4")
    story.write_videos(place.data, names)
    out = place.folder / "frames"
    place.run("convert", "--out", str(out)).ok()
    dataset = DatasetConfig(name="t", source="videos", root=str(place.data), image_size=32, frame_step=2)
    assert_same(pixels(read_back(out)), pixels(open_splits(dataset, "", remember=False)))


def test_a_part_as_jpg(place) -> None:
    place, out = place.with_sets(*SHAPES), place.folder / "frames"
    place.run("convert", "--out", str(out), "--format", "jpg", "--split", "test", "--videos", "1").ok()
    (video,) = (out / "test").iterdir()
    assert [path.name for path in out.iterdir() if path.name[0] != "."] == ["test"]
    with Image.open(video / "00003.jpg") as picture:
        written = np.asarray(picture).astype(float)
    truth = open_splits(
        DatasetConfig(name="tiny", source="shapes", image_size=32, splits={"train": 3, "val": 1, "test": 2},
                      shapes={"frames": 12}), "")["test"].read(0, [3])[0]  # fmt: skip
    assert 0 < np.abs(written - truth).mean() < 4
    place.run("convert", "--out", str(out), "--format", "jpg", "--split", "test").ok()  # the other video beside it
    assert len(list((out / "test").iterdir())) == 2
    place.run("convert", "--out", str(out), "--format", "jpg", "--quality", "300").refused(2, "--quality 300")
