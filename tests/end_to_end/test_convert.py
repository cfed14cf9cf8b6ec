"""Any source as folders of pictures, and back: the same videos, splits and pixels, whatever happens on the way."""

import errno
import json
import shutil
import signal
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from pipelines import convert as convert_module
from pipelines.convert import MANIFEST, MARK, folder_name
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
    assert "convert: 6 videos, 72 frames" in outcome.out
    shapes = DatasetConfig(name="tiny", source="shapes", image_size=32, splits={"train": 3, "val": 1, "test": 2},
                           shapes={"frames": 12})  # fmt: skip
    assert_same(pixels(read_back(out)), pixels(open_splits(shapes, "")))
    names = sorted(path.name for path in (out / "train/train_00000").iterdir())
    assert names == [MARK, *(f"{number:05d}.png" for number in range(12))]


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
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["test"]
    with Image.open(video / "00003.jpg") as picture:
        written = np.asarray(picture).astype(float)
    truth = open_splits(
        DatasetConfig(name="tiny", source="shapes", image_size=32, splits={"train": 3, "val": 1, "test": 2},
                      shapes={"frames": 12}), "")["test"].read(0, [3])[0]  # fmt: skip
    assert 0 < np.abs(written - truth).mean() < 4
    place.run("convert", "--out", str(out), "--format", "jpg", "--split", "test").ok()  # the other video beside it
    assert len(list((out / "test").iterdir())) == 2
    place.run("convert", "--out", str(out), "--format", "jpg", "--quality", "300").refused(2, "1 to 100")


def test_what_is_there_is_left(place, story: ModuleType) -> None:
    place, out = place.with_sets(*SHAPES), place.folder / "frames"
    place.run("convert", "--out", str(out)).ok()
    shutil.rmtree(out / "val")
    (out / "train/train_00001" / MARK).unlink()  # as if it had been put there by somebody
    before = story.stamps(out / "train/train_00000", out / "test")
    outcome = place.run("convert", "--out", str(out)).ok()
    assert "4 of 6 videos are there already" in outcome.out
    assert story.stamps(out / "train/train_00000", out / "test") == before
    assert len(pixels(read_back(out))["val"]) == 1


def test_other_pictures_are_not_mixed_in(place, story: ModuleType) -> None:
    place, out = place.with_sets(*SHAPES), place.folder / "frames"
    place.run("convert", "--out", str(out)).ok()
    before = story.stamps(out)
    place.run("convert", "--out", str(out), sets=["dataset.image_size=16"]).refused(
        2, "holds other pictures", "image_size", "--overwrite"
    )
    place.run("convert", "--out", str(out), "--format", "jpg").refused(2, "holds other pictures (pictures ")
    place.run("convert", "--out", str(out), sets=["dataset.split_seed=5"]).refused(
        2, "holds another version of train_00000 (6 such videos)", "--overwrite"
    )
    assert story.stamps(out) == before
    place.run("convert", "--out", str(out), "--overwrite", sets=["dataset.image_size=16"]).ok()
    assert pixels(read_back(out, 16))["test"]["test_00000"].shape == (12, 16, 16, 3)
    place.run("convert", "--out", str(out), "--overwrite", sets=["dataset.image_size=16", "dataset.split_seed=5"]).ok()
    assert not list(out.rglob("*.partial"))


def test_places_that_are_refused(place, story: ModuleType, tmp_path: Path) -> None:
    story.write_videos(place.data, ["a.mp4", "b.mp4", "c.mp4"])
    place = place.with_sets("dataset.source=videos", "dataset.splits={}")
    for out in (place.data, place.data / "frames", place.data.parent):
        place.run("convert", "--out", str(out)).refused(2, "lie in each other: name another folder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    place.run("convert", "--out", str(tmp_path / "full")).refused(2, "has files in it that are not of a conversion")
    place.run("convert", "--out", str(tmp_path / "full/thesis.tex")).refused(2, "is a file; a folder is wanted")
    place.run("convert", "--out", str(tmp_path / "out"), "--split", "val", sets=["dataset.splits={val: 0.0}"]).refused(
        2, "has no val split; it has train, test"
    )
    assert sorted(path.name for path in place.data.iterdir() if path.name[0] != ".") == ["a.mp4", "b.mp4", "c.mp4"]
    assert not (tmp_path / "out").exists()


def test_broken_videos_are_skipped(place, story: ModuleType) -> None:
    place = place.with_sets("dataset.source=videos", "dataset.splits={}")
    story.write_videos(place.data, ["train/a", "train/b", "val/c", "test/d"])
    frame = place.data / "train/b/frame5.png"
    frame.write_bytes(frame.read_bytes()[:60])
    out = place.folder / "frames"
    place.run("convert", "--out", str(out)).refused(3, "\n  b: frame5.png cannot be decoded")
    assert [path.name for path in (out / "train").iterdir()] == ["a"]
    place.run("convert", "--out", str(place.folder / "strict"), "--strict").refused(2, "video b: frame5.png")


def test_a_full_disk(place, monkeypatch) -> None:
    place, out = place.with_sets(*SHAPES), place.folder / "frames"
    saver, calls = convert_module._saver, [0]

    def failing(*arguments):
        save = saver(*arguments)

        def fail(frame, path):
            calls[0] += 1
            if calls[0] > 30:
                raise OSError(errno.ENOSPC, "No space left on device")
            save(frame, path)

        return fail

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "_saver", failing)
        place.run("convert", "--out", str(out)).refused(1, "no space left; finished videos are kept")
    assert not list(out.rglob("*.partial"))
    for video in out.glob("*/*"):
        assert len(list(video.glob("*.png"))) == 12
    place.run("convert", "--out", str(out)).ok()
    assert len(list(out.rglob("*.png"))) == 72


def test_ctrl_c_keeps_what_is_finished(place, story: ModuleType, monkeypatch) -> None:
    place, out = place.with_sets(*SHAPES), place.folder / "frames"
    with monkeypatch.context() as patch:
        story.send_at(patch, convert_module._Task, "write", 4, signal.SIGINT)
        place.run("convert", "--out", str(out)).refused(130, "keeps its finished videos, the same command goes on")
    for video in out.glob("*/*"):
        assert json.loads((video / MARK).read_text())["frames"] == len(list(video.glob("*.png"))) == 12
    assert not list(out.rglob("*.partial"))
    place.run("convert", "--out", str(out)).ok()
    assert len(list(out.rglob("*.png"))) == 72
    assert (out / MANIFEST).exists()


@pytest.mark.parametrize(
    ("video_id", "name"),
    [
        ("traj_0_to_255/12", "traj_0_to_255/12"),
        ("a:b?.mp4", "a%3Ab%3F.mp4"),
        ("100%", "100%25"),
        ("con/aux.x/lpt1", "%63on/%61ux.x/%6Cpt1"),
        ("dot./space ", "dot%2E/space%20"),
        ("../.hidden", "%2E%2E/%2Ehidden"),
        ("ü é", "ü é"),
        ("a\tb", "a%09b"),
    ],
)
def test_names_that_every_file_system_takes(video_id, name) -> None:
    assert folder_name(video_id) == name
