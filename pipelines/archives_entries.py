"""The entries of an archive, of whatever kind, and which names of them are refused."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

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
