"""Writing chunks: what markers guarantee, sessions, values that must not be stored, and files as zarr writes them."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

import latent_cache
from latent_cache import SplitPlan, StaleWriterError, StoreError, StoreWriter
from latent_cache.writing.chunk_writer import file_content
from latent_cache.writing.markers import ChunkMarker, channel_statistics

LENGTHS = [3, 7, 2, 1, 9, 6, 5]  # 33 frames: 9 chunks of 4, and 3 shards of 12


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "toys.zarr"


# Markers


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("array", ["latents", "codes"])
def test_a_file_of_another_chunk_is_noticed(kit, tmp_path, path, shards, all_files, sharded: bool, array: str) -> None:
    """The chunk's own checksum is right; the marker's is not."""
    plans = shards if sharded else {"train": kit.plan(LENGTHS)}
    kit.build(path, plans, stop_after=3)
    first, second = (path / "train" / array / "c" / str(index) for index in (0, 1))
    other = path.with_name("other")
    for source, target in ((first, other), (second, first), (other, second)):
        source.rename(target)
    with StoreWriter.open(path, kit.metadata, plans, codes=True) as writer:
        pending = [chunk.index for chunk in writer.pending("train")]
    assert pending[:2] == [0, 1]
    assert 2 not in pending
    kit.build(path, plans)
    assert all_files(path) == all_files(kit.build(tmp_path / "whole.zarr", plans))


@pytest.mark.parametrize(
    "change", [{"frames": 3}, {"key": "0"}, {"files": {}}, {"files": {"latents": 1}}, {"extra": 1}, None, "swapped"]
)
def test_a_wrong_marker_is_not_believed(kit, path, change) -> None:
    plans = {"train": kit.plan([3, 7, 2])}
    kit.build(path, plans, stop_after=2)
    marker, other = (path / f".encoding/train/{index}.json" for index in (1, 0))
    if change == "swapped":
        content = other.read_text()
        other.write_text(marker.read_text())
        marker.write_text(content)
    elif change is None:
        marker.write_text('{"key": "')
    else:
        marker.write_text(json.dumps(json.loads(marker.read_text()) | change))
    (path / ".encoding/train/77.json").write_text("{}")
    with StoreWriter.open(path, kit.metadata, plans, codes=True) as writer:
        assert [chunk.index for chunk in writer.pending("train")] == ([0, 1, 2] if change == "swapped" else [1, 2])
    assert not marker.exists()


def test_a_marker_comes_after_its_files_and_never_without_them(kit, path, monkeypatch) -> None:
    """Each rename is a state that a killed process may leave."""
    plans, checked = {"train": kit.plan(LENGTHS)}, []
    renamed = Path.replace

    def check(self: Path, target: Path) -> Path:
        answer = renamed(self, target)
        for marker in path.glob(".encoding/train/*.json"):
            chunk = plans["train"].chunk(int(marker.stem))
            arrays = {"latents": f"{chunk.index}/0/0/0", "codes": f"{chunk.index}/0/0"}
            ChunkMarker.read(marker).check(
                chunk, {name: path / f"train/{name}/c/{key}" for name, key in arrays.items()}
            )
            checked.append(chunk.index)
        return answer

    monkeypatch.setattr(Path, "replace", check)
    kit.build(path, plans)
    assert set(checked) == set(range(9))


def test_other_content_leaves_no_marker_of_the_old_one(kit, path) -> None:
    """A chunk whose video changed: between the first new file and its marker, the old marker must not be there."""
    plans = {"train": kit.plan([4, 4])}
    kit.build(path, plans, stop_after=2)
    with StoreWriter.open(
        path, kit.metadata, {"train": kit.plan([4, 4], names=["a", "clip-01"])}, codes=True
    ) as writer:
        assert [chunk.index for chunk in writer.pending("train")] == [0]
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
    np.testing.assert_array_equal(latent_cache.open(path).mean, np.float32(statistics["mean"]))


# Sessions


def test_a_task_writes_in_its_own_session_only(kit, path, all_files) -> None:
    plans = {"train": kit.plan(LENGTHS)}
    with StoreWriter.open(path, kit.metadata, plans, codes=True) as writer:
        chunk, late = writer.pending("train")[0], writer.chunk_writer
        latents = kit.latents(plans["train"], chunk)
        late.write("train", chunk, latents, kit.codes(latents))
    before, inode = all_files(path), (path / "train/latents/c/0/0/0/0").stat().st_ino
    with pytest.raises(StaleWriterError, match=str(path)):
        late.write("train", chunk, latents, kit.codes(latents))
    assert all_files(path) == before
    assert (path / "train/latents/c/0/0/0/0").stat().st_ino == inode
    with StoreWriter.open(path, kit.metadata, plans, codes=True) as writer:
        assert [other.index for other in writer.pending("train")] == list(range(1, 9))
        with pytest.raises(StaleWriterError):
            late.write("train", chunk, latents, kit.codes(latents))
        assert (path / ".encoding/train/0.json").exists()


@pytest.mark.parametrize("written", [1, 2])
def test_a_session_that_ends_while_a_chunk_is_written(kit, path, monkeypatch, written: int) -> None:
    """Before the second file, or before the marker: nothing more is written, and the chunk is pending."""
    renamed, files = Path.replace, []

    def replace_then_end(self: Path, target: Path) -> Path:
        files.append(target)
        if len(files) == written:
            (path / ".encoding/session").write_text("another")
        return renamed(self, target)

    plans = {"train": kit.plan([3])}
    with StoreWriter.open(path, kit.metadata, plans, codes=True) as writer:
        (chunk,), latents = writer.pending("train"), kit.latents(plans["train"], writer.pending("train")[0])
        monkeypatch.setattr(Path, "replace", replace_then_end)
        with pytest.raises(StaleWriterError):
            writer.chunk_writer.write("train", chunk, latents, kit.codes(latents))
    assert not (path / ".encoding/train/0.json").exists()
    assert (path / "train/codes/c/0").exists() == (written > 1)


# Values


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "nan"), (-np.inf, "-inf"), (70000.0, r"70000\.0 .*float16.*float32")]
)
def test_values_that_cannot_be_stored_name_their_video(kit, path, value, message):
    with StoreWriter.open(path, kit.metadata, {"train": kit.plan([3, 7])}, codes=False) as writer:
        chunk = writer.pending("train")[0]
        latents = kit.latents(writer.plans["train"], chunk)
        latents[3, 1, 2, 3] = value
        with pytest.raises(StoreError, match=rf"{path}/train.*1 video\(s\): 'clip-01'") as raised:
            writer.write_chunk("train", chunk, latents, None)
        raised.match(message)
        assert len(writer.pending("train")) == 3


def test_float32_stores_hold_what_float16_cannot(kit, path):
    with StoreWriter.open(path, kit.metadata, {"train": kit.plan([2])}, codes=False, dtype="float32") as writer:
        writer.write_chunk("train", writer.pending("train")[0], np.full((2, *kit.shape), 70000.0), None)
        writer.finish()
    assert float(latent_cache.open(path).load().max()) == 70000.0


def test_arrays_that_do_not_fit_the_plan(kit, path):
    with StoreWriter.open(path, kit.metadata, {"train": kit.plan([3, 7])}, codes=True) as writer:
        chunk = writer.pending("train")[0]
        latents = kit.latents(writer.plans["train"], chunk)
        codes = kit.codes(latents)
        for given, message in [
            ((latents[:3], codes[:3]), r"latents .*\[3, 2, 3, 4\].*\[4, 2, 3, 4\]"),
            ((latents.astype(int), codes), "latents .*floats"),
            ((latents, None), "codes are missing"),
            ((latents, codes[:3]), r"codes .*\[3, 3, 4\].*\[4, 3, 4\]"),
            ((latents, codes + 0.5), "codes .*integers"),
            ((latents, codes + 65536), "codes .* 65535"),
            ((latents, codes - 65536), "codes .* 65535"),
            ((latents, codes, None, {"preview": np.zeros((4, 1, 1, 3), np.uint8)}), "preview"),
        ]:
            with pytest.raises(ValueError, match=message):
                writer.write_chunk("train", chunk, *given)
        with pytest.raises(ValueError, match="`pending`"):
            writer.write_chunk("train", replace(chunk, stop=3), latents[:3], codes[:3])


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
        if frames > 8:  # zarr leaves out chunks of a shard that hold nothing but the fill value
            assert file.read_bytes() == content
        file.write_bytes(content)
        np.testing.assert_array_equal(array[12:24], filled)
        places = struct.unpack("<6Q", content[-52:-4])
        assert max(places) < len(content)  # all three chunks are there


@pytest.mark.parametrize("stop_after", [0, 1, 2, 4])
def test_an_interruption_between_shards_leaves_no_trace(kit, tmp_path, path, shards, all_files, stop_after) -> None:
    kit.build(path, shards, stop_after=stop_after)
    with StoreWriter.open(path, kit.metadata, shards, codes=True) as writer:
        assert sum(len(writer.pending(split)) for split in shards) == 4 - stop_after
        assert writer.bytes_needed() == (4 - stop_after) * 12 * 2 * 3 * 4 * 2
    assert all_files(kit.build(path, shards)) == all_files(kit.build(tmp_path / "whole.zarr", shards))


@pytest.mark.parametrize(("chunk_frames", "shard_chunks"), [(4, 1), (4, 2), (4, 9), (5, 3)])
def test_other_chunks_or_shards_start_the_split_again(
    kit, tmp_path, path, shards, all_files, chunk_frames: int, shard_chunks: int
) -> None:
    kit.build(path, shards, stop_after=2)
    after: dict[str, SplitPlan] = {
        split: kit.plan(plan.lengths, chunk_frames, shard_chunks=shard_chunks) for split, plan in shards.items()
    }
    assert all_files(kit.build(path, after)) == all_files(kit.build(tmp_path / "fresh.zarr", after))
