"""Unpacking zip archives from elsewhere: all of one or nothing, and nothing outside its folder."""

import calendar
import hashlib
import json
import os
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from stage1_autoencoder.videos import VideoError

# Written into a folder last: which archive it came from, and the files with their sizes.
MARKER_NAME = ".unpacked.json"

# More than any archive that we fetch unpacks to; a zip of a few kilobytes can claim any size.
MAX_UNPACKED_BYTES = 32 << 30

_BLOCK = 1 << 20
_BEGINNINGS = {
    b"": "it is empty",
    b"PK\x03\x04": "it begins like a zip, but its end is missing: it was cut off",
    b"\x1f\x8b": "it is gzip",
    b"Rar!": "it is a RAR archive",
    b"7z\xbc\xaf": "it is a 7z archive",
    b"<": "it is an HTML or XML page, maybe the error page of a server",
}


class ArchiveError(VideoError):
    """An archive that cannot or must not be unpacked; the message has its path and what is wrong."""


def sha1_of(path: Path) -> str:
    """sha1 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()


def read_marker(folder: Path) -> dict | None:
    """Read what `unpack_zip` noted about a folder, if the files are all there with their sizes; None otherwise."""
    try:
        marker = json.loads((folder / MARKER_NAME).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in marker["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return marker if whole else None


def unpack_zip(archive: Path, folder: Path, *, sha1: str, max_bytes: int = MAX_UNPACKED_BYTES) -> int:
    """Unpack a zip archive into a folder.

    It is unpacked and marked in a hidden folder aside, which gets its name at the end: `folder` never holds half of it.
    If `folder` is there already, files of the same names are replaced, others are left alone, and the mark goes in
    last. Files get the times that the archive has for them.

    Args:
        sha1: of the archive, for the mark.
        max_bytes: refuse archives that claim to unpack to more.
    Returns:
        number of files.
    Raises:
        ArchiveError: not a zip, damaged, encrypted, too large, or with entries that would land elsewhere.
    """
    aside = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(aside, ignore_errors=True)  # left by a run that was killed
    try:
        with _open_zip(archive) as opened:
            entries = _checked_entries(archive, opened, max_bytes, shutil.disk_usage(folder.parent).free)
            aside.mkdir()
            with tqdm(desc=archive.name, total=len(entries), unit="file", leave=False, disable=None) as bar:
                for name, entry in entries.items():
                    _extract(archive, opened, entry, aside / name)
                    bar.update()
        marker = {
            "archive": archive.name,
            "bytes": archive.stat().st_size,
            "sha1": sha1,
            "files": {name: entry.file_size for name, entry in entries.items()},
        }
        (aside / MARKER_NAME).write_text(json.dumps(marker, indent=1))
        if folder.exists():
            (folder / MARKER_NAME).unlink(missing_ok=True)
            for name in [*entries, MARKER_NAME]:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(aside / name, folder / name)
        else:
            os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return len(entries)


def _open_zip(archive: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(archive)
    except zipfile.BadZipFile as error:
        with archive.open("rb") as file:
            head = file.read(64)
        meaning = next(
            (text for begin, text in _BEGINNINGS.items() if (head.lstrip().startswith(begin) if begin else not head)),
            f"it begins with {head[:16]!r}",
        )
        raise ArchiveError(f"{archive}: not a whole zip archive ({error}): {meaning}; fetch it again") from error


def _checked_entries(
    archive: Path, opened: zipfile.ZipFile, max_bytes: int, free_bytes: int
) -> dict[str, zipfile.ZipInfo]:
    """Find the files of an archive by name, refusing what could do harm before anything is written."""
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in opened.infolist():
        # The name as the archive has it: zipfile has cut it at a zero byte, and may have turned the slashes.
        path = PurePosixPath(entry.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in entry.orig_filename or ":" in path.parts[0]:
            raise ArchiveError(f"{archive}: refused, its entry {entry.orig_filename!r} would land outside the folder")
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ArchiveError(f"{archive}: refused, its entry {entry.filename!r} is a link or a device")
        if entry.flag_bits & 0x1:
            raise ArchiveError(f"{archive}: its entry {entry.filename!r} is encrypted; unpack it by hand")
        if entry.is_dir():
            continue
        if str(path) in entries:
            raise ArchiveError(f"{archive}: refused, it has two entries {entry.filename!r}")
        entries[str(path)] = entry
    total = sum(entry.file_size for entry in entries.values())
    if total > max_bytes:
        raise ArchiveError(f"{archive}: refused, it would unpack to {total} bytes, more than {max_bytes}")
    if total > free_bytes:
        raise ArchiveError(f"{archive}: needs {total} bytes to unpack, but only {free_bytes} are free there")
    if not entries:
        raise ArchiveError(f"{archive}: there are no files in it")
    return entries


def _extract(archive: Path, opened: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    written = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with opened.open(entry) as source, target.open("wb") as file:
            while block := source.read(_BLOCK):  # checks the CRC when it reaches the end
                written += len(block)
                file.write(block)
    # zipfile raises NotImplementedError for a compression that it does not know, as damaged headers name one.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ArchiveError(f"{archive}: its entry {entry.filename!r} is damaged ({error}); fetch it again") from error
    if written != entry.file_size:
        raise ArchiveError(
            f"{archive}: its entry {entry.filename!r} has {written} bytes instead of {entry.file_size}; fetch it again"
        )
    try:
        seconds = calendar.timegm((*entry.date_time, 0, 0, 0))
    except ValueError:
        return  # an impossible date
    # The same times whenever it is unpacked, so that the index of the videos stays valid.
    os.utime(target, (seconds, seconds))
