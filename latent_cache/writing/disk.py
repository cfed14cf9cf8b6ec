"""Durable writes, and the lock that allows one writer per store."""

import errno
import fcntl
import json
import os
import socket
import uuid
from pathlib import Path
from typing import Any

from latent_cache.errors import LockedStoreError, StoreError

LOCK_FILE = "writer.lock"  # in the store's folder of markers
PARTIAL = ".partial"  # suffix of files that are being written


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically and wait until it is on disk, so that it survives a power failure.

    Several processes may write the same file at once; the content of one of them remains.

    Raises:
        OSError: it cannot be written; an older file of that name is unchanged.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        with open(temporary, "wb", buffering=0) as file:
            view = memoryview(content)
            while len(view):
                view = view[file.write(view) :]
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    for folder in [path.parent, *(folder.parent for folder in made)]:
        flush(folder)  # the new names must be on disk, too


def flush_tree(root: Path) -> None:
    """Flush everything in `root`, and the name of `root` itself."""
    for folder, _, names in os.walk(root):
        for name in names:
            flush(Path(folder, name))
        flush(Path(folder))
    flush(root.absolute().parent)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, as `write_file` does."""
    write_file(path, json.dumps(value).encode())


def is_full(error: OSError) -> bool:
    """Whether a write failed because the disk, or the user's quota, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


class WriterLock:
    """A file that names the process that writes a store, with a kernel lock on it.

    The kernel releases the lock when the process dies, however it dies, so a dead writer on this host needs no cleanup,
    and a reused process id is not mistaken for the old process. On network file systems the kernel's lock may not be
    seen by other hosts, so a file that names another host counts as locked.

    Raises:
        LockedStoreError: another writer on this host is alive, or the file names a writer on another host.
        StoreError: the file system does not support locks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                owner = self._read_owner()
                os.close(self._descriptor)
                raise LockedStoreError(
                    f"{path.parent.parent}: process {owner.get('pid')} on {owner.get('host')} is writing this store: "
                    "wait for it, or stop it"
                ) from error
            except OSError as error:
                os.close(self._descriptor)
                raise StoreError(
                    f"{path.parent.parent}: its file system does not support file locks ({error}), which keep a second "
                    "writer out: write the store on another disk, then copy it there"
                ) from error
            if self._is_still_there():
                break
            os.close(self._descriptor)  # the previous writer finished, and removed the file that we had opened

        owner = self._read_owner()
        if owner and owner.get("host") != socket.gethostname():
            os.close(self._descriptor)
            raise LockedStoreError(
                f"{path.parent.parent}: process {owner.get('pid')} on {owner.get('host')} was writing this store; this "
                f"host cannot tell whether it is still running: if it is not, delete {path}"
            )
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)

    @property
    def held(self) -> bool:
        """Whether this process still holds the lock."""
        return self._descriptor >= 0

    def release(self) -> None:
        """Remove the file and release the lock. Safe to call twice."""
        if self._descriptor < 0:
            return
        if self._is_still_there():
            self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = -1

    def _read_owner(self) -> dict[str, Any]:
        try:
            owner = json.loads(os.pread(self._descriptor, 4096, 0))
        except ValueError:
            return {}  # the writer died between creating the file and writing its name
        return owner if isinstance(owner, dict) else {}

    def _is_still_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False
