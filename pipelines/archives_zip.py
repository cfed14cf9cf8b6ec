"""Zip archives, read entry by entry."""

import calendar
import errno
import lzma
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from pipelines.archives_entries import ArchiveError, Entry, describe_beginning

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
