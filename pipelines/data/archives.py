"""Unpack zip and tar archives that come from elsewhere: completely or not at all, inside one folder, within limits.

`zipfile` and `tarfile` parse the archives. Everything that they accept and an archive of videos has no use for is
refused here, before anything is written: paths outside the folder, links, devices, sparse files, absurd sizes, paths
that clash on file systems that ignore case.
"""

import errno
import lzma
import shutil
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from pydantic import BaseModel

from pipelines.errors import UserError
from pipelines.runtime.files import flush, flush_tree, free_bytes, read_json, size_text, write_json
from pipelines.runtime.progress import progress
from stage1_autoencoder.videos import VideoError

MARKER_NAME = ".unpacked.json"  # written last into the folder
MAX_UNPACKED_BYTES = 64 << 30  # more than any archive we know; a few kilobytes can claim any size
MAX_ENTRIES = 200_000
_MAX_NAME_LENGTH = 500
_MAX_HEADER_BYTES = 64 << 10  # of one entry of a tar, with its long names
_BLOCK = 1 << 20

# What zipfile and tarfile raise at damaged archives. NotImplementedError: an unknown compression; RuntimeError: an
# entry that only its local header calls encrypted, or headers without end; the last four: impossible numbers.
_PARSE_ERRORS = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError,
    ValueError, OverflowError, IndexError, struct.error,
)  # fmt: skip


class ArchiveError(VideoError):
    """An archive that is damaged or refused; the message has its path and the reason."""


class NoRoomError(ArchiveError):
    """The archive is fine, but the disk has not enough free space for it."""


class Unpacked(BaseModel):
    """`.unpacked.json` of a folder: the sizes of the files that were unpacked there, by path."""

    files: dict[str, int]


def read_marker(folder: Path) -> Unpacked | None:
    """What was unpacked into a folder, if all files are still there with their sizes; None otherwise."""
    try:
        marker = read_json(folder / MARKER_NAME, Unpacked, "unpack the archive again")
        complete = all((folder / name).stat().st_size == size for name, size in marker.files.items())
    except (UserError, OSError, ValueError):
        return None
    return marker if complete else None


def check_beginning(kind: str, head: bytes) -> str | None:
    """Why a file is no archive, by its first 512 bytes (or all, if it has fewer); None if it may be one.

    Args:
        kind: "zip" or "tar".
    """
    if kind == "zip" and head.startswith(b"PK\x03\x04"):
        return None
    if kind == "tar":
        try:
            tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
            return None
        except tarfile.HeaderError:
            pass
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        return f"not a whole {kind} archive: it is an HTML or XML page, maybe the error page of a server"
    return f"not a whole {kind} archive: " + (f"it begins with {head[:16]!r}" if head else "it is empty")


def unpack(archive: Path, folder: Path, *, top: str = "", expected: str = "") -> Unpacked:
    """Unpack an archive, `.zip` or `.tar`, into a folder and leave a marker there.

    All names, types and sizes are checked first. Files are written to a hidden folder beside `folder`, which is renamed
    at the end, so `folder` never holds a part of them. If `folder` exists, files of the same names are replaced, others
    are kept, and the marker is moved last. Hidden files in the archive are ignored.

    Args:
        top: a folder in the archive that is removed from the paths in it.
        expected: extension that at least one file must have, such as ".avi".
    Raises:
        ArchiveError: not an archive of this kind, damaged, encrypted, too large, without expected files, or with
            entries that would be written elsewhere or are no plain files.
        NoRoomError: it does not fit on the disk.
    """
    clear_leftovers(folder)
    try:
        with archive.open("rb") as file:
            wrong = check_beginning(archive.suffix[1:], file.read(tarfile.BLOCKSIZE))
        if wrong:
            raise ArchiveError(f"{wrong}; download it again")
        with closing(_TarReader(archive) if archive.suffix == ".tar" else _ZipReader(archive)) as reader:
            return _unpack(archive, reader, folder.resolve(), _checked_files(reader, top, expected))
    except ArchiveError as error:
        raise type(error)(f"{archive}: {error}") from error


def _unpack(archive: Path, reader: "_ZipReader | _TarReader", folder: Path, files: Mapping[str, "_Entry"]) -> Unpacked:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(folder)
    needed, free = sum(entry.size for entry in files.values()), free_bytes(folder.parent)
    if needed > free:
        raise NoRoomError(
            f"needs {size_text(needed)} to unpack, but only {size_text(free)} are free in {folder.parent}; free some "
            "space, or set dataset.root to a folder on another disk"
        )
    try:
        temporary.mkdir()
        with progress(total=needed, description=f"unpack {archive.name}", unit="B") as bar:
            for path, entry in files.items():
                target, written = temporary / path, 0
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    for block in reader.blocks(entry):
                        written += file.write(block)
                        bar.update(len(block))
                if written != entry.size:
                    raise ArchiveError(f"its entry {entry.name!r} is damaged: {written} bytes instead of {entry.size}")
        unpacked = Unpacked(files={path: entry.size for path, entry in files.items()})
        write_json(temporary / MARKER_NAME, unpacked)
        flush_tree(temporary)
        if not folder.exists():
            temporary.rename(folder)
            flush(folder.parent)
            return unpacked
        (folder / MARKER_NAME).unlink(missing_ok=True)
        for name in (*files, MARKER_NAME):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).replace(folder / name)
        flush_tree(folder)
        return unpacked
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed `unpack` into a folder left behind; it may be as large as the archive."""
    shutil.rmtree(_temporary(folder.resolve()), ignore_errors=True)


def _temporary(folder: Path) -> Path:
    """Beside the resolved folder: it may be a link to another disk, and files cannot be renamed from disk to disk."""
    return folder.with_name(f".{folder.name}.unpacking")


@dataclass(frozen=True)
class _Entry:
    """A plain file or folder of an archive: its name as the archive has it, and its size in bytes (0 for folders).

    `source` tells its reader where the content is.
    """

    name: str
    size: int
    is_folder: bool
    source: Any


def _checked_files(reader: "_ZipReader | _TarReader", top: str, expected: str) -> dict[str, _Entry]:
    """The files to unpack by their path below the folder. Raises ArchiveError if any entry must not be unpacked."""
    found: dict[str, _Entry] = {}
    # By the path as a file system without upper and lower case has it: the entry that needs a file or a folder there.
    files, folders = dict[str, str](), dict[str, str]()
    total = 0
    for number, entry in enumerate(reader.entries(), start=1):
        total += entry.size
        if number > MAX_ENTRIES:
            raise ArchiveError(f"refused, it has more than {MAX_ENTRIES} entries")
        if total > MAX_UNPACKED_BYTES:
            raise ArchiveError(
                f"refused, it unpacks to at least {size_text(total)}, the limit is {size_text(MAX_UNPACKED_BYTES)}"
            )
        path = _safe_path(entry.name, top)
        if entry.is_folder or any(part == "__MACOSX" or part.startswith(".") for part in path.parts):
            continue
        folded, parents = _folded(path), [_folded(parent) for parent in path.parents[:-1]]
        other = files.get(folded) or folders.get(folded) or next((files[p] for p in parents if p in files), None)
        if other is not None or not path.parts:
            raise ArchiveError(
                f"refused, its entry {entry.name!r} clashes with {other or 'the folder itself'!r}: equal paths, paths "
                "that differ only by case, or a file where the other needs a folder"
            )
        files[folded] = entry.name
        folders |= dict.fromkeys(parents, entry.name)
        found[str(path)] = entry
    if not any(name.lower().endswith(expected) for name in found):
        others = f" but others such as {', '.join(map(repr, list(found)[:3]))}" if found else ""
        raise ArchiveError(f"it has no {expected} files{others}; is it another archive?")
    return found


def _safe_path(name: str, top: str) -> PurePosixPath:
    path = PurePosixPath(name)
    drive = bool(path.parts) and ":" in path.parts[0]
    if path.is_absolute() or ".." in path.parts or "\\" in name or drive:
        raise ArchiveError(f"refused, its entry {name!r} would be written outside the folder")
    if len(name) > _MAX_NAME_LENGTH or any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise ArchiveError(
            f"refused, the name of its entry {name[:100]!r} is not UTF-8, has control characters or more than "
            f"{_MAX_NAME_LENGTH} characters"
        )
    return path.relative_to(top) if path.parts[:1] == (top,) else path


def _folded(path: PurePosixPath) -> str:
    return unicodedata.normalize("NFC", str(path)).casefold()


@contextmanager
def _parsing(what: str) -> Iterator[None]:
    """Turn errors of zipfile and tarfile into an ArchiveError; errors of the disk pass."""
    try:
        yield
    except (*_PARSE_ERRORS, OSError) as error:
        # bz2's OSError has no number, and a seek to an impossible place is EINVAL.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise ArchiveError(f"{what} ({error}); download it again") from error


class _ZipReader:
    """An open zip archive. Raises ArchiveError if its end is missing."""

    def __init__(self, archive: Path) -> None:
        with _parsing("not a whole zip archive: its end is missing, it was cut off"):
            self._zip = zipfile.ZipFile(archive)

    def close(self) -> None:
        self._zip.close()

    def entries(self) -> Iterator[_Entry]:
        for entry in self._zip.infolist():
            # The name as the archive has it: zipfile cuts it at a zero byte, and may turn the slashes.
            name = entry.orig_filename
            if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ArchiveError(f"refused, its entry {name!r} is a link or a device")
            if entry.flag_bits & 0x1:
                raise ArchiveError(f"its entry {name!r} is encrypted; unpack it by hand")
            yield _Entry(name, entry.file_size, entry.is_dir(), entry)

    def blocks(self, entry: _Entry) -> Iterator[bytes]:
        with _parsing(f"its entry {entry.name!r} is damaged"), self._zip.open(entry.source) as file:
            while block := file.read(_BLOCK):  # checks the CRC at the end
                yield block


class _TarReader:
    """An open tar archive."""

    def __init__(self, archive: Path) -> None:
        self._file = archive.open("rb")

    def close(self) -> None:
        self._file.close()

    def entries(self) -> Iterator[_Entry]:
        limited = _LimitedHeaders(self._file)
        with (
            _parsing("not a whole tar archive"),
            tarfile.open(fileobj=limited, mode="r:", errors="surrogateescape") as opened,
        ):
            while (member := opened.next()) is not None:
                yield self._entry(member)
                opened.members.clear()  # it would hold all of them, each with its headers
                limited.left = _MAX_HEADER_BYTES
            end = opened.offset
        # tarfile ends at a header that it does not understand as it does at the true end, a block of zeros.
        self._file.seek(end)
        if self._file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ArchiveError(f"not a whole tar archive: it is cut off or damaged at byte {end}; download it again")

    def _entry(self, member: tarfile.TarInfo) -> _Entry:
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) or member.sparse is not None:
            target = f" to {member.linkname!r}" if member.linkname else ""
            raise ArchiveError(
                f"refused, its entry {member.name!r} is no plain file or folder but a link, device, pipe or sparse "
                f"file (type {member.type!r}{target})"
            )
        if member.size < 0:
            raise tarfile.ReadError(f"entry {member.name!r} of {member.size} bytes")
        return _Entry(member.name, 0 if member.isdir() else member.size, member.isdir(), member.offset_data)

    def blocks(self, entry: _Entry) -> Iterator[bytes]:
        self._file.seek(entry.source)
        left = entry.size
        while left and (block := self._file.read(min(left, _BLOCK))):
            left -= len(block)
            yield block


class _LimitedHeaders:
    """The file as tarfile sees it: tarfile reads headers into memory, and a header can claim any length."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell
        self.left = _MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.left:
            raise ArchiveError(f"refused, an entry's header has more than {_MAX_HEADER_BYTES} bytes")
        self.left -= size
        return self._file.read(size)
