"""Tar archives, not compressed, read entry by entry with no more than a block of them in memory."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from pipelines.archives_entries import ArchiveError, Entry, describe_beginning

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
