"""Writing: interruptions, changed plans, second writers, values that must not be stored."""

import json
import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import latent_cache
from latent_cache import (
    IncompleteStoreError,
    LockedStoreError,
    NoSpaceError,
    SplitPlan,
    StoreError,
    StoreMismatchError,
    StoreWriter,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "toys.zarr"


@pytest.mark.parametrize("done", range(9))
def test_an_interruption_after_any_chunk_leaves_no_trace(kit, tmp_path, path, all_files, done):
    whole = all_files(kit.build(tmp_path / "whole.zarr"))
    kit.build(path, stop_after=done)
    assert not latent_cache.is_complete(path)
    plans = {"train": kit.plan([3, 7, 2, 1, 9]), "test": kit.plan([5])}
    with StoreWriter.open(path, kit.metadata, plans, codes=True) as writer:
        assert sum(len(writer.pending(split)) for split in plans) == 8 - min(done, 8)
    assert all_files(kit.build(path)) == whole


def test_an_interruption_anywhere_leaves_no_trace(kit, tmp_path, path, all_files, monkeypatch):
    """Stop at the k-th flush, for every k: before, between and after each file of the store."""
    plans = {"train": kit.plan([3, 4])}
    whole = all_files(kit.build(tmp_path / "whole.zarr", plans))
    for stop_at in range(0, 1000):
        calls = iter(range(stop_at))

        def stop(descriptor, calls=calls):
            if next(calls, None) is None:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", stop)
            try:
                kit.build(path, plans)
                break
            except KeyboardInterrupt:
                pass
        if latent_cache.is_complete(path):
            assert not [name for name in all_files(path).keys() ^ whole.keys() if not name.startswith(".encoding")]
        else:
            kit.build(path, plans)
            assert all_files(path) == whole
        shutil.rmtree(path)
    assert 30 < stop_at < 999


def test_each_chunk_is_on_disk_before_its_marker_and_all_before_complete(kit, path, monkeypatch):
    """A file counts as on disk once its content was flushed, and its name in its folder, and so on up to the store."""
    flushed, named = {}, set()

    def on_disk(file):
        ours = [file, *(folder for folder in file.parents if folder.is_relative_to(path))]
        return flushed.get(file.stat().st_ino) == file.stat().st_mtime_ns and named.issuperset(ours)

    def flush(descriptor):
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if name.is_file():
            flushed[name.stat().st_ino] = name.stat().st_mtime_ns
        else:
            named.update(name.iterdir())
        for marker in path.glob(".encoding/*/*.json"):
            for array in ("latents", "codes"):
                files = [*path.glob(f"{marker.parent.name}/{array}/c/{marker.stem}/**/0")]
                assert [file for file in files if file.is_file() and on_disk(file)]
        root = path / "zarr.json"
        if root.exists() and json.loads(root.read_text())["attributes"]["complete"]:
            data = [file for file in path.glob("*/**/*") if file.is_file() and ".encoding" not in file.parts]
            assert len(data) > 20
            assert not [file for file in data if flushed.get(file.stat().st_ino) != file.stat().st_mtime_ns]

    monkeypatch.setattr("os.fsync", flush)
    kit.build(path)
    assert on_disk(path / "zarr.json")


@pytest.mark.parametrize(
    ("names", "lengths", "kept"),
    [
        pytest.param(["a", "b", "d"], [6, 5, 5], [0, 1], id="a later video dropped"),
        pytest.param(["b", "c", "d"], [5, 5, 5], [], id="the first video dropped"),
        pytest.param(["a", "b", "c", "d", "e"], [6, 5, 5, 5, 3], [0, 1, 2, 3, 4], id="a video added"),
        pytest.param(["a", "b", "c", "d"], [6, 5, 5, 3], [0, 1, 2, 3], id="a video shorter than thought"),
    ],
)
def test_a_changed_plan_keeps_what_still_fits(kit, tmp_path, path, all_files, names, lengths, kept):
    before = kit.plan([6, 5, 5, 5], names=["a", "b", "c", "d"])
    after = kit.plan(lengths, names=names)
    kit.build(path, {"train": before}, stop_after=5)
    inodes = {index: (path / f"train/latents/c/{index}/0/0/0").stat().st_ino for index in range(5)}
    with StoreWriter.open(path, kit.metadata, {"train": after}, codes=True) as writer:
        pending = [chunk.index for chunk in writer.pending("train")]
        assert pending == [index for index in range(len(after.chunks)) if index not in kept]
    kit.build(path, {"train": after})
    assert all((path / f"train/latents/c/{index}/0/0/0").stat().st_ino == inodes[index] for index in kept)
    assert all_files(path) == all_files(kit.build(tmp_path / "fresh.zarr", {"train": after}))


def test_other_chunk_sizes_start_the_split_again(kit, tmp_path, path, all_files):
    kit.build(path, {"train": kit.plan([9, 5])}, stop_after=2)
    after = {"train": kit.plan([9, 5], chunk_frames=5)}
    assert all_files(kit.build(path, after)) == all_files(kit.build(tmp_path / "fresh.zarr", after))


@pytest.mark.parametrize("array", ["latents/c/1/0/0/0", "codes/c/1/0/0"])
@pytest.mark.parametrize("damage", ["flip", "missing", "empty"])
def test_a_finished_chunk_that_was_damaged_is_written_again(kit, tmp_path, path, all_files, caplog, array, damage):
    kit.build(path, stop_after=3)
    file = path / "train" / array
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content if damage == "flip" else b"")
    if damage == "missing":
        file.unlink()
    caplog.set_level(logging.INFO)
    kit.build(path)
    assert "chunk 1 of train is written again" in caplog.text
    assert all_files(path) == all_files(kit.build(tmp_path / "whole.zarr"))


def test_a_torn_marker_and_leftovers_of_a_killed_writer_do_no_harm(kit, tmp_path, path, all_files):
    kit.build(path, stop_after=4)
    (path / ".encoding/train/1.json").write_text('{"key": "')
    (path / ".encoding/train/77.json").write_text("{}")
    (path / "train/latents/c/1/0/0/0.abc.partial").write_bytes(b"half")
    assert all_files(kit.build(path)) == all_files(kit.build(tmp_path / "whole.zarr"))


def test_writing_a_chunk_twice_is_the_same_as_once(kit, tmp_path, path, all_files):
    plans = {"train": kit.plan([6, 5])}
    with StoreWriter.open(path, kit.metadata, plans, codes=True) as writer:
        for chunk in [*writer.pending("train"), *writer.pending("train")]:
            kit.write(writer, "train", chunk)
        assert writer.pending("train") == []
        writer.finish()
    assert all_files(path) == all_files(kit.build(tmp_path / "once.zarr", plans))


def test_a_failed_rewrite_makes_the_chunk_pending_again(kit, path, monkeypatch):
    with StoreWriter.open(path, kit.metadata, {"train": kit.plan([6])}, codes=True) as writer:
        for chunk in writer.pending("train"):
            kit.write(writer, "train", chunk)

        def fail(descriptor):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", fail)
            with pytest.raises(NoSpaceError, match="no space left for chunk 0 of train"):
                kit.write(writer, "train", writer.plans["train"].chunks[0])
        with pytest.raises(IncompleteStoreError, match=r"chunks still to be written: {'train': 1}"):
            writer.finish()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"autoencoder": {"architecture": "vqgan", "sha256": "77c1", "downsampling": 8}},
            "sha256: '77c1' here, '3f9a'",
        ),
        ({"preprocessing": {"image_size": 32, "resize": "area"}}, "preprocessing.image_size: 32 here, 24 there"),
        ({"fps": 5.0}, r"fps: 5\.0 here, 25\.0 there"),
    ],
)
@pytest.mark.parametrize("stop_after", [2, None])
def test_another_origin_is_refused_with_both_sides_and_the_way_out(kit, path, change, message, stop_after):
    kit.build(path, stop_after=stop_after)
    kit.metadata = replace(kit.metadata, **change)
    with pytest.raises(StoreMismatchError, match=rf"(?s)toys\.zarr.*{message}.*--overwrite"):
        kit.build(path)
    kit.build(path, overwrite=True)
    assert latent_cache.open_metadata(path) == kit.metadata


def test_other_arrays_or_splits_are_refused(kit, path):
    kit.build(path, stop_after=7)
    for options, message in [
        ({"codes": False}, "train codes: False here, True there"),
        ({"dtype": "float32"}, "train dtype: float32 here, float16 there"),
        ({"plans": {"train": kit.plan([3, 7, 2, 1, 9])}}, r"splits: \['train'\] here, also \['test'\] there"),
    ]:
        with pytest.raises(StoreMismatchError, match=message):
            kit.build(path, **options)
    kit.shape = (2, 5, 4)
    with pytest.raises(StoreMismatchError, match=r"latent shape: \(2, 5, 4\) here, \(2, 3, 4\) there"):
        kit.build(path)


def test_other_software_may_go_on(kit, path):
    kit.build(path, stop_after=3)
    kit.metadata = replace(kit.metadata, software={"zarr": "4"})
    assert latent_cache.open(kit.build(path)).metadata.software == {"zarr": "4"}


def test_a_complete_store_is_written_anew_only_when_asked(kit, tmp_path, path, all_files):
    kit.build(path)
    before = all_files(path)
    assert not (path / ".encoding").exists()
    with pytest.raises(StoreError, match="is complete: there is nothing to write, except anew with --overwrite"):
        kit.build(path)
    assert all_files(path) == before
    assert not (path / ".encoding").exists()
    after = {"train": kit.plan([5])}
    kit.build(path, after, overwrite=True)
    assert all_files(path) == all_files(kit.build(tmp_path / "fresh.zarr", after))


def test_overwrite_never_touches_what_is_not_ours(kit, path):
    path.mkdir()
    (path / "thesis.txt").write_text("four years")
    with pytest.raises(StoreError, match="holds something else, and no store is written over it"):
        kit.build(path, overwrite=True)
    assert [file.name for file in path.iterdir()] == ["thesis.txt"]


def test_an_interrupted_overwrite_is_never_taken_for_complete(kit, tmp_path, path, all_files, monkeypatch):
    plans = {"train": kit.plan([4])}
    whole = all_files(kit.build(tmp_path / "whole.zarr", plans))
    for stop_at in range(0, 40, 3):
        kit.build(path)
        calls = iter(range(stop_at))

        def stop(descriptor, calls=calls):
            if next(calls, None) is None:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", stop)
            with pytest.raises(KeyboardInterrupt):
                kit.build(path, plans, overwrite=True)
        assert not latent_cache.is_complete(path)
        assert all_files(kit.build(path, plans)) == whole
        shutil.rmtree(path)


def test_threads_may_write_different_chunks(kit, tmp_path, path, all_files):
    plans = {"train": kit.plan([5] * 8)}
    with StoreWriter.open(path, kit.metadata, plans, codes=True) as writer:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda chunk: kit.write(writer, "train", chunk), writer.pending("train")))
        writer.finish()
    assert all_files(path) == all_files(kit.build(tmp_path / "one by one.zarr", plans))


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "they hold nan"), (-np.inf, "they hold -inf"), (70000.0, "70000.0 does not fit float16.*float32")],
)
def test_values_that_cannot_be_stored_name_their_video(kit, path, value, message):
    with StoreWriter.open(path, kit.metadata, {"train": kit.plan([3, 7])}, codes=False) as writer:
        chunk = writer.pending("train")[0]
        latents = kit.latents(writer.plans["train"], chunk)
        latents[3, 1, 2, 3] = value
        with pytest.raises(StoreError, match=rf"toys\.zarr/train.*{message.split('.*')[0]}.*1 video\(s\): 'clip-01'"):
            writer.write_chunk("train", chunk, latents, None)
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
            ((latents[:3], codes[:3]), r"latents float32\[3, 2, 3, 4\]: floats \[4, 2, 3, 4\]"),
            ((latents.astype(int), codes), "floats"),
            ((latents, None), "codes are missing"),
            ((latents, codes[:3]), r"codes int64\[3, 3, 4\]: integers"),
            ((latents, codes + 65536), "0 to 65535 can be stored"),
            ((latents, codes - 65536), "0 to 65535 can be stored"),
        ]:
            with pytest.raises(ValueError, match=message):
                writer.write_chunk("train", chunk, *given)
        with pytest.raises(ValueError, match="take it from `pending`"):
            writer.write_chunk("train", replace(chunk, stop=3), latents[:3], codes[:3])


def test_finish_before_the_end_is_refused(kit, path):
    with StoreWriter.open(path, kit.metadata, {"train": kit.plan([3, 7])}, codes=True) as writer:
        kit.write(writer, "train", writer.pending("train")[0])
        with pytest.raises(IncompleteStoreError, match=r"chunks still to be written: {'train': 2}"):
            writer.finish()


def test_finish_notices_a_chunk_that_went_away(kit, path):
    with StoreWriter.open(path, kit.metadata, {"train": kit.plan([3, 7])}, codes=True) as writer:
        for chunk in writer.pending("train"):
            kit.write(writer, "train", chunk)
        (path / "train/codes/c/1/0/0").unlink()
        with pytest.raises(latent_cache.CorruptStoreError, match=r"codes/c/1/0/0 is missing \(1 of 3"):
            writer.finish()
    assert not latent_cache.is_complete(path)


def test_where_a_store_cannot_be_written(kit):
    plan = kit.plan([3])
    with pytest.raises(StoreError, match=r"s3://bucket/a\.zarr: a store is written to a local folder"):
        StoreWriter.open("s3://bucket/a.zarr", kit.metadata, {"train": plan}, codes=False)
    with pytest.raises(StoreError, match=r"splits \['test'\] lack 'train'"):
        StoreWriter.open("a.zarr", kit.metadata, {"test": plan}, codes=False)
    other = SplitPlan(["a"], ["identity"], [3], (9, 9, 9), 3)
    with pytest.raises(StoreError, match="the splits' latents differ in shape"):
        StoreWriter.open("a.zarr", kit.metadata, {"train": plan, "test": other}, codes=False)


def test_a_second_writer_is_refused_while_the_first_lives(kit, path):
    plans = {"train": kit.plan([3, 7])}
    with StoreWriter.open(path, kit.metadata, plans, codes=True):
        for overwrite in (False, True):
            with pytest.raises(LockedStoreError, match=rf"process {os.getpid()} on .* is writing this store"):
                StoreWriter.open(path, kit.metadata, plans, codes=True, overwrite=overwrite)
    StoreWriter.open(path, kit.metadata, plans, codes=True).close()


HOLD_THE_LOCK = """
import sys, time
from pathlib import Path
from latent_cache.writing.disk import WriterLock
lock = WriterLock(Path(sys.argv[1], ".encoding", "writer.lock"))
sys.stdout.write("held"); sys.stdout.flush()
time.sleep(60)
"""


def test_a_killed_writer_on_this_host_is_recognised(kit, path):
    kit.build(path, stop_after=2)
    holder = subprocess.Popen([sys.executable, "-c", HOLD_THE_LOCK, str(path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.read(4) == b"held"
        with pytest.raises(LockedStoreError, match=f"process {holder.pid} on "):
            kit.build(path)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert (path / ".encoding/writer.lock").exists()
    kit.build(path)
    assert latent_cache.is_complete(path)


def test_a_file_system_without_locks(kit, path, monkeypatch):
    def refuse(descriptor, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(StoreError, match=r"its file system has no file locks .*: write the store on another disk"):
        kit.build(path)


def test_a_writer_on_another_host_is_believed(kit, path):
    kit.build(path, stop_after=2)
    lock = path / ".encoding/writer.lock"
    lock.write_text('{"host": "elsewhere", "pid": 12}')
    with pytest.raises(LockedStoreError, match=r"process 12 on elsewhere was writing.*delete .*writer.lock"):
        kit.build(path)
    lock.unlink()
    kit.build(path)
