"""Appending videos to a complete store: what it then holds, and that a complete store is there at every moment."""

import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import latent_cache
from latent_cache import LockedStoreError, ReplacedStoreError, SplitPlan, StoreError, StoreWriter
from tests.latent_cache.conftest import StoreKit

OLD = {"train": [3, 7, 2, 1, 9], "test": [5]}  # as in `toys`, in chunks of 4 frames


def names(prefix: str, lengths: list[int]) -> list[str]:
    return [f"{prefix}-{row:02d}" for row in range(len(lengths))]


def plans_with(kit: StoreKit, new: Mapping[str, list[int]], **options: object) -> dict[str, SplitPlan]:
    """Plans of the old videos followed by new ones."""
    plans = {}
    for split in dict.fromkeys([*OLD, *new]):
        old, more = OLD.get(split, []), new.get(split, [])
        plans[split] = kit.plan([*old, *more], names=names("clip", old) + names("film", more), **options)
    return plans


def append(kit: StoreKit, path: Path, plans: Mapping[str, SplitPlan], stop_after: int | None = None) -> None:
    with ExitStack() as stack:
        folder = stack.enter_context(latent_cache.replacing_store(path))
        options = {"codes": True, "before": path, "extras": kit.extras}
        writer = stack.enter_context(StoreWriter.open(folder, kit.metadata, plans, **options))
        for split, chunk in [(name, chunk) for name in plans for chunk in writer.pending(name)][:stop_after]:
            kit.write(writer, split, chunk)
        if stop_after is not None:
            raise InterruptedError
        writer.finish(codebook=kit.codebook)


@pytest.mark.parametrize(
    ("new", "shards", "extras"),
    [
        ({"train": [2, 6], "val": [6]}, 1, {}),  # into a partial last chunk of 2 frames, and beyond it
        ({"test": [1, 1]}, 1, {}),  # into a partial one alone
        ({"train": [5, 9], "test": [8]}, 3, {"preview": (3, 4, 3), "actions": (2,)}),
    ],
)
def test_it_holds_what_a_store_of_all_videos_holds(kit, tmp_path, all_files, new, shards, extras) -> None:
    kit.extras = extras
    path = kit.build(tmp_path / "toys.zarr", plans_with(kit, {}, shard_chunks=shards))
    old = {split: latent_cache.open(path, split) for split in OLD}
    files = {file: file.stat().st_ino for file in path.glob("*/latents/c/*/0/0/0")}
    plans = plans_with(kit, new, shard_chunks=shards)
    append(kit, path, plans)
    assert [file.name for file in tmp_path.iterdir()] == ["toys.zarr"]
    for split, cache in old.items():
        whole = cache.frames // (4 * shards) if new.get(split) else 99
        for file, inode in files.items():
            if file.parts[-7] == split:
                assert (file.stat().st_ino == inode) == (int(file.parts[-4]) < whole)

    fresh = all_files(kit.build(tmp_path / "fresh.zarr", plans))
    ours = all_files(path)
    different = {key for key in ours.keys() | fresh.keys() if ours.get(key) != fresh.get(key)}
    statistics = {f"{split}/latents/zarr.json" for split in plans} if "train" in new else set()
    assert different == statistics | ({"manifest/zarr.json"} if statistics else set())
    for split in plans:
        cache = latent_cache.open(path, split)
        np.testing.assert_array_equal(cache.mean, old["train"].mean)
        np.testing.assert_array_equal(cache.std, old["train"].std)
        assert cache.load().shape[0] == plans[split].frames
        assert (cache.fingerprint != old[split].fingerprint if split in old else True) == (split in new)
    assert not [key for key, what in latent_cache.changed_files(path) if what]


def test_an_interruption_anywhere_leaves_the_old_or_the_new_store(kit, tmp_path, all_files, monkeypatch) -> None:
    """Stop at the k-th flush, for some k. What is left over is removed, or goes on."""
    plans = plans_with(kit, {"train": [2, 6]}) | {"test": kit.plan([5])}
    path = kit.build(tmp_path / "toys.zarr")
    old, flushes = all_files(path), []
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", flushes.append)
        append(kit, path, plans)
    new, count = all_files(path), len(flushes)
    seen = []
    for stop_at in (count // 2, count - 4, count - 1):
        shutil.rmtree(path)
        kit.build(path)
        calls = iter(range(stop_at))

        def stop(descriptor: int, calls=calls) -> None:
            if next(calls, None) is None:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", stop)
            with pytest.raises(KeyboardInterrupt):
                append(kit, path, plans)
        found = all_files(path)
        assert found in (old, new)
        seen.append(found == new)
        if found == old:
            append(kit, path, plans)
        else:
            latent_cache.discard_generation(path)
        assert all_files(path) == new
        assert [file.name for file in tmp_path.iterdir()] == ["toys.zarr"]
    assert seen[0] is False
    assert seen[-1] is True


def test_chunks_of_an_interrupted_attempt_are_kept(kit, toys) -> None:
    plans = plans_with(kit, {"train": [2, 6], "test": [3]})
    with pytest.raises(InterruptedError):
        append(kit, toys, plans, stop_after=2)
    folder = toys.with_name("toys.zarr.next")
    with StoreWriter.open(folder, kit.metadata, plans, codes=True, before=toys) as writer:
        assert {split: [chunk.index for chunk in writer.pending(split)] for split in plans} == {
            "train": [7],
            "test": [1],
        }
    # Not those of the continuation of another store, nor when the plan has nothing there.
    with StoreWriter.open(folder, kit.metadata, plans_with(kit, {}), codes=True, before=toys) as writer:
        assert not writer.pending("train")
        assert (folder / "train/latents/c/5/0/0/0").samefile(toys / "train/latents/c/5/0/0/0")
    kit.build(toys, plans_with(kit, {"train": [1]}), overwrite=True)
    with StoreWriter.open(folder, kit.metadata, plans_with(kit, {"train": [1, 4]}), codes=True, before=toys) as writer:
        assert [chunk.index for chunk in writer.pending("train")] == [5, 6]


def test_one_writer_at_a_time(kit, toys) -> None:
    plans = plans_with(kit, {"train": [1]})
    with pytest.raises(InterruptedError), latent_cache.replacing_store(toys) as folder:  # noqa: PT012
        for write in (lambda: kit.build(toys, overwrite=True), lambda: append(kit, toys, plans)):
            with pytest.raises(LockedStoreError, match=f"process {os.getpid()}"):
                write()
        with StoreWriter.open(folder, kit.metadata, plans, codes=True, before=toys):
            latent_cache.discard_generation(toys)
            assert latent_cache.open_progress(folder)
        raise InterruptedError
    assert latent_cache.is_complete(toys)
    latent_cache.discard_generation(toys)
    assert not folder.exists()


def test_where_it_cannot_be_done_safely(kit, toys, all_files, monkeypatch) -> None:
    before = all_files(toys)
    with monkeypatch.context() as patch:
        patch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
        with pytest.raises(StoreError, match=rf"{toys}.*Operation not supported.*--overwrite"):
            append(kit, toys, plans_with(kit, {"train": [1]}))
    assert all_files(toys) == before
    latent_cache.unseal(toys)
    with pytest.raises(StoreError, match=rf"{toys}.*manifest.*--seal"):
        append(kit, toys, plans_with(kit, {"train": [1]}))
    assert not toys.with_name("toys.zarr.next").exists()


def test_readers_of_the_old_store(kit, toys) -> None:
    """What they read is the old store's, or an error says that it is another one now."""
    cache = latent_cache.open(toys)
    expected = cache.load().numpy()
    append(kit, toys, plans_with(kit, {"train": [2, 6]}))
    np.testing.assert_array_equal(cache.video(0), expected[:3])
    with pytest.raises(ReplacedStoreError, match=rf"{toys}.*again"):
        cache.load()
