"""Unpacking archives from elsewhere: all of one or nothing, nothing outside its folder, and no more than fits."""

import calendar
import errno
import hashlib
import json
import lzma
import os
import shutil
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

from tqdm import tqdm

from pipelines.runtime.files import size_text
from pipelines.runtime.progress import is_quiet
from stage1_autoencoder.videos import VideoError

_BEGINNINGS = {
    b"PK\x03\x04": "it begins like a zip",
    b"\x1f\x8b": "it is gzip",
    b"BZh": "it is bzip2",
    b"\xfd7zXZ": "it is xz",
    b"Rar!": "it is a RAR archive",
    b"7z\xbc\xaf": "it is a 7z archive",
    b"<": "it is an HTML or XML page, maybe the error page of a server",
    b"{": "it is JSON, maybe the error message of a server",
}
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}


class ArchiveError(VideoError):
    """An archive that cannot or must not be unpacked; the message has its path and what is wrong."""


class NoRoomError(ArchiveError):
    """Nothing is wrong with the archive, but the disk is too small for it."""


@dataclass(frozen=True)
class Entry:
    """One entry of an archive.

    Attributes:
        name: as the archive has it.
        size: bytes of the file.
        is_folder: it is a folder, and not a file.
        seconds: time of last change, since 1970; None if the archive has none that is possible.
        source: where its reader finds it.
    """

    name: str
    size: int
    is_folder: bool
    seconds: int | None
    source: Any


class Reader(Protocol):
    """An open archive."""

    def entries(self) -> Iterator[Entry]:
        """All entries, plain files and folders. Raises ArchiveError at any other, and at the end of one cut off."""

    def blocks(self, entry: Entry) -> Iterator[bytes]:
        """The content of a file, in order. Raises ArchiveError where it is damaged."""


def describe_beginning(head: bytes) -> str:
    """Tell what a file may be by its first bytes."""
    if not head:
        return "it is empty"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next(
        (kind for begin, kind in _BEGINNINGS.items() if text.startswith(begin)), f"it begins with {head[:16]!r}"
    )


class Names:
    """The files of an archive by their paths, checked one by one as they are added.

    Attributes:
        entries: by the path below the folder that it is unpacked to.
        passed_over: names of files that file managers leave, which are not unpacked.
    """

    def __init__(self, archive: Path, top: str = "", reserved: str = "") -> None:
        """Begin with none.

        Args:
            top: a folder in the archive that is taken off the names in it.
            reserved: a path that no entry may have.
        """
        self.entries: dict[str, Entry] = {}
        self.passed_over: list[str] = []
        self._archive, self._top, self._reserved = archive, top, reserved
        # As a file system sees them that does not tell upper from lower case.
        self._files: dict[str, str] = {}
        self._folders: dict[str, str] = {}

    def add(self, entry: Entry) -> None:
        """Take one more entry.

        Raises:
            ArchiveError: its name leads elsewhere, or is in the way of another.
        """
        path = PurePosixPath(entry.name)
        if (
            path.is_absolute()
            or ".." in path.parts
            or "\\" in entry.name
            or (path.parts and ":" in path.parts[0])  # a drive, where there are drives
        ):
            raise self._refused(f"its entry {entry.name!r} would land outside the folder")
        if any(unicodedata.category(letter) == "Cc" for letter in entry.name):
            raise self._refused(f"its entry {entry.name!r} has control characters in its name")
        if path.parts[:1] == (self._top,):
            path = path.relative_to(self._top)
        if entry.is_folder:
            return
        if not path.parts:
            raise self._refused(f"its entry {entry.name!r} is a file without a name")
        if "__MACOSX" in path.parts or path.name.startswith("._") or path.name in _LITTER:
            self.passed_over.append(entry.name)
            return
        self._check_others(path, entry.name)
        self.entries[str(path)] = entry

    def _check_others(self, path: PurePosixPath, name: str) -> None:
        if str(path) in self.entries:
            raise self._refused(f"it has two entries {name!r}")
        folded = _folded(path)
        if folded == _folded(PurePosixPath(self._reserved)):
            raise self._refused(f"its entry {name!r} has the name of the mark that unpacking leaves")
        if other := self._files.get(folded):
            raise self._refused(f"its entries {other!r} and {name!r} differ only by upper and lower case")
        if other := self._folders.get(folded):
            raise self._refused(f"its entry {name!r} is a file, but {other!r} needs a folder there")
        parents = [_folded(parent) for parent in path.parents if parent.parts]
        for parent in parents:
            if other := self._files.get(parent):
                raise self._refused(f"its entry {other!r} is a file, but {name!r} needs a folder there")
            self._folders.setdefault(parent, name)
        self._files[folded] = name

    def _refused(self, why: str) -> ArchiveError:
        return ArchiveError(f"{self._archive}: refused, {why}")


def _folded(path: PurePosixPath) -> str:
    return unicodedata.normalize("NFC", str(path)).casefold()


_UNZIP_BLOCK = 1 << 20
# zipfile raises NotImplementedError for a compression that it does not know, as damaged headers name one, ValueError
# and struct.error for impossible numbers in them, RuntimeError for encryption that only the local header tells.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    struct.error,
)


def looks_like_zip(head: bytes) -> bool:
    """Tell from its first bytes whether a file may be a zip archive."""
    return head.startswith(b"PK\x03\x04")


class ZipReader:
    """An open zip archive; a context manager."""

    def __init__(self, archive: Path) -> None:
        """Read its directory.

        Raises:
            ArchiveError: not a zip, or its end is missing.
        """
        self._archive = archive
        try:
            self._zip = zipfile.ZipFile(archive)
        except _DAMAGE as error:
            with archive.open("rb") as file:
                head = file.read(64)
            meaning = describe_beginning(head)
            if looks_like_zip(head):
                meaning += ", but its end is missing: it was cut off"
            raise ArchiveError(f"{archive}: not a whole zip archive ({error}): {meaning}; fetch it again") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()

    def entries(self) -> Iterator[Entry]:
        for entry in self._zip.infolist():
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ArchiveError(f"{self._archive}: refused, its entry {entry.filename!r} is a link or a device")
            if entry.flag_bits & 0x1:
                raise ArchiveError(f"{self._archive}: its entry {entry.filename!r} is encrypted; unpack it by hand")
            # The name as the archive has it: zipfile has cut it at a zero byte, and may have turned the slashes.
            yield Entry(entry.orig_filename, entry.file_size, entry.is_dir(), _seconds(entry), entry)

    def blocks(self, entry: Entry) -> Iterator[bytes]:
        try:
            with self._zip.open(entry.source) as file:
                while block := file.read(_UNZIP_BLOCK):  # checks the CRC when it reaches the end
                    yield block
        except (*_DAMAGE, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise  # of the disk; bz2's has no number, and to an impossible place the disk says EINVAL
            raise ArchiveError(
                f"{self._archive}: its entry {entry.name!r} is damaged ({error}); fetch it again"
            ) from error


def _seconds(entry: zipfile.ZipInfo) -> int | None:
    try:
        return calendar.timegm((*entry.date_time, 0, 0, 0))
    except ValueError:
        return None  # an impossible date


_TAR_BLOCK = 4 << 20
_RECORD = tarfile.BLOCKSIZE
_MOST_HEADER_BYTES = 64 << 10  # of one entry, long names and all
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a file with holes",
}


def looks_like_tar(head: bytes) -> bool:
    """Tell from its first 512 bytes whether a file may be a tar archive."""
    try:
        tarfile.TarInfo.frombuf(head[:_RECORD], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


class TarReader:
    """An open tar archive; a context manager."""

    def __init__(self, archive: Path) -> None:
        """Look at its beginning.

        Raises:
            ArchiveError: not a tar archive.
        """
        self._archive = archive
        with archive.open("rb") as file:
            head = file.read(_RECORD)
        if not looks_like_tar(head):
            raise ArchiveError(
                f"{archive}: not a whole tar archive (wrong beginning): {describe_beginning(head)}; fetch it again"
            )
        self._file = archive.open("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def entries(self) -> Iterator[Entry]:
        headers = _Headers(self._file, self._archive)
        try:
            with tarfile.open(fileobj=headers, mode="r:", errors="surrogateescape") as opened:
                while True:
                    headers.left = _MOST_HEADER_BYTES
                    member = opened.next()
                    if member is None:
                        break
                    yield self._entry(member)
                    opened.members.clear()  # or it holds all of them
                end = opened.offset
        # Beside its own errors, what tarfile raises at headers that make no sense.
        except (tarfile.TarError, ValueError, OverflowError, IndexError, RecursionError) as error:
            raise self._damaged(f"an entry's header makes no sense ({error})") from error
        # At a header that it does not understand, tarfile ends as at the true end, which is a block of zeros.
        self._file.seek(end)
        block = self._file.read(_RECORD)
        if len(block) < _RECORD:
            raise self._damaged("its end is missing: it was cut off")
        if any(block):
            raise self._damaged(f"at byte {end} there should be an entry or the end, and there is neither")

    def _entry(self, member: tarfile.TarInfo) -> Entry:
        kind = "a file with holes" if member.sparse is not None else _KINDS.get(member.type)
        if kind is None and member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
            kind = f"of the unknown kind {member.type!r}"
        if kind is not None:
            target = f" to {member.linkname!r}" if member.linkname else ""
            raise ArchiveError(f"{self._archive}: refused, its entry {member.name!r} is {kind}{target}")
        if member.size < 0:
            raise self._damaged(f"its entry {member.name!r} claims {member.size} bytes")
        seconds = int(member.mtime) if 0 <= member.mtime < 1 << 40 else None
        size = 0 if member.isdir() else member.size
        return Entry(member.name, size, member.isdir(), seconds, member.offset_data)

    def blocks(self, entry: Entry) -> Iterator[bytes]:
        self._file.seek(entry.source)
        left = entry.size
        while left:
            block = self._file.read(min(left, _TAR_BLOCK))
            if not block:
                raise self._damaged(f"it ends inside its entry {entry.name!r}")
            left -= len(block)
            yield block

    def _damaged(self, why: str) -> ArchiveError:
        return ArchiveError(f"{self._archive}: not a whole tar archive: {why}; fetch it again")


class _Headers:
    """The file as tarfile sees it: it reads headers, of which some claim any length, into memory."""

    def __init__(self, file: BinaryIO, archive: Path) -> None:
        self._file, self._archive = file, archive
        self.left = _MOST_HEADER_BYTES

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.left:
            raise ArchiveError(
                f"{self._archive}: refused, an entry's header is longer than {_MOST_HEADER_BYTES} bytes, or says so"
            )
        self.left -= size
        return self._file.read(size)

    def seek(self, offset: int) -> None:
        self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()


__all__ = [
    "MARKER_NAME",
    "ArchiveError",
    "NoRoomError",
    "Unpacked",
    "check_beginning",
    "clear_leftovers",
    "digest_of",
    "read_marker",
    "unpack",
]

# Written into a folder last: which archive it came from, and the files with their sizes.
MARKER_NAME = ".unpacked.json"

# More than any zip that we fetch unpacks to; one of a few kilobytes can claim any size.
MAX_UNPACKED_BYTES = 32 << 30
MAX_FILES = 200_000

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Unpacked:
    """What came of an archive: how many files, and the names of those passed over as litter of a file manager."""

    files: int
    passed_over: list[str]


def digest_of(path: Path, algorithm: str) -> str:
    """A file's checksum (sha1, sha256), hexadecimal."""
    digest = hashlib.new(algorithm)
    with path.open("rb", buffering=0) as file, _bar(f"check {path.name}", path.stat().st_size) as bar:
        buffer = memoryview(bytearray(_BLOCK))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            bar.update(count)
    return digest.hexdigest()


def check_beginning(kind: str, head: bytes) -> str | None:
    """Tell from the first 512 bytes of a file (all, if it has fewer) why it is no archive of a kind; None if it may be.

    Args:
        kind: "zip" or "tar".
    """
    looks = looks_like_zip if kind == "zip" else looks_like_tar
    if looks(head):
        return None
    return f"not a whole {kind} archive (wrong beginning): {describe_beginning(head)}"


def read_marker(folder: Path) -> dict | None:
    """Read what `unpack` noted about a folder, if the files are all there with their sizes; None otherwise."""
    try:
        marker = json.loads((folder / MARKER_NAME).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in marker["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return marker if whole else None


def unpack(
    archive: Path,
    folder: Path,
    *,
    checksum: dict[str, str],
    kind: str = "zip",
    top: str = "",
    expected: str = "",
    max_bytes: int = MAX_UNPACKED_BYTES,
) -> Unpacked:
    """Unpack an archive into a folder.

    All names, kinds and sizes are checked before anything is written. Then it is unpacked and marked in a hidden folder
    aside, which gets its name at the end: `folder` never holds half of it. If `folder` is there already, files of the
    same names are replaced, others are left alone, and the mark goes in last. Files get the times that the archive has
    for them.

    Args:
        checksum: of the archive, for the mark: {"sha1": ...} or {"sha256": ...}.
        kind: "zip" or "tar".
        top: a folder in the archive that is taken off the names in it.
        expected: extension that some of its files must have, such as ".avi".
        max_bytes: refuse archives that claim to unpack to more.
    Raises:
        ArchiveError: not an archive of this kind, damaged, encrypted, too large, without files that are expected, or
            with entries that would land elsewhere or are no plain files.
        NoRoomError: it does not fit on the disk.
    """
    clear_leftovers(folder)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(folder)
    try:
        with ZipReader(archive) if kind == "zip" else TarReader(archive) as reader:
            names = _checked_names(archive, reader, top, expected, max_bytes)
            _check_room(archive, folder.parent, sum(entry.size for entry in names.entries.values()))
            aside.mkdir()
            _extract_all(archive, reader, names.entries, aside)
        marker = {
            "archive": archive.name,
            "bytes": archive.stat().st_size,
            **checksum,
            "files": {name: entry.size for name, entry in names.entries.items()},
        }
        (aside / MARKER_NAME).write_text(json.dumps(marker, indent=1))
        _give_name(aside, folder, [*names.entries, MARKER_NAME])
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Unpacked(len(names.entries), names.passed_over)


def clear_leftovers(folder: Path) -> None:
    """Remove what an `unpack` into a folder left behind that was killed: it may take as much room as the archive."""
    shutil.rmtree(_aside(folder.resolve()), ignore_errors=True)


def _aside(folder: Path) -> Path:
    """Beside the true folder: that may be a link to another disk, and from one to another nothing can be renamed."""
    return folder.with_name(f".{folder.name}.unpacking")


def _checked_names(archive: Path, reader: Reader, top: str, expected: str, max_bytes: int) -> Names:
    """Find the files of an archive by name, refusing what could do harm before anything is written."""
    names = Names(archive, top, reserved=MARKER_NAME)
    total = 0
    for number, entry in enumerate(reader.entries(), start=1):
        names.add(entry)
        total += entry.size
        if number > MAX_FILES:
            raise ArchiveError(f"{archive}: refused, it has more than {MAX_FILES} entries")
        if total > max_bytes:
            raise ArchiveError(
                f"{archive}: refused, it would unpack to {size_text(total)} or more, more than {size_text(max_bytes)}"
            )
    if not names.entries:
        raise ArchiveError(f"{archive}: there are no files in it")
    if expected and not any(name.lower().endswith(expected) for name in names.entries):
        some = ", ".join(repr(name) for name in list(names.entries)[:3])
        raise ArchiveError(
            f"{archive}: it has no {expected} files, but {len(names.entries)} others, such as {some}; is it another "
            "archive?"
        )
    return names


def _check_room(archive: Path, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NoRoomError(
            f"{archive}: needs {size_text(needed)} to unpack, but only {size_text(free)} are free in {folder}; make "
            "room there, or set dataset.root to a folder on another disk"
        )


def _extract_all(archive: Path, reader: Reader, entries: dict[str, Entry], folder: Path) -> None:
    with _bar(f"unpack {archive.name}", sum(entry.size for entry in entries.values())) as bar:
        for name, entry in entries.items():
            _extract(archive, reader, entry, folder / name, bar.update)


def _extract(archive: Path, reader: Reader, entry: Entry, target: Path, advance: Callable[[int], object]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with target.open("wb") as file:
        for block in reader.blocks(entry):
            written += len(block)
            file.write(block)
            advance(len(block))
    if written != entry.size:
        raise ArchiveError(
            f"{archive}: its entry {entry.name!r} has {written} bytes instead of {entry.size}; fetch it again"
        )
    if entry.seconds is not None:
        # The same times whenever it is unpacked, so that the index of the videos stays valid.
        os.utime(target, (entry.seconds, entry.seconds))


def _give_name(aside: Path, folder: Path, names: list[str]) -> None:
    """Move what was unpacked to where it belongs; the mark is the last of `names`."""
    if not folder.exists():
        os.rename(aside, folder)
        return
    (folder / MARKER_NAME).unlink(missing_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(aside / name, folder / name)


def _bar(description: str, total: int) -> tqdm:
    return tqdm(
        desc=description,
        total=total,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=True if is_quiet() else None,  # None: no bar where nobody looks at a terminal
    )
