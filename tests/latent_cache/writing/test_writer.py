"""Writing a store: interruptions, changed plans, other stores, second writers."""

import json
import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

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


def test_an_interruption_after_any_chunk_leaves_no_trace(kit, tmp_path, path, all_files):
    """Nor do a folder of a split that is removed, the temporary file of a killed writer, and another software."""
    whole = all_files(kit.build(tmp_path / "whole.zarr"))
    plans = {"train": kit.plan([3, 7, 2, 1, 9]), "test": kit.plan([5])}
    written_by = kit.metadata.software
    for done in range(9):
        kit.metadata = replace(kit.metadata, software={"zarr": f"2.{done}"})
        kit.build(path, stop_after=done)
        kit.metadata = replace(kit.metadata, software=written_by)
        assert not latent_cache.is_complete(path)
        with StoreWriter.open(path, kit.metadata, plans, codes=True) as writer:
            assert sum(len(writer.pending(split)) for split in plans) == 8 - min(done, 8)
        if done == 3:
            (path / "train/latents/c/1/0/0/0.abc.partial").write_bytes(b"half")
        if done == 4:
            shutil.rmtree(path / "train")
        assert all_files(kit.build(path)) == whole
        shutil.rmtree(path)


@contextmanager
def interrupted_at_flush(number):
    """Yield a list that holds True if the block was interrupted at its `number`-th flush."""
    calls, interrupted = iter(range(number)), []

    def stop(descriptor):
        if next(calls, None) is None:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", stop)
        try:
            yield interrupted
        except KeyboardInterrupt:
            interrupted.append(True)


def test_an_interruption_anywhere_leaves_no_trace(kit, tmp_path, path, all_files):
    """Stop at the k-th flush, for every k: before, between and after each file of the store."""
    plans = {"train": kit.plan([3])}
    whole = all_files(kit.build(tmp_path / "whole.zarr", plans))
    for stop_at in range(1000):
        with interrupted_at_flush(stop_at) as interrupted:
            kit.build(path, plans)
        if not interrupted:
            break
        if latent_cache.is_complete(path):
            assert not [name for name in all_files(path).keys() ^ whole.keys() if not name.startswith(".encoding")]
        else:
            # `encode` takes a store without it for one that was copied too early.
            assert (path / ".encoding").exists()
            kit.build(path, plans)
            assert all_files(path) == whole
        shutil.rmtree(path)
    assert 25 < stop_at < 999


def test_documents_that_a_loss_of_power_left_empty_are_written_again(kit, tmp_path, path, all_files):
    kit.build(path, stop_after=0)
    documents = [*path.rglob("zarr.json")]
    assert len(documents) > 3
    for document in documents:
        document.write_bytes(b"")
    assert not latent_cache.is_complete(path)
    kit.build(path)
    assert all_files(path) == all_files(kit.build(tmp_path / "whole.zarr"))


def test_documents_of_small_arrays_that_a_loss_of_power_cut_off_are_written_again(kit, tmp_path, path, all_files):
    kit.build(path, stop_after=0)
    begun = {*path.rglob("zarr.json")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latent_cache.writing.writer.write_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            kit.build(path)
    made = {*path.rglob("zarr.json")} - begun
    assert len(made) > 3
    for document in made:
        document.write_bytes(document.read_bytes()[:50])
    kit.build(path)
    assert all_files(path) == all_files(kit.build(tmp_path / "whole.zarr"))


def test_documents_are_rewritten_on_disk_before_they_have_their_names(kit, path, monkeypatch):
    """Else a loss of power while a store is finished leaves one that is cut off."""
    kit.build(path, stop_after=0)
    begun = {file: file.stat().st_ino for file in path.rglob("zarr.json")}
    flushed, rewritten, rename = set(), [], os.replace

    def name(source, target):
        if Path(target) in begun:
            rewritten.append(os.stat(source).st_ino in flushed)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: flushed.add(os.fstat(descriptor).st_ino))
        patch.setattr(os, "replace", name)
        patch.setattr(Path, "replace", lambda source, target: name(source, target))
        kit.build(path)
    assert [file for file, inode in begun.items() if file.stat().st_ino != inode]
    assert rewritten
    assert all(rewritten)


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


@pytest.mark.parametrize("array", ["latents/c/1/0/0/0", "codes/c/1/0/0"])
def test_a_finished_chunk_that_was_damaged_is_written_again(kit, tmp_path, path, all_files, caplog, array, damage):
    kit.build(path, stop_after=3)
    damage(path / "train" / array)
    caplog.set_level(logging.INFO)
    kit.build(path)
    assert "chunk 1 of train" in caplog.text
    assert all_files(path) == all_files(kit.build(tmp_path / "whole.zarr"))


def test_a_failed_rewrite_makes_the_chunk_pending_again(kit, path, monkeypatch):
    with StoreWriter.open(path, kit.metadata, {"train": kit.plan([6])}, codes=True) as writer:
        for chunk in writer.pending("train"):
            kit.write(writer, "train", chunk)

        def fail(descriptor):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", fail)
            with pytest.raises(NoSpaceError, match=f"{path}.*no space left.*chunk 0 of train"):
                kit.write(writer, "train", writer.plans["train"].chunks[0])
        with pytest.raises(IncompleteStoreError, match=rf"{path}.*'train': 1"):
            writer.finish()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"autoencoder": {"architecture": "vqgan", "sha256": "77c1"}}, "sha256: '77c1' .*'3f9a'"),
        ({"preprocessing": {"image_size": 32, "resize": "area"}}, r"preprocessing\.image_size: 32 .*24"),
    ],
)
@pytest.mark.parametrize("stop_after", [2, None])
def test_another_origin_is_refused_with_both_sides_and_the_way_out(kit, path, change, message, stop_after):
    kit.build(path, stop_after=stop_after)
    kit.metadata = replace(kit.metadata, **change)
    with pytest.raises(StoreMismatchError, match=rf"(?s){path}.*{message}.*--overwrite"):
        kit.build(path)
    kit.build(path, overwrite=True)
    assert latent_cache.open_metadata(path) == kit.metadata


def test_another_rate_is_no_other_origin(kit, tmp_path, path, all_files):
    """Latents do not depend on it: what was written is kept, and the last rate is recorded."""
    kit.build(path, stop_after=5)
    kit.metadata = replace(kit.metadata, fps=5.0)
    with StoreWriter.open(path, kit.metadata, {"train": kit.plan([3, 7, 2, 1, 9]), "test": kit.plan([5])}, codes=True):
        pass
    assert all_files(kit.build(path)) == all_files(kit.build(tmp_path / "fresh.zarr"))
    assert latent_cache.open_metadata(path).fps == 5


def test_other_arrays_or_splits_are_refused(kit, path):
    kit.build(path, stop_after=7)
    for options, message in [
        ({"codes": False}, r"train codes: None .*\(3, 4\)"),
        ({"dtype": "float32"}, "train dtype: float32 .*float16"),
        ({"plans": {"train": kit.plan([3, 7, 2, 1, 9])}}, r"splits: \['train'\] .*\['test'\]"),
    ]:
        with pytest.raises(StoreMismatchError, match=message):
            kit.build(path, **options)
    kit.extras = {"preview": (3, 4, 3)}
    with pytest.raises(StoreMismatchError, match=r"train preview: \(3, 4, 3\) .*None"):
        kit.build(path)
    kit.extras = {}
    kit.shape = (2, 5, 4)
    with pytest.raises(StoreMismatchError, match=r"latent shape: \(2, 5, 4\) .*\(2, 3, 4\)"):
        kit.build(path)


def test_a_complete_store_is_written_anew_only_when_asked(kit, tmp_path, path, all_files):
    kit.build(path)
    before = all_files(path)
    assert not (path / ".encoding").exists()
    with pytest.raises(StoreError, match=rf"{path} is complete.*--overwrite"):
        kit.build(path)
    assert all_files(path) == before
    assert not (path / ".encoding").exists()
    after = {"train": kit.plan([5])}
    kit.build(path, after, overwrite=True)
    assert all_files(path) == all_files(kit.build(tmp_path / "fresh.zarr", after))


def test_overwrite_never_touches_what_is_not_ours(kit, path):
    path.mkdir()
    (path / "thesis.txt").write_text("four years")
    with pytest.raises(StoreError, match=rf"{path}.*paths\.latents"):
        kit.build(path, overwrite=True)
    assert [file.name for file in path.iterdir()] == ["thesis.txt"]


def test_an_interrupted_overwrite_is_never_taken_for_complete(kit, tmp_path, path, all_files):
    plans = {"train": kit.plan([4])}
    whole = all_files(kit.build(tmp_path / "whole.zarr", plans))
    before = kit.build(tmp_path / "before.zarr")
    for stop_at in range(0, 40, 3):
        shutil.copytree(before, path)
        with interrupted_at_flush(stop_at) as interrupted:
            kit.build(path, plans, overwrite=True)
        assert interrupted
        assert not latent_cache.is_complete(path)
        assert all_files(kit.build(path, plans)) == whole
        shutil.rmtree(path)


def test_threads_may_write_different_chunks_and_each_twice(kit, tmp_path, path, all_files):
    plans = {"train": kit.plan([5] * 8)}
    with StoreWriter.open(path, kit.metadata, plans, codes=True) as writer:
        chunks = writer.pending("train")
        for _ in range(2):
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda chunk: kit.write(writer, "train", chunk), chunks))
            assert writer.pending("train") == []
        writer.finish(codebook=kit.codebook)
    assert all_files(path) == all_files(kit.build(tmp_path / "one by one.zarr", plans))


def test_finish_notices_a_chunk_that_went_away(kit, path):
    with StoreWriter.open(path, kit.metadata, {"train": kit.plan([3, 7])}, codes=True) as writer:
        for chunk in writer.pending("train"):
            kit.write(writer, "train", chunk)
        (path / "train/codes/c/1/0/0").unlink()
        with pytest.raises(latent_cache.CorruptStoreError, match=r"codes/c/1/0/0 is missing .*1 of 3"):
            writer.finish()
    assert not latent_cache.is_complete(path)


def test_where_a_store_cannot_be_written(kit):
    plan = kit.plan([3])
    with pytest.raises(StoreError, match=r"s3://bucket/a\.zarr.*local"):
        StoreWriter.open("s3://bucket/a.zarr", kit.metadata, {"train": plan}, codes=False)
    with pytest.raises(StoreError, match=r"a\.zarr.*'train'.*\['test'\]"):
        StoreWriter.open("a.zarr", kit.metadata, {"test": plan}, codes=False)
    other = SplitPlan(["a"], ["identity"], [3], (9, 9, 9), 3)
    with pytest.raises(StoreError, match=r"\(2, 3, 4\).*\(9, 9, 9\)"):
        StoreWriter.open("a.zarr", kit.metadata, {"train": plan, "test": other}, codes=False)


def test_a_second_writer_is_refused_while_the_first_lives(kit, path):
    plans = {"train": kit.plan([3, 7])}
    with StoreWriter.open(path, kit.metadata, plans, codes=True):
        for overwrite in (False, True):
            with pytest.raises(LockedStoreError, match=rf"{path}.*process {os.getpid()} on "):
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


def test_a_killed_writer_on_this_host_is_recognized(kit, path):
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
    with pytest.raises(StoreError, match=rf"{path}.*locks .*another disk"):
        kit.build(path)


def test_a_writer_on_another_host_is_believed(kit, path):
    kit.build(path, stop_after=2)
    lock = path / ".encoding/writer.lock"
    lock.write_text('{"host": "elsewhere", "pid": 12}')
    with pytest.raises(LockedStoreError, match=rf"process 12 on elsewhere.*delete {lock}"):
        kit.build(path)
    lock.unlink()
    kit.build(path)
