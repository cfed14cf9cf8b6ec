"""Which videos are for training, validation and testing: by folders, by seeded fractions, or by numbers in names."""

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.names import join_names
from stage1_autoencoder.videos.source import DivisibleSource, SkippedVideo, VideoError

SPLITS: tuple[Split, ...] = ("train", "val", "test")
# Fractions that are held out where the config does not set them.
DEFAULT_FRACTIONS: dict[Split, float] = {"val": 0.1, "test": 0.1}
_SPLIT_FOLDERS: dict[str, Split] = {"train": "train", "val": "val", "validation": "val", "test": "test"}

Source = TypeVar("Source", bound=DivisibleSource)


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


def choose_fractions(dataset: DatasetConfig, has_folders: bool) -> dict[Split, float]:
    """Fractions of the training videos that become the splits without a folder of their own.

    Args:
        has_folders: the data set has split folders; then there is no test split unless its fraction is set.
    Raises:
        VideoError: the fractions of the config do not add up to 1.
    """
    fractions = DEFAULT_FRACTIONS | ({"test": 0.0} if has_folders else {})
    fractions |= {split: float(fraction) for split, fraction in dataset.splits.items()}
    if "train" in fractions and abs(sum(fractions.values()) - 1) > 1e-6:
        raise VideoError(f"dataset.splits: {fractions} do not add up to 1; omit train, it gets the rest")
    return fractions


def split_training(
    dataset: DatasetConfig, root: Path, sources: Mapping[Split, Source], fractions: Mapping[Split, float]
) -> dict[Split, Source]:
    """Take the missing splits out of the training videos, by fractions.

    Args:
        sources: of the splits that have folders, train among them.
    Raises:
        VideoError: no video is left to train on.
    """
    train, sources = sources["train"], dict(sources)
    rows = rows_by_fractions(
        train.videos.ids,
        val=0.0 if "val" in sources else fractions["val"],
        test=0.0 if "test" in sources else fractions["test"],
        seed=dataset.split_seed,
    )
    if not len(rows["train"]):
        raise VideoError(
            f"{root}: of {len(train.videos)} videos, dataset.splits {fractions} leave none to train on; "
            "lower the fractions or add videos"
        )
    for split in ("val", "test"):
        if len(rows[split]):
            sources[split] = train.select(rows[split])
    if len(rows["train"]) < len(train.videos):
        sources["train"] = train.select(rows["train"])
        sources["train"].skipped, sources["train"].passed_over = train.skipped, train.passed_over
    return {split: sources[split] for split in SPLITS if split in sources}


def rows_by_fractions(ids: Sequence[str], *, val: float, test: float, seed: int) -> dict[Split, np.ndarray]:
    """Divide videos among the splits; the result depends only on their ids and the seed.

    Videos are ranked by sha256 of "<seed><id>". The first round(n * test) of them are for testing, the next
    round(n * val) for validation, at least one each where the fraction is above 0 and there are 3 videos or more; the
    rest are for training.

    Args:
        ids: of n videos.
        val, test: fractions in [0, 1).
        seed: `dataset.split_seed`.
    Returns:
        ascending positions in `ids` per split; train is empty if the fractions are too large.
    """

    def size(fraction: float) -> int:
        at_least = 1 if fraction > 0 and len(ids) >= 3 else 0
        return max(at_least, round(len(ids) * fraction))

    ranked = sorted(range(len(ids)), key=lambda row: hashlib.sha256(f"{seed}{ids[row]}".encode()).digest())
    ends = size(test), size(test) + size(val)
    parts = {"train": ranked[ends[1] :], "val": ranked[ends[0] : ends[1]], "test": ranked[: ends[0]]}
    return {split: np.sort(np.array(part, np.int64)) for split, part in parts.items()}


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
