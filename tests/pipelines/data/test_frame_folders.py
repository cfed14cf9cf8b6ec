"""Folders of pictures: the same videos when they are read back, whole or not there, and nobody else's."""

import errno
import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from latent_cache import NoSpaceError
from pipelines.config import RiverConfig, parse_config
from pipelines.data.frame_folders import LOCK_NAME, RECORD_NAME, convert, folder_names
from pipelines.errors import StoppedBySignal, UserError
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import locked
from stage1_autoencoder.videos import open_splits
from stage1_autoencoder.videos.config import DatasetConfig


def settings(folder: Path, **dataset: object) -> RiverConfig:
    paths = {name: str(folder / name) for name in ("data", "latents", "runs")}
    return parse_config({"paths": paths, "dataset": {"name": "tiny", "image_size": 16} | dataset}, "a test")


def run_context(**options: bool) -> RunContext:
    return RunContext(torch.device("cpu"), **options)


def write_video(path: Path, seed: int, frames: int = 7, size: tuple[int, int] = (40, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for _ in range(frames):
            coarse = generator.integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
            picture = coarse.repeat(8, axis=0).repeat(8, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


def files(out: Path) -> dict[str, bytes]:
    """All pictures below a folder, and whatever else is not hidden."""
    found = sorted(path for path in out.rglob("*") if path.is_file() and path.name[0] != ".")
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def read_back(out: Path, **dataset: object) -> dict:
    wanted = {"name": "back", "source": "videos", "root": str(out), "image_size": 16} | dataset
    return open_splits(DatasetConfig(**wanted), out, remember=False)


def assert_same(sources: dict, others: dict) -> None:
    assert list(sources) == list(others)
    for split, source in sources.items():
        assert [video.id for video in source.videos] == [video.id for video in others[split].videos]
        for index in range(len(source.videos)):
            assert (source.read(index) == others[split].read(index)).all(), (split, index)


@pytest.fixture
def noise(kit, monkeypatch: pytest.MonkeyPatch):
    """Sources of noise: train a b c d e, val v w."""
    monkeypatch.setattr("pipelines.data.frame_folders.open_videos", lambda config, run_context: kit.splits)
    kit.out = kit.folder / "out"
    return kit


def run(kit, context: RunContext | None = None, **options: object) -> set[str]:
    """The videos that were read."""
    for source in kit.splits.values():
        source.passes.clear()
    convert(kit.config(), context or run_context(), kit.out, **options)
    return {video for source in kit.splits.values() for video, *_ in source.passes}


def refused(kit, *carried: str, context: RunContext | None = None, **options: object) -> None:
    """Refused by a message that carries all this, and nothing is changed."""
    before = files(kit.out)
    with pytest.raises(UserError, match=re.escape(carried[0])) as caught:
        run(kit, context, **options)
    for text in carried:
        assert text in str(caught.value)
    assert files(kit.out) == before


def visible(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name[0] != ".")


def whole(kit) -> dict[str, bytes]:
    """What an undisturbed conversion gives."""
    convert(kit.config(), run_context(), kit.folder / "whole")
    return files(kit.folder / "whole")


def test_shapes_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str], flushed: set[int]) -> None:
    config = settings(tmp_path, source="shapes", splits={"train": 12, "val": 3, "test": 2}, shapes={"frames": 12})
    convert(config, run_context(), tmp_path / "out")
    said = capsys.readouterr().out
    assert "convert: train: 12 videos, 144 frames in" in said
    assert "convert: test: 2 videos, 24 frames in" in said
    names = sorted(os.listdir(tmp_path / "out" / "test" / "test_00001"))
    assert names == [f"{number:05d}.png" for number in range(12)]
    assert {picture.stat().st_ino for picture in (tmp_path / "out").rglob("*.png")} <= flushed
    assert_same(open_splits(config.dataset, tmp_path), read_back(tmp_path / "out"))


def test_resampled_and_padded_videos_are_not_changed_again_on_the_way_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate(("train/a.avi", "test/b.avi")):
        write_video(tmp_path / "data" / "tiny" / name, seed)
    config = settings(tmp_path, source="videos", fps=7.5, splits={"val": 0.0}, image_size=[16, 32], fit="pad")
    for _ in range(2):  # the second one finds everything done
        convert(config, run_context(), tmp_path / "out")
    said = capsys.readouterr().out
    assert "frames of 32x16" in said
    assert "--set dataset.fps=null" in said
    back = read_back(tmp_path / "out", splits={"val": 0.0}, image_size=[16, 32])
    assert_same(open_splits(config.dataset, config.data_root), back)


def test_a_folder_of_videos_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cropped, resized and stepped once, not again on the way back; ids with folders in them stay."""
    names = ["train/clip 10.avi", "train/clip 2.avi", "train/traj_0_to_255/12.avi", "train/b/été.avi", "test/x.avi"]
    for seed, name in enumerate(names):
        write_video(tmp_path / "data" / "tiny" / name, seed)
    config = settings(tmp_path, source="videos", frame_step=3, splits={"val": 0.0})
    convert(config, run_context(), tmp_path / "out")
    assert (tmp_path / "out/train/traj_0_to_255/12/00002.png").is_file()
    back = read_back(tmp_path / "out", splits={"val": 0.0})
    assert [sum(video.frames for video in source.videos) for source in back.values()] == [12, 3]
    assert [video.id for video in back["train"].videos] == ["b/été", "clip 2", "clip 10", "traj_0_to_255/12"]
    assert_same(open_splits(config.dataset, config.data_root), back)
    assert "--set dataset.frame_step=1 --set dataset.splits='{val: 0}'" in capsys.readouterr().out


def test_complete_videos_are_not_written_again(noise, capsys: pytest.CaptureFixture[str]) -> None:
    run(noise, videos=2)
    assert {name.rpartition("/")[0] for name in files(noise.out)} == {"train/a", "train/b", "val/v", "val/w"}
    assert run(noise) == {"c", "d", "e"}
    said = capsys.readouterr().out
    assert "7 videos, 61 frames of 16x16 as png, 4 of them are there" in said
    assert f"convert: train: 5 videos, 48 frames in {noise.out / 'train'}\n" in said
    before = {path: path.stat().st_mtime_ns for path in noise.out.rglob("*.png")}
    assert run(noise) == set()
    assert {path: path.stat().st_mtime_ns for path in noise.out.rglob("*.png")} == before
    assert visible(noise.out) == ["train", "val"]


@pytest.mark.parametrize("damage", ["frame", "empty", "folder", "killed"])
def test_what_is_damaged_is_written_again(damage: str, noise) -> None:
    expected = whole(noise)
    run(noise)
    match damage:
        case "frame":
            (noise.out / "train/d/00003.png").unlink()
            (noise.out / "train/d/notes.txt").touch()
        case "empty":
            (noise.out / "train/d/00003.png").write_bytes(b"")
        case "folder":
            shutil.rmtree(noise.out / "train/d")
        case "killed":  # in the middle of a video
            unfinished = noise.out / ".river_convert.unfinished" / "train-3"
            unfinished.mkdir(parents=True)
            (unfinished / "00000.png").touch()
    assert run(noise) == (set() if damage == "killed" else {"d"})
    assert files(noise.out) == expected
    assert [path.name for path in noise.out.glob(".*") if path.is_dir()] == []
    assert run(noise) == set()


@pytest.mark.parametrize("frame", [0, 20, 60])
def test_a_full_disk_leaves_complete_videos(frame: int, noise, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, written, write = whole(noise), [], Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.suffix == ".png":
            written.append(path)
            if len(written) > frame:
                write(path, content[:9])
                raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(NoSpaceError, match=re.escape(str(noise.out))):
            run(noise)
    there = files(noise.out)
    assert there.items() <= expected.items()
    lengths = {"train/a": 7, "train/b": 13, "train/c": 1, "train/d": 22, "train/e": 5, "val/v": 9, "val/w": 4}
    for video in {name.rpartition("/")[0] for name in there}:
        assert sum(name.startswith(f"{video}/") for name in there) == lengths[video]
    run(noise)
    assert files(noise.out) == expected


def test_a_folder_that_cannot_be_written_to(noise) -> None:
    """A limit on the size of files stands for a disk that refuses, also root's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        refused(noise, str(noise.out), "File too large", splits=["val"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_video_is_recorded_before_it_is_in_place(noise, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in between, it is written again; the other way round it would be taken for somebody else's."""
    rename, recorded = Path.rename, []

    def watched(path: Path, target: Path) -> Path:
        record = json.loads((noise.out / RECORD_NAME).read_text())
        recorded.append(str(target.relative_to(noise.out)) in record["videos"])
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    run(noise)
    assert recorded == [True] * 7


def test_what_is_replaced_leaves_its_place_at_once(noise, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleting takes a while, in which the process may be killed: no part of a video stays where complete ones are."""
    run(noise)
    (noise.out / "train/d/00003.png").unlink()
    removed, remove = [], shutil.rmtree
    monkeypatch.setattr("shutil.rmtree", lambda path, **options: (removed.append(path), remove(path, **options)))
    run(noise)
    assert removed
    assert all(".river_convert.unfinished" in str(path) for path in removed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_between_frames(number: int, noise, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, write = whole(noise), Path.write_bytes
    noise.splits["train"].seconds["d"] = 0.05

    def interrupted(path: Path, content: bytes) -> int:
        if path.parent.name == "train-3" and path.stem == "00001":  # of d
            os.kill(os.getpid(), number)
        return write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", interrupted)
        with pytest.raises(StoppedBySignal, match=re.escape(str(noise.out))) as stopped:
            run(noise)
    assert stopped.value.signal_number == number
    assert files(noise.out).items() < expected.items()
    assert not (noise.out / "train/d").exists()
    assert [path.name for path in noise.out.glob(".*") if path.is_dir()] == []
    noise.splits["train"].seconds.clear()
    run(noise)
    assert files(noise.out) == expected


def test_broken_videos_are_skipped(noise, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    expected, write, beside = whole(noise), Path.write_bytes, set()
    noise.splits["train"].ends["b"] = 5
    asked = run_context()

    def look_beside(path: Path, content: bytes) -> int:
        beside.add((path.parent.name, *sorted(os.listdir(path.parent.parent))))
        return write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", look_beside)
        patched.setattr("os.sched_getaffinity", lambda process: {0})
        run(noise, asked)
    assert ("train-2", "train-2") in beside  # what was written of b takes no space any longer
    assert asked.skipped == {"b": "frame 5 is noise"}
    assert "convert: train: 4 videos, 35 frames in" in capsys.readouterr().out
    assert files(noise.out) == {name: content for name, content in expected.items() if "/b/" not in name}
    noise.splits["train"].ends.clear()
    run(noise)
    assert files(noise.out) == expected


def test_strict_stops_at_a_broken_video(noise) -> None:
    noise.splits["train"].ends["b"] = 5
    with pytest.raises(UserError, match="video b: frame 5 is noise"):
        run(noise, run_context(strict=True))
    assert not any("/b/" in name for name in files(noise.out))


def test_jpg(noise) -> None:
    run(noise, image_format="jpg", splits=["val"])
    small = noise.folder / "small"
    convert(noise.config(), run_context(), small, image_format="jpg", splits=["val"], quality=30)
    assert set(files(noise.out)) == {
        f"val/{video}/{number:05d}.jpg" for video, frames in (("v", 9), ("w", 4)) for number in range(frames)
    }
    with Image.open(noise.out / "val/v/00002.jpg") as image:
        difference = np.asarray(image).astype(int) - noise.splits["val"].frame("v", 2)
    assert 0 < abs(difference).mean() < 2
    assert sum(map(len, files(small).values())) < 0.8 * sum(map(len, files(noise.out).values()))
    refused(noise, str(noise.out), "quality 95 (now 30)", "--overwrite", image_format="jpg", quality=30)
    refused(noise, "--quality 101", "100", image_format="jpg", quality=101)


def test_splits_are_chosen(noise, capsys: pytest.CaptureFixture[str]) -> None:
    run(noise, splits=["val"])
    assert visible(noise.out) == ["val"]
    assert "convert the train split too" in capsys.readouterr().out
    refused(noise, "--split test", "train, val", splits=["test"])
    run(noise, splits=["train", "train"])
    said = capsys.readouterr().out
    assert said.count("convert: train: ") == 1
    assert "--set dataset.source=videos" in said


def test_other_settings_are_refused_and_replaced(noise) -> None:
    run(noise)
    refused(noise, str(noise.out), "format 'png' (now 'jpg')", "--overwrite", image_format="jpg")
    (noise.out / "train" / "mine.txt").touch()
    run(noise, run_context(overwrite=True), image_format="jpg", splits=["val"])
    assert {Path(name).suffix for name in files(noise.out)} == {".jpg", ".txt"}
    assert visible(noise.out) == ["train", "val"]  # mine stays
    run(noise, image_format="jpg")
    (noise.out / "train" / "mine.txt").unlink()
    dataset = noise.config().dataset.model_copy(update={"image_size": 8, "frame_step": 2})
    smaller = noise.config().model_copy(update={"dataset": dataset})
    with pytest.raises(UserError, match=r"image_size 16 \(now 8\), frame_step 1 \(now 2\), format 'jpg' \(now 'png'\)"):
        convert(smaller, run_context(), noise.out)


def test_without_pictures_nothing_contradicts(noise) -> None:
    """As when replacing was stopped after everything had been removed."""
    noise.splits["train"].ends["a"] = 0
    run(noise, videos=1, splits=["train"])
    assert files(noise.out) == {}
    run(noise, image_format="jpg", splits=["val"])
    assert len(files(noise.out)) == 13


@pytest.mark.parametrize("change", ["content", "gone", "split gone"])
def test_another_source_is_refused_and_replaces(change: str, noise) -> None:
    run(noise)
    Source = noise.Source
    count, video = 1, "train/b"
    match change:
        case "content":
            noise.splits["train"] = Source({"a": 7, "b": 13, "c": 1, "d": 22, "e": 5}, b="other")
        case "gone":
            noise.splits["train"] = Source({"a": 7, "c": 1, "d": 22, "e": 5})
        case "split gone":
            del noise.splits["val"]
            count, video = 2, "val/v"
    refused(noise, str(noise.out), f"{count} of its 7 videos", video, "--overwrite", splits=["train"], videos=1)
    assert run(noise, run_context(overwrite=True)) == ({"b"} if change == "content" else set())
    assert files(noise.out) == whole(noise)
    assert run(noise) == set()


def test_places_that_are_refused(noise) -> None:
    noise.out.parent.mkdir(parents=True, exist_ok=True)
    noise.out.write_text("a file")
    refused(noise, f"--out {noise.out}")
    noise.out.unlink()
    (noise.out / "photos").mkdir(parents=True)
    refused(noise, f"--out {noise.out}", "photos", context=run_context(overwrite=True))
    root = noise.config().data_root / "noise"
    for inside in (".", "frames", "../noise/frames"):
        with pytest.raises(UserError, match=re.escape(str(root))):
            convert(noise.config(), run_context(), root / inside)
    (noise.out / "photos").rmdir()
    run(noise, videos=1)
    (noise.out / "train" / "c").mkdir()
    refused(noise, str(noise.out / "train/c"), context=run_context(overwrite=True))
    (noise.out / "train" / "c").rmdir()
    (noise.out / RECORD_NAME).write_text('{"settings": 99}\n')
    refused(noise, str(noise.out / RECORD_NAME), "settings", f"remove {noise.out}")


@pytest.mark.parametrize("folder", ["../precious", "{}/precious", "train/../../precious", "link/precious"])
def test_a_record_of_folders_elsewhere_removes_none_of_them(noise, tmp_path: Path, folder: str) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    noise.out.mkdir(parents=True)
    (noise.out / "link").symlink_to(tmp_path)
    video = {"id": "x", "fingerprint": "y", "frames": 1}
    record = {"settings": {}, "videos": {folder.format(tmp_path): video}}
    (noise.out / RECORD_NAME).write_text(json.dumps(record))
    (noise.out / "train").mkdir()
    with pytest.raises(UserError, match=re.escape(str(noise.out))):
        run(noise, run_context(overwrite=True))
    assert precious.is_dir()


def test_one_at_a_time(noise) -> None:
    run(noise, videos=1)
    with locked(noise.out / LOCK_NAME, "busy"):
        refused(noise, str(noise.out), str(os.getpid()))


def test_space_is_estimated_before(noise, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 100))
    run(noise)
    said = capsys.readouterr()
    assert re.search(r"61 files, about [\d.]+ kB on the disk, which has 100 bytes free", said.out)
    assert said.err.startswith(f"warning: {noise.out}: ")


ODD = {
    "clip": "clip",
    "traj_0_to_255/12": "traj_0_to_255/12",
    "été 2": "été 2",
    "a:b?c": "a%3Ab%3Fc",
    "back\\xe9": "back%5Cxe9",
    "50% of it": "50% of it",
    "a%3Ab": "a%253Ab",
    "line\nbreak": "line%0Abreak",
    ".hidden/..": "%2Ehidden/%2E%2E",
    "dot.": "dot%2E",
    "space ": "space%20",
    "/root": "_/root",
    "deep": "deep_",
    "deep/er": "deep/er",
}


def test_odd_ids_become_safe_names() -> None:
    assert folder_names(list(ODD)) == list(ODD.values())
    long = ["ä" * 300, "ä" * 299 + "b", "x" * 200]
    names = folder_names(long)
    assert names[2] == long[2]
    assert all(len(name.encode()) <= 200 for name in names)
    assert len(set(names)) == 3


@pytest.mark.parametrize("ids", [("Clip", "clip"), ("a/B", "A/b"), ("é", "e\u0301"), ("a", "a/b", "A_")])
def test_ids_that_would_be_one_folder_are_refused(ids: tuple[str, ...], noise) -> None:
    with pytest.raises(UserError, match=f"{ids[0]!r}.*{ids[-1]!r}"):
        folder_names(ids)
    noise.splits["train"] = noise.Source(dict.fromkeys(ids, 2))
    refused(noise, "train: videos")
    assert not noise.out.exists()


def test_odd_ids_are_written_and_said(noise, capsys: pytest.CaptureFixture[str]) -> None:
    noise.splits["train"] = noise.Source(dict.fromkeys(ODD, 2))
    run(noise)
    assert {name.rpartition("/")[0].removeprefix("train/") for name in files(noise.out)} >= set(ODD.values())
    changed = sum(video != name for video, name in ODD.items())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "'a:b?c' is in train/a%3Ab%3Fc" in line]
    assert line.startswith(f"convert: {changed} ids")
    assert {video.id for video in read_back(noise.out)["train"].videos} == set(ODD.values())
    assert run(noise) == set()
