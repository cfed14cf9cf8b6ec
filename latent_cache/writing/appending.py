"""Appending to a complete store: its next generation is built beside it and takes its place in one step.

The states, in order. Whatever kills the process, a complete store is at the store's path in each of them:
1. `<store>/.encoding/writer.lock` is held until the end.
2. `<store>.next` is an incomplete store. Its whole chunks are hard links to those of the store, the others are written
   as those of any store. `.encoding/before` there names the manifest of the store that it continues; if that is another
   store by now, it is begun anew.
3. `<store>.next` is complete. A process that is killed here leaves it to be begun anew.
4. One system call has exchanged the two folders. `<store>.next` is the old store, which is removed; after a kill by the
   next `encode`.
"""

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from latent_cache.errors import StoreError
from latent_cache.reading.reader import is_complete, is_sealed
from latent_cache.schema import PROGRESS_FOLDER
from latent_cache.writing.disk import LOCK_FILE, WriterLock, flush


def next_generation(store: Path) -> Path:
    """Where the next generation of a store is built."""
    return store.with_name(f"{store.name}.next")


@contextlib.contextmanager
def replacing_store(store: Path) -> Iterator[Path]:
    """Lock a complete store, and give a folder for a `StoreWriter`; what it finishes there replaces the store.

    Raises:
        StoreError: the store has no manifest; the file system cannot exchange folders, or has no hard links.
        LockedStoreError: the store is being written.
    """
    if not is_sealed(store):
        raise StoreError(f"{store} has no manifest, which says what its chunks are: `inspect --seal {store}` adds one")
    lock, folder = WriterLock(store / PROGRESS_FOLDER / LOCK_FILE), next_generation(store)
    try:
        _check_file_system(store, folder / PROGRESS_FOLDER / "probe")
        yield folder
        exchange(folder, store)
        _remove(folder)  # where the lock is now
    except BaseException:
        lock.release()
        _remove_empty(store / PROGRESS_FOLDER)
        raise
    finally:
        lock.release()


def discard_generation(store: Path) -> None:
    """Remove what killed writers left in and beside a complete store, unless a process works on it."""
    folder, progress = next_generation(store), store / PROGRESS_FOLDER
    if not folder.is_dir() and not progress.is_dir():
        return
    with contextlib.suppress(StoreError):  # no store of latents, or one that is being written
        lock = WriterLock(progress / LOCK_FILE)
        try:
            if (folder / PROGRESS_FOLDER).is_dir() or is_complete(folder):
                _remove(folder)
            if is_complete(store):
                shutil.rmtree(progress)
        finally:
            lock.release()


def remove_store(store: Path) -> None:
    """Remove a store; after a kill the rest of it is not complete.

    Raises:
        LockedStoreError: it is being written.
    """
    lock = WriterLock(store / PROGRESS_FOLDER / LOCK_FILE)
    try:
        _remove(store)
    finally:
        lock.release()


def _remove(folder: Path) -> None:
    clear_store(folder)
    shutil.rmtree(folder, ignore_errors=True)


def clear_store(folder: Path) -> None:
    """Remove everything but the lock; the root first, so that a half removed store is never complete."""
    (folder / "zarr.json").unlink(missing_ok=True)
    flush(folder)
    for entry in [*folder.iterdir(), *folder.glob(f"{PROGRESS_FOLDER}/*")]:
        if entry.name in (PROGRESS_FOLDER, LOCK_FILE):
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def exchange(one: Path, other: Path) -> None:
    """Exchange two folders of one file system in a single step, and wait until that is on disk.

    Raises:
        OSError: the system or the file system cannot do that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):  # Linux alone has it
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    here, how = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), how):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    flush(other.absolute().parent)


def _check_file_system(store: Path, probe: Path) -> None:
    """Raise StoreError where a store cannot be replaced, before anything is encoded."""
    shutil.rmtree(probe, ignore_errors=True)  # of a process that was killed here
    try:
        for name in ("one", "other"):
            (probe / name).mkdir(parents=True)
        (probe / "one" / "file").touch()
        os.link(probe / "one" / "file", probe / "other" / "file")
        exchange(probe / "one", probe / "other")
    except OSError as error:
        raise StoreError(
            f"{store}: no videos can be appended, since its file system cannot exchange folders ({error}): encode all "
            "videos again with `encode --overwrite`, or move the store to another disk"
        ) from error
    finally:
        shutil.rmtree(probe, ignore_errors=True)
        _remove_empty(probe.parent, probe.parent.parent)


def _remove_empty(*folders: Path) -> None:
    with contextlib.suppress(OSError):  # one is not empty, or not there
        for folder in folders:
            folder.rmdir()
