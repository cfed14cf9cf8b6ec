"""Making writes last, and keeping a second writer out."""

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

from latent_cache.errors import LockedStoreError, StoreError


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_with_folders(path: Path, root: Path) -> None:
    """Flush a file and each folder from it up to `root`: a file whose name is lost is lost."""
    flush(path)
    for folder in path.parents:
        flush(folder)
        if folder == root:
            return
    raise AssertionError(f"{path} is not inside {root}")


def flush_tree(root: Path) -> None:
    """Flush everything inside `root`, and the name of `root` itself."""
    for folder, _, names in os.walk(root):
        for name in names:
            flush(Path(folder, name))
        flush(Path(folder))
    flush(root.absolute().parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that, whenever the power fails, the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(value))
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


class WriterLock:
    """A file that says which process writes a store, held by the kernel's lock on it.

    The kernel drops its lock when the process dies, however it dies, so a dead writer on this host never needs
    cleaning up, and a process id used again is not mistaken for the old one. Across hosts the kernel's lock may not
    reach (network file systems), so a file that names another host is believed.

    Raises:
        LockedStoreError: another writer on this host lives, or another host's writer has left its name.
        StoreError: a file system without locks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
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
                    f"{path.parent.parent}: its file system has no file locks ({error}), so that two writers could mix "
                    "their chunks: write the store on another disk, then copy it there"
                ) from error
            if self._is_still_there():
                break
            os.close(self._descriptor)  # the writer before us finished and removed the file that we had opened

        owner = self._read_owner()
        if owner and owner.get("host") != socket.gethostname():
            os.close(self._descriptor)
            raise LockedStoreError(
                f"{path.parent.parent}: process {owner.get('pid')} on {owner.get('host')} was writing this store, and "
                f"from here nobody can tell whether it lives: if it doesn't, delete {path}"
            )
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)

    def release(self) -> None:
        """Remove the file and let go. Safe to call twice."""
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
            return {}  # a writer that died between creating the file and writing its name
        return owner if isinstance(owner, dict) else {}

    def _is_still_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False
