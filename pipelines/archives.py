"""Unpacking archives from elsewhere: all of one or nothing, nothing outside its folder, and no more than fits."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from pipelines.archives_entries import ArchiveError, Entry, Names, NoRoomError, Reader, describe_beginning
from pipelines.archives_tar import TarReader, looks_like_tar
from pipelines.archives_zip import ZipReader, looks_like_zip
from pipelines.fetch import size_text
from pipelines.runtime.progress import is_quiet

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
