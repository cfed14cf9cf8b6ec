"""A store and its videos: what was added, removed or replaced since is named; strange names are names like others."""

import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import latent_cache
from stage1_autoencoder.videos.names import escaped

SPLITS = ("dataset.source=videos", "dataset.splits={}", "cache.chunk_frames=10")
NAMES = ("train/a", "train/b", "train/c", "train/d", "val/v", "test/t")


@pytest.fixture(scope="module")
def encoded_once(tmp_path_factory: pytest.TempPathFactory, story: ModuleType) -> Any:
    """Folders of frames as videos, and their store. Tests must not change it."""
    place = story.Place(tmp_path_factory.mktemp("sources") / "encoded", SPLITS)
    story.write_videos(place.data, NAMES)
    place.run("encode").ok()
    return place


@pytest.fixture
def encoded(encoded_once, tmp_path: Path) -> Any:
    return encoded_once.copy(tmp_path / "encoded", "data", "latents", "runs")


def test_videos_added_removed_and_replaced(encoded, story: ModuleType) -> None:
    before = story.tree(encoded.store)
    story.write_video(encoded.data / "train" / "new", story.moving_square(12, 50))
    shutil.rmtree(encoded.data / "train" / "b")
    shutil.rmtree(encoded.data / "train" / "c")
    story.write_video(encoded.data / "train" / "c", story.moving_square(14, 51))
    shutil.rmtree(encoded.data / "val" / "v")
    story.write_video(encoded.data / "val" / "w", story.moving_square(12, 52))
    encoded.run("encode").refused(
        2, "its videos have changed since", "train: 1 added: new", "train: 1 removed: b", "train: 1 replaced: c",
        "val: 1 added: w", "val: 1 removed: v", "encode --overwrite",
    )  # fmt: skip
    assert story.tree(encoded.store) == before
    encoded.run("encode", "--overwrite").ok()
    assert list(latent_cache.open(encoded.store).video_ids) == ["a", "c", "d", "new"]
    assert "store: done" in encoded.run("encode").ok().out


def test_one_frame_more_or_less(encoded) -> None:
    shutil.copyfile(encoded.data / "train/a/frame0.png", encoded.data / "train/d/frame0.png")
    (encoded.data / "test" / "t" / "frame11.png").unlink()
    encoded.run("encode").refused(2, "train: 1 replaced: d", "test: 1 replaced: t", "--overwrite")


def test_a_copy_with_other_times_is_no_change(encoded, tmp_path: Path, story: ModuleType) -> None:
    for number, path in enumerate(sorted(encoded.data.rglob("*"))):
        os.utime(path, (10**9 + number, 10**9 + number))
    assert "store: done" in encoded.run("encode").ok().out
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(encoded.data, elsewhere / "videos", copy_function=shutil.copyfile)
    shutil.rmtree(encoded.data)
    for index in (elsewhere / "videos").glob(".river*"):
        index.unlink()
    outcome = encoded.run("encode", sets=[f"dataset.root={elsewhere / 'videos'}"])
    assert "store: done" in outcome.ok().out
    assert "not here" not in outcome.out


def test_a_store_whose_videos_are_gone(encoded, story: ModuleType) -> None:
    shutil.rmtree(encoded.data)
    before = story.tree(encoded.store)
    outcome = encoded.run("encode").ok()
    assert f"store: done, {encoded.store}" in outcome.out
    assert story.tree(encoded.store) == before


def test_the_same_name_in_several_places(place, story: ModuleType) -> None:
    place = place.with_sets(*SPLITS)
    names = ("train/x/clip", "train/y/clip", "train/clip.gif", "train/clip.avi", "val/clip", "test/x/clip")
    for number, name in enumerate(names):
        story.write_video(place.data / name, story.moving_square(12, number))
    place.run("encode").ok()
    assert sorted(latent_cache.open(place.store).video_ids) == ["clip.avi", "clip.gif", "x/clip", "y/clip"]
    assert list(latent_cache.open(place.store, "val").video_ids) == ["clip"]
    assert "store: done" in place.run("encode").ok().out


STRANGE = (
    "a b", "quote\"'`", "new\nline", "tab\t", "émile", "e\N{COMBINING ACUTE ACCENT}mile", "\N{ROCKET}\u200d\N{ROCKET}",
    "日本語", "\N{RIGHT-TO-LEFT OVERRIDE}abc", "%s {0} \\n", "-rf", "c", "x" * 250, "'; DROP TABLE", "NaN", "*?[a]",
)  # fmt: skip


def test_names_of_any_kind(place, story: ModuleType) -> None:
    place = place.with_sets(*SPLITS)
    for number, name in enumerate(STRANGE):
        story.write_video(place.data / "train" / name, story.moving_square(4, number))
    story.write_videos(place.data / "val", ["v"])
    place.run("encode").ok()
    cache = latent_cache.open(place.store)
    ids = [escaped(name) for name in STRANGE]  # each is one line
    assert sorted(cache.video_ids) == sorted(ids)
    assert "new\\nline" in ids
    for name in ids:
        assert cache.video(name).shape[0] == 4
    assert "store: done" in place.run("encode").ok().out
    shutil.rmtree(place.data / "train" / STRANGE[6])
    place.run("encode").refused(2, "train: 1 removed: \N{ROCKET}")


@pytest.mark.parametrize("folder", ["train", ""])
def test_a_name_that_is_no_utf8(place, story: ModuleType, folder: str) -> None:
    """A clear message or a skipped video; never a traceback, and never a store that cannot be finished."""
    if folder:
        place = place.with_sets(*SPLITS)
        story.write_videos(place.data / "train", ["a", "b", "c"])
    else:
        place = place.with_sets(SPLITS[0], "dataset.splits={val: 0.2, test: 0.2}")
        story.write_videos(place.data, ["a", "b", "c"])
    story.write_video(place.data / folder / os.fsdecode(b"caf\xe9"), story.moving_square(12, 9))
    outcome = place.run("encode")
    assert outcome.code in (0, 2, 3)
    assert outcome.code == 0 or "caf" in outcome.err
    if outcome.code != 2:
        splits = latent_cache.splits(place.store)
        assert sum(len(latent_cache.open(place.store, split).video_ids) for split in splits) >= 3


def test_a_video_file_whose_name_is_no_utf8(place, story: ModuleType) -> None:
    place = place.with_sets(*SPLITS)
    story.write_videos(place.data / "train", ["a.mp4", "b.avi", "c"])
    story.write_videos(place.data / "val", ["v"])
    shutil.copy(place.data / "train" / "a.mp4", place.data / "train" / os.fsdecode(b"caf\xe9.mp4"))
    place.run("encode").ok()
    cache = latent_cache.open(place.store)
    assert set(cache.video_ids) == {"a", "b", "c", r"caf\xe9"}
    assert (cache.video(r"caf\xe9") == cache.video("a")).all()
    assert "store: done" in place.run("encode").ok().out
