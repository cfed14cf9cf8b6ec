"""Which videos are for training, validation and testing: by seeded fractions, and by KTH's persons. And their order."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence

from stage1_autoencoder.videos.base import VideoError
from stage1_autoencoder.videos.config import Split

SPLITS: tuple[Split, ...] = ("train", "val", "test")

# Shares of the videos that are held out where the config says nothing.
DEFAULT_FRACTIONS: dict[Split, float] = {"val": 0.1, "test": 0.1}

# The paper trains on persons 1-20 and tests on 21-25. Person 20 is held out of the former for validation.
KTH_PERSONS: dict[Split, str] = {"train": "1-19", "val": "20", "test": "21-25"}


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sort key by which numbers inside names count as numbers: clip2 before clip10."""
    parts: list[str | int] = list(re.split(r"(\d+)", name))
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def split_by_fractions(ids: Sequence[str], *, val: float, test: float, seed: int) -> dict[Split, list[str]]:
    """Divide videos among the splits, depending on nothing but their ids and the seed.

    Videos are ranked by sha256 of "<seed><id>". The first round(n * test) of them are for testing, the next
    round(n * val) for validation, at least one each where the fraction is above 0 and there are 3 videos or more; the
    rest are for training.

    Args:
        ids: of n videos.
        val, test: fractions in [0, 1).
        seed: `dataset.split_seed`.
    Returns:
        ids a split, in the order they came; train may be left empty by fractions too large.
    """

    def size(fraction: float) -> int:
        at_least = 1 if fraction > 0 and len(ids) >= 3 else 0
        return max(at_least, round(len(ids) * fraction))

    ranked = sorted(ids, key=lambda video_id: hashlib.sha256(f"{seed}{video_id}".encode()).hexdigest())
    testing = set(ranked[: size(test)])
    validation = set(ranked[size(test) : size(test) + size(val)])
    return {
        "train": [video_id for video_id in ids if video_id not in testing | validation],
        "val": [video_id for video_id in ids if video_id in validation],
        "test": [video_id for video_id in ids if video_id in testing],
    }


def parse_persons(value: int | str, split: Split) -> set[int]:
    """Parse persons as "1-19", "1-4,7" or 20.

    Raises:
        VideoError: not of this form, or a range that runs backwards.
    """
    persons: set[int] = set()
    for part in str(value).split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise VideoError(f"dataset.splits.{split}: {value!r} is not a range of persons such as '1-19' or '1-4,7'")
        persons.update(range(first, last + 1))
    return persons


def persons_of_splits(splits: Mapping[Split, int | float | str]) -> dict[int, Split]:
    """Find which split each person belongs to. Given splits replace `KTH_PERSONS` as a whole; others go unused.

    Raises:
        VideoError: a person in two splits, or a range that cannot be parsed.
    """
    owner: dict[int, Split] = {}
    for split, value in (splits or KTH_PERSONS).items():
        for person in sorted(parse_persons(value, split)):
            if person in owner:
                raise VideoError(
                    f"dataset.splits: person {person} is both in {owner[person]} and in {split}; "
                    "leave the person out of one of them"
                )
            owner[person] = split
    return owner


def join_names(names: Iterable[str], most: int = 5) -> str:
    """Join names for a message, cutting a long list short."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
