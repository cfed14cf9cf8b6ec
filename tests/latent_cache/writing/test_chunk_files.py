"""Chunks and shards on disk: what markers vouch for, shards read by everybody, names read a chunk at a time."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import dask.array
import numpy as np
import pytest
import zarr

import latent_cache
from latent_cache import (
    CorruptStoreError,
    SplitPlan,
    StaleWriterError,
    StoreWriter,
    default_shard_chunks,
    schema,
)
from latent_cache.reading.reader import Names
from latent_cache.writing.chunk_writer import file_content
from latent_cache.writing.markers import ChunkMarker, channel_statistics

LENGTHS = [3, 7, 2, 1, 9, 6, 5]  # 33 frames: 9 chunks of 4, and 3 shards of 12


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "toys.zarr"


@pytest.fixture
def shards(kit) -> dict[str, SplitPlan]:
    """Three chunks a file; the last file has one of three frames of its own and is filled up."""
    return {
        "train": replace_shards(kit.plan(LENGTHS), 3),
        "test": replace_shards(kit.plan([5]), 3),
    }


def replace_shards(plan: SplitPlan, shard_chunks: int) -> SplitPlan:
    return SplitPlan(
        plan.video_ids, plan.video_views, plan.lengths, plan.latent_shape, plan.chunk_frames, shard_chunks=shard_chunks
    )


def latents_file(path: Path, index: int, split: str = "train") -> Path:
    return path / split / "latents/c" / str(index) / "0/0/0"


# Markers


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("array", ["latents", "codes"])
def test_a_file_of_another_chunk_is_noticed(kit, tmp_path, path, shards, all_files, sharded: bool, array: str) -> None:
    """Its own checksum is right; the marker's is not."""
    plans = shards if sharded else {"train": kit.plan(LENGTHS)}
    kit.build(path, plans, stop_after=3)
    first, second = (path / "train" / array / "c" / str(index) for index in (0, 1))
    aside = path.with_name("aside")
    for source, target in ((first, aside), (second, first), (aside, second)):
        source.rename(target)
    with StoreWriter.open(path, kit.metadata, plans, codes=True) as writer:
        pending = [chunk.index for chunk in writer.pending("train")]
    assert pending[:2] == [0, 1]
    assert 2 not in pending
    kit.build(path, plans)
    assert all_files(path) == all_files(kit.build(tmp_path / "whole.zarr", plans))


def test_markers_that_were_swapped_are_noticed(kit, tmp_path, path, all_files) -> None:
    kit.build(path, stop_after=3)
    folder = path / ".encoding/train"
    (folder / "0.json").rename(folder / "x")
    (folder / "1.json").rename(folder / "0.json")
    (folder / "x").rename(folder / "1.json")
    assert all_files(kit.build(path)) == all_files(kit.build(tmp_path / "whole.zarr"))


@pytest.mark.parametrize(
    "change", [{"frames": 3}, {"key": "0"}, {"files": {}}, {"files": {"latents": 1}}, {"extra": 1}]
)
def test_a_marker_that_says_something_else_is_not_believed(kit, path, change: dict) -> None:
    kit.build(path, stop_after=2)
    marker = path / ".encoding/train/1.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | change))
    with StoreWriter.open(path, kit.metadata, plans_of(kit), codes=True) as writer:
        assert [chunk.index for chunk in writer.pending("train")] == [1, 2, 3, 4, 5]
    assert not marker.exists()


def plans_of(kit) -> dict[str, SplitPlan]:
    return {"train": kit.plan([3, 7, 2, 1, 9]), "test": kit.plan([5])}


def test_a_marker_comes_after_its_files_and_never_without_them(kit, path, monkeypatch) -> None:
    """Each rename is a state that a killed process may leave."""
    plans = {"train": kit.plan(LENGTHS)}
    renamed = Path.replace

    def check(self: Path, target: Path) -> Path:
        answer = renamed(self, target)
        for marker in path.glob(".encoding/train/*.json"):
            found = ChunkMarker.read(marker)
            chunk = plans["train"].chunk(int(marker.stem))
            codes = path / "train/codes/c" / marker.stem / "0/0"
            found.check(chunk, {"latents": latents_file(path, chunk.index), "codes": codes})
        return answer

    monkeypatch.setattr(Path, "replace", check)
    kit.build(path, plans)


def test_rewriting_other_content_leaves_no_marker_that_vouches_for_it(kit, path) -> None:
    """A chunk whose video changed: between the first new file and its marker, the old marker must not hold."""
    plans = {"train": kit.plan([4, 4])}
    kit.build(path, plans, stop_after=2)
    changed = {"train": SplitPlan(["a", "clip-01"], ["identity"] * 2, [4, 4], kit.shape, 4)}
    with StoreWriter.open(path, kit.metadata, changed, codes=True) as writer:
        (chunk,) = writer.pending("train")
        assert chunk.index == 0
        assert not (path / ".encoding/train/0.json").exists()


def test_what_a_marker_measures(kit, path) -> None:
    plan = kit.plan([5])
    with StoreWriter.open(path, kit.metadata, {"train": plan}, codes=False) as writer:
        values = [np.random.default_rng(index).normal(3, 2, (4 - 3 * index, *kit.shape)) for index in (0, 1)]
        for chunk, latents in zip(writer.pending("train"), values, strict=True):
            writer.write_chunk("train", chunk, latents, None, {"seen": chunk.index})
        markers = writer.markers("train")
        writer.finish()
    stored = np.concatenate([latents.astype(np.float16) for latents in values]).astype(np.float64)
    assert [marker.measured for marker in markers] == [{"seen": 0}, {"seen": 1}]
    assert [marker.frames for marker in markers] == [4, 1]
    statistics = channel_statistics(markers[::-1])
    np.testing.assert_allclose(statistics["mean"], stored.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(statistics["std"], stored.std((0, 2, 3)), rtol=1e-12)
    cache = latent_cache.open(path)
    np.testing.assert_allclose(cache.mean, stored.mean((0, 2, 3)), rtol=1e-6)


# Sessions


def test_a_task_writes_in_its_own_session_only(kit, path, all_files) -> None:
    plans = {"train": kit.plan(LENGTHS)}
    with StoreWriter.open(path, kit.metadata, plans, codes=True) as writer:
        chunk, late = writer.pending("train")[0], writer.chunk_writer
        latents = kit.latents(plans["train"], chunk)
        late.write("train", chunk, latents, kit.codes(latents))
    marker = path / ".encoding/train/0.json"
    before, inode = all_files(path), latents_file(path, 0).stat().st_ino
    with pytest.raises(StaleWriterError, match=r"toys\.zarr: the encoding that this task belongs to is over"):
        late.write("train", chunk, latents, kit.codes(latents))
    assert all_files(path) == before
    assert latents_file(path, 0).stat().st_ino == inode
    with StoreWriter.open(path, kit.metadata, plans, codes=True) as writer:
        assert [other.index for other in writer.pending("train")] == list(range(1, 9))
        with pytest.raises(StaleWriterError):
            late.write("train", chunk, latents, kit.codes(latents))
        assert marker.exists()


@pytest.mark.parametrize("checks", [1, 2])
def test_a_session_that_ends_while_a_chunk_is_written(kit, path, monkeypatch, checks: int) -> None:
    """Before the second file, or before the marker: nothing more is written, and the chunk is pending."""
    plans = {"train": kit.plan([3])}
    with StoreWriter.open(path, kit.metadata, plans, codes=True) as writer:
        chunk, late = writer.pending("train")[0], writer.chunk_writer
        check, calls = type(late)._check_session, []

        def ends(self: object) -> None:
            calls.append(1)
            if len(calls) > checks:
                (path / ".encoding/session").write_text("another")
            check(self)

        monkeypatch.setattr(type(late), "_check_session", ends)
        latents = kit.latents(plans["train"], chunk)
        with pytest.raises(StaleWriterError):
            late.write("train", chunk, latents, kit.codes(latents))
        assert not (path / ".encoding/train/0.json").exists()
        assert (path / "train/codes/c/0").exists() == (checks > 1)


# Shards


def test_shards_hold_what_chunks_hold(kit, tmp_path, path, shards) -> None:
    kit.build(path, shards)
    plain = kit.build(tmp_path / "plain.zarr", {"train": kit.plan(LENGTHS), "test": kit.plan([5])})
    for split, frames in (("train", 33), ("test", 5)):
        ours, theirs = latent_cache.open(path, split), latent_cache.open(plain, split)
        assert (ours.latents.chunks[0], ours.latents.shards[0]) == (4, 12)
        assert ours.latent_reader._plain_folder == path  # read in place, without zarr
        assert ours.load().numpy().tobytes() == theirs.load().numpy().tobytes()
        assert len(list((path / split / "latents/c").iterdir())) == -(-frames // 12)
        for row, length in enumerate(ours.lengths):
            np.testing.assert_array_equal(ours.video(row), theirs.video(row))
            np.testing.assert_array_equal(ours.video_codes(row), theirs.video_codes(row))
            assert len(ours.video(row)) == length
        # Whoever knows zarr reads the same.
        array = zarr.open_array(path / split / "latents", mode="r")
        np.testing.assert_array_equal(array[:], theirs.load().numpy())
        lazy = dask.array.from_zarr(array)
        np.testing.assert_array_equal(lazy.compute(scheduler="sync"), theirs.load().numpy())
        np.testing.assert_array_equal(zarr.open_array(path / split / "codes", mode="r")[:], theirs.codes[:])
    assert latent_cache.open(path).fingerprint == latent_cache.open(plain).fingerprint


@pytest.mark.parametrize("stop_after", [0, 1, 2, 4])
def test_an_interruption_between_shards_leaves_no_trace(
    kit, tmp_path, path, shards, all_files, stop_after: int
) -> None:
    kit.build(path, shards, stop_after=stop_after)
    with StoreWriter.open(path, kit.metadata, shards, codes=True) as writer:
        assert sum(len(writer.pending(split)) for split in shards) == 4 - stop_after
        assert writer.bytes_needed() == (4 - stop_after) * 12 * 2 * 3 * 4 * 2
    assert all_files(kit.build(path, shards)) == all_files(kit.build(tmp_path / "whole.zarr", shards))


@pytest.mark.parametrize("shard_chunks", [1, 2, 9])
def test_other_shards_start_the_split_again(kit, tmp_path, path, shards, all_files, shard_chunks: int) -> None:
    kit.build(path, shards, stop_after=2)
    after = {split: replace_shards(plan, shard_chunks) for split, plan in shards.items()}
    assert all_files(kit.build(path, after)) == all_files(kit.build(tmp_path / "fresh.zarr", after))


def flip(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    ("damage", "message", "videos"),
    [
        (lambda content: None, "is missing", "clip-03"),
        (lambda content: b"", "is empty", "clip-03"),
        (lambda content: content[:-30], "is truncated or overlong", "clip-03"),
        (lambda content: content[: len(content) // 2], "is truncated or overlong", "clip-03"),
        (lambda content: flip(content, 10), "is damaged", "clip-03"),
        (lambda content: flip(content, -10), "is damaged", "clip-03"),
    ],
)
def test_a_damaged_shard_is_named(kit, path, shards, damage: Callable, message: str, videos: str) -> None:
    """Its second file has frames 12 to 23: of the fourth, fifth and sixth video."""
    kit.build(path, shards)
    file = latents_file(path, 1)
    content = damage(file.read_bytes())
    file.unlink() if content is None else file.write_bytes(content)
    cache = latent_cache.open(path)
    cache.video(0)  # in another file
    with pytest.raises(CorruptStoreError, match=rf"train/latents/c/1/0/0/0 {message}.*{videos}") as raised:
        cache.load()
    assert "clip-00" not in str(raised.value)


def test_a_chunk_in_a_shard_carries_its_own_videos(kit, path, shards) -> None:
    """Damage in the third chunk of a file, frames 20 to 23, does not hurt the first."""
    kit.build(path, shards)
    file = latents_file(path, 1)
    content = file.read_bytes()
    size = 4 * 2 * 3 * 4 * 2 + 4
    offset, length = struct.unpack_from("<QQ", content, len(content) - 4 - 3 * 16 + 2 * 16)
    assert length == size
    file.write_bytes(flip(content, offset + 5))
    cache = latent_cache.open(path)
    cache.latent_reader.read(12, 20)
    with pytest.raises(CorruptStoreError, match=r"It carries 2 video\(s\): 'clip-04', 'clip-05'"):
        cache.latent_reader.read(20, 21)
    with pytest.raises(CorruptStoreError, match=r"It carries 2 video\(s\): 'clip-04', 'clip-05'"):
        cache.load()


@pytest.mark.parametrize("frames", [1, 5, 11, 12])
def test_a_file_is_what_zarr_would_write(kit, path, shards, frames: int) -> None:
    kit.build(path, shards, stop_after=1)
    for name in ("latents", "codes"):
        array = zarr.open_array(path / "train" / name, mode="r+")
        values = np.random.default_rng(frames).integers(0, 9, (frames, *array.shape[1:])).astype(array.dtype)
        content = file_content(array, values)
        filled = np.full((12, *array.shape[1:]), array.fill_value, array.dtype)
        filled[:frames] = values
        array[12:24] = filled
        file = path / "train" / name / "c/1" / "/".join("0" * (array.ndim - 1))
        if frames > 8:  # zarr leaves out chunks of a shard that hold nothing but filler
            assert file.read_bytes() == content
        file.write_bytes(content)
        np.testing.assert_array_equal(array[12:24], filled)
        places = struct.unpack("<6Q", content[-52:-4])
        assert max(places) < len(content)  # all three are there


def test_when_several_chunks_share_a_file() -> None:
    assert default_shard_chunks(5000 * 7, 7) == 1
    assert default_shard_chunks(5000 * 7 + 1, 7) == schema.SHARD_CHUNKS > 1


# Names


@pytest.fixture
def names(kit, path, monkeypatch) -> Names:
    """Of ten videos, in chunks of three: 3, 3, 3 and 1."""
    monkeypatch.setattr(schema, "NAME_CHUNK", 3)
    words = ["a", "bé", "\N{ROCKET}", "d d", "e\n", "f", "g" * 300, "h", "a2", "j"]
    kit.build(path, {"train": kit.plan([1] * 10, names=words)})
    return latent_cache.open(path).video_ids


WORDS = ["a", "bé", "\N{ROCKET}", "d d", "e\n", "f", "g" * 300, "h", "a2", "j"]


def test_names_are_a_sequence(names: Names) -> None:
    assert len(names) == 10
    assert list(names) == WORDS
    assert [names[index] for index in range(-10, 10)] == WORDS + WORDS
    for key in (slice(None), slice(2, 7), slice(-3, None), slice(None, None, -1), slice(1, 9, 3), slice(5, 2)):
        assert names[key] == WORDS[key]
    for index in (10, -11):
        with pytest.raises(IndexError):
            names[index]
    assert "\N{ROCKET}" in names
    assert "nobody" not in names
    assert 3 not in names
    assert names.index("h") == 7
    assert names == WORDS
    assert names == tuple(WORDS)
    assert names != WORDS[:-1]
    assert names != [*WORDS[:-1], "k"]
    assert names != 3
    assert repr(names) == "<10 names, 'a' first>"
    assert all(type(name) is str for name in names)


def test_find_looks_through_all_chunks(kit, path, monkeypatch) -> None:
    monkeypatch.setattr(schema, "NAME_CHUNK", 2)
    ids, views = ["a", "a", "b", "c", "c", "c", "d"], ["identity", "hflip", "identity", "identity", "hflip", "x", "y"]
    plan = SplitPlan(ids, views, [1] * 7, kit.shape, 4)
    kit.build(path, {"train": plan})
    cache = latent_cache.open(path)
    for name in {*ids, "nobody"}:
        found = cache.video_ids.find(name)
        assert found.dtype == np.int64
        assert found.tolist() == [row for row, other in enumerate(ids) if other == name]
    assert cache.row("c", "x") == 5
    assert cache.row("a", "hflip") == 1
    assert list(cache.video_views) == views


def test_one_chunk_of_names_is_read_for_one_name(names: Names, monkeypatch) -> None:
    reads, read = [], zarr.Array.__getitem__

    def counted(self: zarr.Array, key: object) -> object:
        reads.append(key)
        return read(self, key)

    monkeypatch.setattr(zarr.Array, "__getitem__", counted)
    assert names[4] == "e\n"
    assert names[3:6] == WORDS[3:6]
    assert reads == [slice(3, 6)]


@pytest.mark.parametrize("damage", ["missing", "flipped", "empty"])
@pytest.mark.parametrize("array", ["video_id", "video_view"])
def test_lost_names_are_noticed(names: Names, path, damage: str, array: str) -> None:
    file = path / "train" / array / "c/1"
    if damage == "missing":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(b"" if damage == "empty" else flip(content, len(content) // 2))
    cache = latent_cache.open(path)  # looks at the first and the last chunk alone
    lazy = cache.video_ids if array == "video_id" else cache.video_views
    assert lazy[0]
    assert lazy[9]
    for use in (lambda: lazy[4], lambda: list(lazy), lambda: lazy.find("j"), lambda: lazy == WORDS):
        with pytest.raises(CorruptStoreError, match=rf"toys\.zarr/train/{array}/c/1 is (missing|damaged)"):
            use()


@pytest.mark.parametrize("chunk", [0, 3])
def test_lost_names_at_the_ends_are_noticed_at_once(names: Names, path, chunk: int) -> None:
    (path / f"train/video_id/c/{chunk}").unlink()
    with pytest.raises(CorruptStoreError, match=rf"video_id/c/{chunk} is missing"):
        latent_cache.open(path)


def test_a_removed_folder_of_a_split_is_made_anew(kit, tmp_path, path, all_files) -> None:
    kit.build(path, stop_after=4)
    shutil.rmtree(path / "train")
    assert all_files(kit.build(path)) == all_files(kit.build(tmp_path / "whole.zarr"))
