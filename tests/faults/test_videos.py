"""Videos that are missing, broken, too short or no videos: named, counted, and never in a store."""

import contextlib
import errno
import json
import math
import os
import shutil
import sqlite3
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

import latent_cache
from pipelines.encoding import chunk_encoder
from pipelines.encoding.chunk_encoder import BrokenVideosError, ChunkTask

OWN = ("dataset.source=videos", "dataset.splits={val: 0.2, test: 0.2}")
NAMES = ("a.mp4", "b.avi", "c", "d.mp4", "e.gif", "f.avi", "g", "h.mp4", "i.avi", "j")


@pytest.fixture
def own(place, story: ModuleType):
    place = place.with_sets(*OWN)
    story.write_videos(place.data, NAMES)
    return place


def stored(place) -> set[str]:
    return {
        video for split in latent_cache.splits(place.store) for video in latent_cache.open(place.store, split).video_ids
    }


def break_in_the_middle(place, file: Path) -> None:
    """Let a video look whole to the index, and break when it is decoded."""
    if file.is_dir():
        frame = file / "frame9.png"
        frame.write_bytes(frame.read_bytes()[:60])
        return
    # As a damaged header would: more frames are promised than there are.
    place.run("data").ok()
    name = file.relative_to(place.data).as_posix().encode()
    with contextlib.closing(sqlite3.connect(place.data / ".river_index.sqlite")) as index:
        index.execute("UPDATE video SET frames = frames + 3 WHERE name = ?", (name,))
        index.commit()


@pytest.mark.parametrize("command", ["data", "demo", "train-autoencoder", "encode", "train-flow", "sample", "evaluate"])
def test_missing_folder(place, command: str) -> None:
    place = place.with_sets(*OWN)
    place.run(command).refused(2, f"{place.data}: no such folder", "dataset.root")
    assert not place.store.exists()


@pytest.mark.parametrize(("files", "needed"), [
    ([], "the folder is empty; expected"), (["notes.txt"], "only .txt"),
    (["frame.png"], "contains pictures"),
])  # fmt: skip
def test_folder_without_videos(place, files: list[str], needed: str) -> None:
    place = place.with_sets(*OWN)
    place.data.mkdir(parents=True)
    for name in files:
        (place.data / name).write_bytes(b"x")
    place.run("encode").refused(2, str(place.data), needed)


def test_missing_kth(place) -> None:
    place = place.with_sets("dataset.source=kth", "dataset.splits={}")
    place.run("train-flow").refused(2, f"{place.data}: no such folder", "river data --config kth")
    place.run("data", "--mirror", str(place.folder / "nowhere")).refused(2, "nowhere: no such folder")


def test_archives_that_are_none(place, story: ModuleType) -> None:
    place = place.with_sets("dataset.source=kth", "dataset.splits={train: 1, val: 2, test: 3}")
    mirror = place.folder / "mirror"
    story.write_kth_mirror(mirror, persons=3)
    good = (mirror / "jogging.zip").read_bytes()

    (mirror / "jogging.zip").write_bytes(b"<!DOCTYPE html><html>404 Not Found</html>")
    place.run("data", "--mirror", str(mirror)).refused(2, "jogging.zip: not a whole zip archive", "HTML")
    (mirror / "jogging.zip").write_bytes(good[: len(good) // 2])
    place.run("data", "--mirror", str(mirror)).refused(2, "jogging.zip: not a whole zip archive", "it was cut off")
    flipped = bytearray(good)
    flipped[len(good) // 3] ^= 0xFF
    (mirror / "jogging.zip").write_bytes(flipped)
    place.run("data", "--mirror", str(mirror)).refused(2, "jogging.zip: its entry", "damaged")
    with zipfile.ZipFile(mirror / "jogging.zip", "w") as archive:
        archive.writestr("../outside.avi", b"x")
    place.run("data", "--mirror", str(mirror)).refused(2, "refused", "'../outside.avi'")
    (mirror / "jogging.zip").unlink()
    place.run("data", "--mirror", str(mirror)).refused(2, "--mirror ", "jogging.zip")

    # Nothing of the bad ones was left behind, and what was good is not unpacked again.
    assert not (place.data / "jogging").exists()
    (mirror / "jogging.zip").write_bytes(good)
    outcome = place.run("data", "--mirror", str(mirror)).ok()
    assert "boxing: already unpacked" in outcome.out
    assert "jogging: unpacked 3 files" in outcome.out


def break_mp4(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def break_text(file: Path) -> None:
    file.write_text("not a video")


def break_frames(folder: Path) -> None:
    (folder / "frame0.png").write_bytes(b"")


BROKEN = [("d.mp4", break_mp4), ("f.avi", break_text), ("c", break_frames)]


@pytest.mark.parametrize(("name", "damage"), BROKEN)
def test_broken_video_among_good_ones(own, name: str, damage) -> None:
    damage(own.data / name)
    video = name.partition(".")[0]
    outcome = own.run("encode").refused(3, "1 video(s) were skipped", f"\n  {video}: ")
    assert f"skipped video {video}: " in outcome.out
    assert latent_cache.is_complete(own.store)
    assert stored(own) == {other.partition(".")[0] for other in NAMES} - {video}
    own.run("train-flow").ok()


def test_strict_stops_at_a_broken_video(own) -> None:
    break_text(own.data / "f.avi")
    for command in ("data", "train-autoencoder", "encode", "demo"):
        outcome = own.run(command, "--strict")
        assert outcome.code in (1, 2)
        assert "video f: " in outcome.err
        assert "--strict" in outcome.err
        assert "Traceback" not in outcome.err
    assert not own.store.exists()


def test_no_video_can_be_used(place, story: ModuleType) -> None:
    place = place.with_sets(*OWN)
    story.write_videos(place.data, ["a.mp4", "b.avi"])
    for name in ("a.mp4", "b.avi"):
        break_text(place.data / name)
    place.run("encode").refused(2, "none of its 2 videos can be used", "a ", "b ")


FIRST_MIDDLE_LAST = ["train/a.mp4", "train/c", "test/i"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST_MIDDLE_LAST)
def test_video_that_breaks_in_the_middle(place, story: ModuleType, name: str) -> None:
    """It is found out while encoding; the chunks are planned anew, and the store is as if it had never been there."""
    place = place.with_sets("dataset.source=videos", "dataset.splits={}", "cache.chunk_frames=10")
    names = [
        "train/a.mp4",
        "train/b",
        "train/c",
        "train/d.gif",
        "train/e.avi",
        "val/f",
        "val/g.mp4",
        "test/h.gif",
        "test/i",
    ]
    story.write_videos(place.data, names)
    break_in_the_middle(place, place.data / name)
    video = Path(name).stem
    place.run("encode").refused(3, "1 video(s) were skipped", f"\n  {video}: ")
    assert stored(place) == {Path(other).stem for other in names} - {video}
    for split in latent_cache.splits(place.store):
        latent_cache.open(place.store, split).load()  # checks every chunk

    clean = story.Place(place.folder.with_name("clean"), place.sets)
    shutil.copytree(place.runs / "autoencoder", clean.runs / "autoencoder")
    shutil.copytree(place.data, clean.data)
    (clean.data / ".river_index.sqlite").unlink(missing_ok=True)
    shutil.rmtree(clean.data / name) if (clean.data / name).is_dir() else (clean.data / name).unlink()
    clean.run("encode").ok()
    ours, theirs = story.tree(place.store), story.tree(clean.store)
    assert ours.pop("manifest/zarr.json") != theirs.pop("manifest/zarr.json")  # it has the digest of the next one
    roots = [json.loads(files.pop("zarr.json"))["attributes"] for files in (ours, theirs)]
    assert ours == theirs
    assert [list(ids) for ids in roots[0].pop("notes")["skipped"].values()] == [[video]]
    assert roots[1].pop("notes")["skipped"] == {}
    assert roots[0] == roots[1]
    assert "store: done" in place.run("encode").ok().out  # what is broken still is no change


@pytest.mark.parametrize(
    ("owner", "name", "call"), [(BrokenVideosError, "__init__", 1), (ChunkTask, "encode", 4)], ids=["then", "later"]
)
def test_encode_that_is_stopped_after_it_met_a_broken_video(
    place, story: ModuleType, monkeypatch, owner: type, name: str, call: int
) -> None:
    place = place.with_sets("dataset.source=videos", "dataset.splits={}", "cache.chunk_frames=10")
    story.write_videos(place.data / "train", ["a", "b", "c", "d"])
    break_in_the_middle(place, place.data / "train" / "b")
    place.run("train-autoencoder")
    with monkeypatch.context() as patch:
        story.send_at(patch, owner, name, call)
        place.run("encode").refused(143, "stopped")
    place.run("encode").refused(3, "\n  b: ")
    assert stored(place) == {"a", "c", "d"}
    latent_cache.open(place.store, "train").load()


class Reads:
    """Of pictures, through Pillow: those of a folder fail, the first times or always."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, error: int, times: float) -> None:
        self.left, opened = times, Image.open

        def fails(path: Any, *arguments: Any, **options: Any) -> Any:
            if self.left and getattr(path, "parent", None) == folder:
                self.left -= 1
                raise OSError(error, os.strerror(error), str(path))
            return opened(path, *arguments, **options)

        monkeypatch.setattr(Image, "open", fails)


@pytest.fixture(scope="module")
def four_videos(tmp_path_factory: pytest.TempPathFactory, story: ModuleType):
    """A trained autoencoder, videos, and their store in `latents`, which tests need not copy."""
    sets = ("dataset.source=videos", "dataset.splits={val: 0}", "cache.chunk_frames=10")
    place = story.Place(tmp_path_factory.mktemp("unreadable") / "place", sets)
    story.write_videos(place.data / "train", ["a", "b", "c", "d"])
    place.run("encode").ok()
    return place


@pytest.mark.parametrize(("error", "times"), [(errno.EIO, 3), (errno.EIO, math.inf), (errno.EACCES, math.inf)])
def test_a_video_that_cannot_be_read_is_not_written_off(
    four_videos, tmp_path: Path, story: ModuleType, monkeypatch, error: int, times: float
) -> None:
    """What passes is awaited; what does not ends with 3, and the next call goes on. No place remembers it."""
    place = four_videos.copy(tmp_path / "place", "data", "runs")
    monkeypatch.setattr(chunk_encoder, "RETRY_SECONDS", (0.0, 0.01, 0.01))
    with monkeypatch.context() as patch:
        reads = Reads(patch, place.data / "train" / "b", error, times)
        outcome = place.run("encode")
    if times == 3:
        assert not reads.left
        outcome.ok()
    else:
        outcome.refused(3, "1 video could not be read", "\n  b: frame", f"cannot be read ({os.strerror(error)})")
        assert not latent_cache.is_complete(place.store)
        assert list(place.store.glob(".encoding/train/*.json"))  # of the others
        place.run("encode").ok()
    assert story.tree(place.store) == story.tree(four_videos.store)


def test_an_index_waits_for_what_may_pass(four_videos, tmp_path: Path, monkeypatch) -> None:
    place = four_videos.copy(tmp_path / "place", "data")
    (place.data / ".river_index.sqlite").unlink()
    monkeypatch.setattr("stage1_autoencoder.videos.index.RETRY_SECONDS", (0.0, 0.01, 0.01))
    for times, code in ((3, 0), (math.inf, 3)):
        with monkeypatch.context() as patch:
            Reads(patch, place.data / "train" / "b", errno.ESTALE, times)
            assert place.run("data").code == code
        (place.data / ".river_index.sqlite").unlink()


def test_only_video_of_a_split_breaks_in_the_middle(place, story: ModuleType) -> None:
    place = place.with_sets("dataset.source=videos", "dataset.splits={}", "cache.chunk_frames=10")
    story.write_videos(place.data / "train", ["a.mp4", "b.avi", "c"])
    story.write_videos(place.data / "val", ["v"])
    break_in_the_middle(place, place.data / "val" / "v")
    place.run("encode").refused(3, "1 video(s) were skipped", "\n  v: ")
    assert latent_cache.is_complete(place.store)
    assert latent_cache.splits(place.store) == ["train"]
    place.run("train-flow").ok()


def test_every_training_video_breaks_in_the_middle(place, story: ModuleType) -> None:
    place = place.with_sets(*OWN)
    story.write_videos(place.data, ["a", "b", "c", "d"])
    for frame in place.data.glob("*/frame*.png"):
        if frame.name != "frame0.png":
            frame.write_bytes(frame.read_bytes()[:60])
    place.run("encode").refused(2, "none of", "could be decoded")
    assert not place.store.exists()


def test_videos_shorter_than_a_clip(own) -> None:
    """12 to 14 frames: too short for 2 + 30, long enough for 2 + 11 in part."""
    own.run("train-flow").ok()
    for command in ("sample", "evaluate"):
        outcome = own.run(command, sets=["evaluation.horizon=30"])
        outcome.refused(2, "no video has the 2 + 30 frames", "have 12 to 14 frames", "lower evaluation.horizon")
    assert not (own.runs / "evaluation.json").exists()


def test_some_videos_shorter_than_a_clip(place, story: ModuleType) -> None:
    place = place.with_sets("dataset.source=videos", "dataset.splits={val: 0}")
    story.write_videos(place.data / "train", ["a.mp4", "b.avi", "c"])
    story.write_video(place.data / "test" / "long.mp4", story.moving_square(9, 1))
    story.write_video(place.data / "test" / "short.mp4", story.moving_square(7, 2))
    outcome = place.run("sample").ok()
    assert "1 of 2 videos" in outcome.out
    assert not (place.runs / "samples" / "short.gif").exists()


def test_videos_too_short_to_train_the_flow(place, story: ModuleType) -> None:
    place = place.with_sets("dataset.source=videos", "dataset.splits={val: 0, test: 0}")
    for number, name in enumerate(("a.mp4", "b.avi", "c")):
        story.write_video(place.data / name, story.moving_square(2, number))
    place.run("train-flow").refused(2, "3")
    assert not (place.runs / "flow" / "checkpoints").exists()


def test_predict_what_cannot_be_continued(copied, story: ModuleType) -> None:
    folder = copied.folder
    copied.run("predict", str(folder / "none.mp4")).refused(2, "none.mp4")
    break_text(folder / "text.mp4")
    copied.run("predict", str(folder / "text.mp4")).refused(2, "text.mp4")
    (folder / "empty").mkdir()
    copied.run("predict", str(folder / "empty")).refused(2, "empty")
    story.write_video(folder / "one.mp4", story.moving_square(1, 1))
    copied.run("predict", str(folder / "one.mp4")).refused(2, "one.mp4: 1 frames", "evaluation.context")
    story.write_video(folder / "cut", story.moving_square(5, 1))
    frame = folder / "cut" / "frame4.png"
    frame.write_bytes(frame.read_bytes()[:60])
    copied.run("predict", str(folder / "cut")).refused(2, "frame4.png")
    assert not (copied.runs / "predictions").exists()


def test_test_video_that_breaks_is_left_out_of_the_measure(place, story: ModuleType) -> None:
    place = place.with_sets("dataset.source=videos", "dataset.splits={val: 0}")
    story.write_videos(place.data / "train", ["a.mp4", "b.avi", "c"])
    story.write_videos(place.data / "test", ["good", "broken"])
    place.run("train-flow").ok()
    frame = place.data / "test" / "broken" / "frame3.png"
    frame.write_bytes(frame.read_bytes()[:60])
    for command in ("sample", "evaluate"):
        place.run(command).refused(3, "1 video(s) were skipped", "\n  broken: frame3.png")
    assert json.loads((place.runs / "evaluation.json").read_text())["protocol"]["clips"] == 1
    place.run("evaluate", "--strict").refused(2, "broken", "--strict")
