"""Which videos are for training, validation and testing: by seeded fractions, or by numbers in names. And order."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from stage1_autoencoder.videos.config import Split
from stage1_autoencoder.videos.source import VideoError

SPLITS: tuple[Split, ...] = ("train", "val", "test")

# Shares of the videos that are held out where the config says nothing.
DEFAULT_FRACTIONS: dict[Split, float] = {"val": 0.1, "test": 0.1}

# The paper's. Person 20 is held out for validation, by the rule of `persons_of_splits`.
KTH_PERSONS: dict[Split, str] = {"train": "1-20", "test": "21-25"}

# The official ones.
CLEVRER_NUMBERS: dict[Split, str] = {"train": "0-9999", "val": "10000-14999", "test": "15000-19999"}


def natural_key(name: str) -> str:
    """Sort key by which numbers inside names count as numbers: clip2 before clip10.

    Names that differ by leading zeros alone have equal keys: sort by name first where that may be (`natural_order`).
    """
    # A zero character, which no name has, ends the text before a number as the end of a name would; the number of
    # digits before the digits makes their order that of the numbers. One text a name, since there may be a million.
    return re.sub(r"\d+", lambda number: _number_key(number[0]), name)


def _number_key(digits: str) -> str:
    value = str(int(digits))
    return f"\0{chr(len(value))}{value}"


def natural_order(names: Sequence[str]) -> list[int]:
    """Positions of names in natural order; of names with equal keys in the order of their characters."""
    return sorted(sorted(range(len(names)), key=names.__getitem__), key=lambda at: natural_key(names[at]))


def rows_by_fractions(ids: Sequence[str], *, val: float, test: float, seed: int) -> dict[Split, np.ndarray]:
    """Divide videos among the splits, depending on nothing but their ids and the seed.

    Videos are ranked by sha256 of "<seed><id>". The first round(n * test) of them are for testing, the next
    round(n * val) for validation, at least one each where the fraction is above 0 and there are 3 videos or more; the
    rest are for training.

    Args:
        ids: of n videos.
        val, test: fractions in [0, 1).
        seed: `dataset.split_seed`.
    Returns:
        positions in `ids` a split, ascending; train may be left empty by fractions too large.
    """

    def size(fraction: float) -> int:
        at_least = 1 if fraction > 0 and len(ids) >= 3 else 0
        return max(at_least, round(len(ids) * fraction))

    ranked = sorted(range(len(ids)), key=lambda at: hashlib.sha256(f"{seed}{ids[at]}".encode()).digest())
    ends = {"test": size(test), "val": size(test) + size(val), "train": len(ids)}
    start, rows = 0, {}
    for split, stop in ends.items():
        rows[split] = np.sort(np.array(ranked[start:stop], np.int64))
        start = stop
    return {split: rows[split] for split in SPLITS}


def split_by_fractions(ids: Sequence[str], *, val: float, test: float, seed: int) -> dict[Split, list[str]]:
    """As `rows_by_fractions`, with the ids themselves."""
    rows = rows_by_fractions(ids, val=val, test=test, seed=seed)
    return {split: [ids[at] for at in places.tolist()] for split, places in rows.items()}


def parse_numbers(value: int | float | str, split: Split, what: str = "persons", example: str = "1-19") -> list[range]:
    """Parse numbers as "1-19", "1-4,7" or 20.

    Args:
        what: they are of, with an `example`, for the message.
    Raises:
        VideoError: not of this form, or a range that runs backwards.
    """
    ranges: list[range] = []
    for part in str(value).split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise VideoError(f"dataset.splits.{split}: {value!r} is not a range of {what} such as '{example}'")
        ranges.append(range(first, last + 1))
    return ranges


def persons_of_splits(splits: Mapping[Split, int | float | str]) -> dict[int, Split]:
    """Find which split each person of KTH belongs to. Given splits replace `KTH_PERSONS` as a whole.

    Where `val` is not given, the last of several training persons is held out for validation: 1-20 and 21-25 means
    1-19, 20 and 21-25. `val: none` holds out nobody.

    Raises:
        VideoError: a person in two splits, or a range that cannot be parsed.
    """
    splits = splits or KTH_PERSONS
    owner = _owners({split: value for split, value in splits.items() if (split, value) != ("val", "none")}, "person")
    training = sorted(person for person, split in owner.items() if split == "train")
    if "val" not in splits and len(training) > 1:
        owner[training[-1]] = "val"
    return owner


def numbers_of_splits(splits: Mapping[Split, int | float | str]) -> dict[int, Split]:
    """Find which split each video of CLEVRER belongs to. Given splits replace `CLEVRER_NUMBERS` as a whole.

    Raises:
        VideoError: a video in two splits, or a range that cannot be parsed.
    """
    return _owners(splits or CLEVRER_NUMBERS, "video", example="0-9999")


def _owners(splits: Mapping[Split, int | float | str], what: str, example: str = "1-19") -> dict[int, Split]:
    owner: dict[int, Split] = {}
    for split, value in splits.items():
        for number in sorted(set(itertools.chain(*parse_numbers(value, split, f"{what}s", example)))):
            if number in owner:
                raise VideoError(
                    f"dataset.splits: {what} {number} is both in {owner[number]} and in {split}; "
                    f"leave the {what} out of one of them"
                )
            owner[number] = split
    return owner


def join_names(names: Iterable[str], most: int = 5) -> str:
    """Join names for a message, cutting a long list short."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
