"""Which videos are for training, validation and testing: by folders, or by numbers in names; see also `division`."""

import itertools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from stage1_autoencoder.videos.config import Split
from stage1_autoencoder.videos.names import join_names
from stage1_autoencoder.videos.source import SkippedVideo, VideoError

SPLITS: tuple[Split, ...] = ("train", "val", "test")
_SPLIT_FOLDERS: dict[str, Split] = {"train": "train", "val": "val", "validation": "val", "test": "test"}


def split_folders(root: Path) -> dict[Split, Path]:
    """Find the split folders in `root`: `train`, `val` or `validation`, `test`; empty if there are none.

    Raises:
        VideoError: `root` cannot be listed, two folders for one split, or split folders without `train`.
    """
    folders: dict[Split, Path] = {}
    try:
        paths = sorted(root.iterdir())
    except OSError as error:
        raise VideoError(f"{root}: cannot be listed ({error.strerror})") from error
    for path in paths:
        split = _SPLIT_FOLDERS.get(path.name.lower())
        if split is None or not path.is_dir():
            continue
        if split in folders:
            raise VideoError(f"{root}: both {folders[split].name} and {path.name} are for {split}; remove one of them")
        folders[split] = path
    if folders and "train" not in folders:
        raise VideoError(
            f"{root}: has {join_names(path.name for path in folders.values())}, but no folder train; "
            "add one, or rename the others"
        )
    return folders


def skip_beside(root: Path, folders: Mapping[Split, Path], count: Callable[[Path], int]) -> list[SkippedVideo]:
    """What lies in `root` beside its split folders and holds videos, as skipped; such a file was meant for one of them.

    Args:
        folders: as `split_folders` finds them; if there are none, nothing lies beside them.
        count: gives the number of videos in a file or folder.
    """
    skipped = []
    others = [path for path in sorted(root.iterdir()) if path not in folders.values() and path.name[0] != "."]
    for path in others if folders else []:
        if videos := count(path):
            name = os.fsencode(path.name).decode(errors="backslashreplace")
            many = f" with its {videos} videos" if videos > 1 else ""
            where = f"lies{many} beside {join_names(folder.name for folder in folders.values())}, so in no split"
            skipped.append(SkippedVideo(name, f"{where}; move it into one of them"))
    return skipped


def assign_numbers(splits: Mapping[Split, int | float | str], what: str, example: str) -> dict[int, Split]:
    """Find the split of each number, where splits are given as "1-19", "1-4,7" or 20.

    Args:
        what: the noun that is numbered, with an `example` of a range; for messages.
    Raises:
        VideoError: a range that cannot be parsed or runs backwards, or a number in two splits.
    """
    owner: dict[int, Split] = {}
    for split, value in splits.items():
        ranges: list[range] = []
        for part in str(value).split(","):
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if last < first:
                raise VideoError(f"dataset.splits.{split}: {value!r} is not a range of {what}s such as '{example}'")
            ranges.append(range(first, last + 1))
        for number in sorted(set(itertools.chain(*ranges))):
            if number in owner:
                raise VideoError(
                    f"dataset.splits: {what} {number} is both in {owner[number]} and in {split}; "
                    f"remove the {what} from one of them"
                )
            owner[number] = split
    return owner
