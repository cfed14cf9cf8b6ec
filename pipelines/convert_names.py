"""Folder names for ids of videos: safe on every file system, the id itself wherever that is."""

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence

from pipelines.errors import UserError

_MOST_BYTES = 200  # of one name; file systems take 255, and readers may want to add something

# What Windows, and by way of it many network drives, refuse in names; % would make two ids one.
_RESERVED = re.compile(r'[<>:"\\|?*\x00-\x1f\x7f]|%(?=[0-9A-Fa-f]{2})')
_HIDDEN_OR_CUT = re.compile(r"^\.|[. ]$")
_DEVICES = re.compile(r"(conin\$|conout\$|con|prn|aux|nul|com\d|lpt\d)(?=\.|$)", re.IGNORECASE)


def folder_names(ids: Sequence[str]) -> list[str]:
    """Name the folder of each video of a split.

    A `/` in an id stands for folders in folders. Characters that some file systems refuse become %3A and the like;
    names of Windows' devices, and folders that other videos would lie in, get a `_`; long names are cut and end in a
    digest.

    Raises:
        UserError: two that are the same, or differ by upper and lower case alone, which many file systems do not tell.
    """
    names = ["/".join(map(_name, video_id.split("/"))) for video_id in ids]
    folders = {parent for name in names for parent in _parents(_folded(name))}
    names = [f"{name}_" if _folded(name) in folders else name for name in names]
    seen: dict[str, int] = {}
    for row, name in enumerate(names):
        if (other := seen.setdefault(_folded(name), row)) != row:
            raise UserError(
                f"videos {ids[other]!r} and {ids[row]!r} would be the folders {names[other]} and {name}, which not "
                "every file system tells apart: rename one of them"
            )
    return names


def _name(part: str) -> str:
    name = _RESERVED.sub(_encoded, part.encode(errors="backslashreplace").decode())
    name = _DEVICES.sub(r"\1_", name, count=1) if _DEVICES.match(name) else name
    name = _HIDDEN_OR_CUT.sub(_encoded, name) or "_"
    if len(name.encode()) > _MOST_BYTES:
        start = name.encode()[: _MOST_BYTES - 13].decode(errors="ignore")
        name = f"{start}~{hashlib.sha256(part.encode(errors='backslashreplace')).hexdigest()[:12]}"
    return name


def _encoded(character: re.Match) -> str:
    return f"%{ord(character[0]):02X}"


def _folded(name: str) -> str:
    """What a file system that tells neither case nor the two ways to write an accent apart makes of a name."""
    return unicodedata.normalize("NFC", name.casefold())


def _parents(name: str) -> Iterator[str]:
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name
