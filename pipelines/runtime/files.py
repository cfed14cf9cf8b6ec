"""Files of a run: atomic writes, locks, digests, typed JSON, and sizes as text."""

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import filelock
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json, to_json

from latent_cache.writing import disk
from pipelines.config.bounded_files import read_bounded
from pipelines.errors import UserError

Model = TypeVar("Model", bound=BaseModel)

# The key of a JSON file's digest of itself.
SEAL = "content_sha256"
MOST_JSON_BYTES = 2**28  # a record of a million converted videos has 160 MB

flush, flush_tree, is_full = disk.flush, disk.flush_tree, disk.is_full


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file as a whole: after a crash or a full disk either the old or the new content is there.

    Raises:
        OSError: it cannot be written; an older file of that name is unchanged.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Replace a UTF-8 text file as a whole, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: BaseModel) -> None:
    """Replace a JSON file by a model's values, sealed, as `write_bytes` does. Fields that are None are kept."""
    write_bytes(path, sealed(value.model_dump_json()) + b"\n")


def sealed(text: str) -> bytes:
    """A JSON object, indented, with a digest of its content as its last key. Other values have no digest."""
    content = from_json(text)
    if isinstance(content, dict):
        content[SEAL] = _content_sha256(content)
    return to_json(content, indent=1, inf_nan_mode="constants")


def unsealed(text: bytes) -> bytes:
    """A JSON object without the digest of `sealed`, which is checked. A file without one is as it is.

    Raises:
        ValueError: the content is not that of the digest.
    """
    try:
        content = from_json(text)
    except ValueError:
        return text  # whoever parses it into a model says what is wrong
    if not isinstance(content, dict) or SEAL not in content:
        return text
    if content.pop(SEAL) != _content_sha256(content):
        raise ValueError(f"damaged or edited: it differs from its {SEAL} (if the change is right, remove that key)")
    return to_json(content, inf_nan_mode="constants")


def _content_sha256(content: dict[str, Any]) -> str:
    """Of an object's keys and values, whatever their order and layout."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_json(path: Path, model: type[Model], way_out: str) -> Model:
    """Read a JSON file through the class that it is written with.

    Args:
        way_out: ends the error message: what to do about a file that cannot be read.
    Raises:
        UserError: missing, a pipe or device, no JSON, too large or deep, not of this shape, or changed; names the file
            and the first field that is wrong.
    """
    try:
        content = read_bounded(path, MOST_JSON_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}; {way_out}") from None
    return parse_json(content, path, model, way_out)


def parse_json(content: bytes, path: Path | str, model: type[Model], way_out: str) -> Model:
    """The content of a JSON file through the class that it is written with.

    Args:
        path: where it comes from, for messages.
        way_out: as of `read_json`.
    Raises:
        UserError: as `read_json`.
    """
    try:
        return model.model_validate_json(unsealed(content))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "content"
        raise UserError(f"{path}: {place}: {first['msg']}; {way_out}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; {way_out}") from None


@contextmanager
def usual_permissions(path: Path) -> Iterator[None]:
    """Give a file that a library writes inside the permissions of any new file; safetensors would give it 600."""
    path.unlink(missing_ok=True)
    path.touch()  # the system knows the umask, and the folder's default ACL; a process can't read the one thread-safely
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    path.chmod(mode)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file of the same suffix beside `path`, which takes its place, flushed, when the block ends.

    For writers that want a path (pictures, videos). On an error the temporary is removed and the old file is unchanged.
    The temporary of a process that was killed is removed by the next one that writes into the folder.

    Raises:
        OSError: it cannot be written.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    temporary, descriptor = _new_temporary(path)
    try:
        yield temporary
        temporary.chmod(stat.S_IMODE(os.fstat(descriptor).st_mode))  # whatever a library made of it
        flush(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    for folder in [path.parent, *(folder.parent for folder in made)]:
        flush(folder)  # the new names must be on disk, too


@contextmanager
def replacing_files(folder: Path, index: str, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary folder whose files take their places in `folder` when the block ends; an error in it changes nothing.

    Args:
        index: name of the file that lists the others. It is replaced last, and is missing while the others are.
        stale: names that are removed before that.
    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    temporary, descriptor = _new_temporary(folder / "files", os.mkdir)
    try:
        yield temporary
        for name in stale:
            (folder / name).unlink(missing_ok=True)
        (folder / index).unlink(missing_ok=True)
        for name in sorted(os.listdir(temporary), key=lambda name: name == index):
            (temporary / name).replace(folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)
    flush(folder)


@contextmanager
def temporary_folder(beside: Path) -> Iterator[Path]:
    """An empty folder beside a path, which is removed when the block ends. Those of killed processes are removed, too.

    Raises:
        OSError: it cannot be written.
    """
    beside.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(beside.parent)
    temporary, descriptor = _new_temporary(beside, os.mkdir)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes its place, flushed, when the block ends; an error changes nothing.

    Raises:
        OSError: it cannot be written.
    """
    with temporary_folder(path) as temporary:
        yield temporary
        flush_tree(temporary)
        if path.exists():
            remove(path)
        temporary.rename(path)
        flush(path.parent)


def incomplete_folder(path: Path) -> Path:
    """The hidden folder of `completing_folder`."""
    return path.with_name(f".{path.name}.incomplete")


@contextmanager
def completing_folder(path: Path, busy: str) -> Iterator[Path]:
    """A hidden folder beside `path`, which becomes `path`, flushed, when the block ends. After an error it stays.

    The next call of the same path gets it with what is there.

    Args:
        busy: message when another process has it.
    Raises:
        UserError: another process has it.
        OSError: it cannot be written, or `path` is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = incomplete_folder(path)
    hidden.mkdir(exist_ok=True)
    descriptor = os.open(hidden, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        except OSError:  # a file system without locks
            pass
        yield hidden
        flush_tree(hidden)
        hidden.rename(path)
        flush(path.parent)
    finally:
        os.close(descriptor)


def _create(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))


def _new_temporary(path: Path, create: Callable[[Path], object] = _create) -> tuple[Path, int]:
    """An empty file or folder beside `path`, and a descriptor whose lock says that its writer is alive."""
    while True:
        temporary = path.with_name(f".{uuid.uuid4().hex}{disk.PARTIAL}{path.suffix}")
        create(temporary)
        with suppress(FileNotFoundError):  # taken for a leftover before it was locked
            descriptor = os.open(temporary, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks, on which leftovers stay
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if temporary.exists():
                return temporary, descriptor
            os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove temporaries in a folder whose writers are dead."""
    for leftover in leftovers(folder):
        with suppress(OSError):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def leftovers(folder: Path) -> Iterator[Path]:
    """Temporaries in a folder whose writers are dead: the kernel dropped their locks. They are ours in the meantime."""
    for leftover in folder.glob(f".*{disk.PARTIAL}*"):
        with suppress(OSError):
            descriptor = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield leftover
            finally:
                os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or folder, or a link to one. A folder has another name before any of it is gone."""
    if path.is_dir() and not path.is_symlink():
        path = path.rename(path.with_name(f".{uuid.uuid4().hex}{disk.PARTIAL}"))
        shutil.rmtree(path)
    else:
        path.unlink()


def stored_bytes(path: Path) -> int:
    """Size of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file())


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold an exclusive lock on a file. The kernel drops it when the process dies, however it dies.

    Args:
        path: of the lock file, which stays when the lock is released.
        busy: message when another process holds the lock; `{pid}` is replaced by that process's number, or `?`.
    Raises:
        UserError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = path.with_name(f"{path.name}.pid")
    lock = filelock.FileLock(path, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        pid = "?"
        with suppress(OSError, UnicodeDecodeError):
            pid = owner.read_text(encoding="utf-8").strip() or "?"
        raise UserError(busy.replace("{pid}", pid)) from None
    try:
        owner.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        lock.release()


def backup_folder(path: Path) -> Path:
    """Make an empty folder beside `path` to move it to, or into, which nobody else gets.

    `flow.20261128-201500`, with `-2` and so on where that is taken.
    """
    first = path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    for name in itertools.chain([first], (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))):
        with suppress(FileExistsError):
            name.mkdir()
            return name
    raise AssertionError


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    return file_digest(path, "sha256")


def file_digest(path: Path, algorithm: str) -> str:
    """Hexadecimal digest of a file's content by another algorithm, such as "sha1"."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def free_bytes(path: Path) -> int:
    """Free space of the disk that holds a path, or will hold it once it exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def size_text(size: int) -> str:
    """A number of bytes as people read it: `30.1 GB`, `5.7 MB`, `12 bytes`."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
