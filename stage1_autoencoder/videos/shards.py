"""Folders of files that hold many videos each: which files there are, and in which order."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from stage1_autoencoder.videos.source import VideoError
from stage1_autoencoder.videos.splits import natural_order


@dataclass(frozen=True)
class Shards:
    """Files of a folder.

    Attributes:
        names: in natural order; their stems, which begin the ids of videos, are all different.
        passed_over: how many other files there are, by extension (by name where they have none).
    """

    names: list[str]
    passed_over: dict[str, int]


def list_shards(folder: Path, extensions: Collection[str]) -> Shards:
    """List the files of a folder that have one of the extensions, in lower or upper case; hidden ones are left out.

    What other programs leave beside them, such as `a.tfrecords.part`, is not taken for one.

    Raises:
        VideoError: the folder cannot be looked into; two files that would give their videos the same ids.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise VideoError(f"{folder}: cannot be looked into ({error.strerror})") from error
    names: dict[str, str] = {}
    others: Counter[str] = Counter()
    for path in paths:
        extension = path.suffix.lower()
        if extension not in extensions:
            others[extension or path.name] += 1
        elif (other := names.setdefault(path.stem.casefold(), path.name)) != path.name:
            raise VideoError(
                f"{folder / other} and {path} would both be {path.stem!r}: rename one of them, or remove it"
            )
    listed = list(names.values())
    return Shards([listed[at] for at in natural_order(listed)], dict(others))
