"""Checksums of archives that nobody has published: those that were unpacked first are remembered and held to."""

import json
import os
from pathlib import Path

from stage1_autoencoder.videos import VideoError

# Beside the unpacked folders, so that it outlives them.
RECORD_NAME = ".archives.json"


def recorded_sha256(root: Path, name: str) -> str | None:
    """The checksum of the archive of this name that was unpacked first below `root`; None if none was.

    Raises:
        VideoError: the record is damaged.
    """
    entry = _read(root).get(name)
    return entry["sha256"] if entry is not None else None


def record_sha256(root: Path, name: str, sha256: str, *, size: int, place: str) -> None:
    """Remember the checksum of an archive, unless one of its name is remembered already.

    Args:
        size: of the archive, in bytes.
        place: URL or path that it came from, for people to read.
    Raises:
        VideoError: the record is damaged.
    """
    entries = _read(root)
    if name in entries:
        return
    entries[name] = {"sha256": sha256, "bytes": size, "from": place}
    aside = root / f"{RECORD_NAME}.new"
    aside.write_text(json.dumps(entries, indent=1))
    os.replace(aside, root / RECORD_NAME)


def _read(root: Path) -> dict[str, dict]:
    path = root / RECORD_NAME
    try:
        entries = json.loads(path.read_text())
        if not all(isinstance(entry["sha256"], str) for entry in entries.values()):
            raise ValueError("no checksum")
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, KeyError, TypeError):
        raise VideoError(
            f"{path}: not the record of checksums that was written here; remove it, and checksums are recorded anew"
        ) from None
    return entries
