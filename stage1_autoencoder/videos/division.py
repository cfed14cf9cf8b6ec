"""Division of videos among splits by seeded fractions: which video goes where, and that it stays there."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.index import IndexCache
from stage1_autoencoder.videos.source import DivisibleSource, VideoError
from stage1_autoencoder.videos.splits import SPLITS
from stage1_autoencoder.videos.video_files import VIDEO_EXTENSIONS

# Fractions that are held out where the config does not set them.
DEFAULT_FRACTIONS: dict[Split, float] = {"val": 0.1, "test": 0.1}
# With fewer videos, no split is filled so that it is not empty.
MIN_VIDEOS = 3

Source = TypeVar("Source", bound=DivisibleSource)


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
    dataset: DatasetConfig,
    root: Path,
    sources: Mapping[Split, Source],
    fractions: Mapping[Split, float],
    stored: Mapping[str, Split],
    remember: bool,
) -> dict[Split, Source]:
    """Take the missing splits out of the training videos, by fractions; see `rows_by_fractions`.

    The index in `root` remembers the split of each video, per seed and fractions. So a video stays where it is for as
    long as it keeps its name, whatever is added or removed. Where the index cannot be written, or was deleted, nothing
    is remembered: then videos that fill a split which would be empty may move when others are added or removed, and no
    others.

    Args:
        sources: of the splits that have folders, train among them.
        stored: splits by id of videos that a store holds; they stay there, whatever the index remembers.
        remember: False writes nothing.
    Raises:
        VideoError: no video is left to train on.
    """
    train, sources = sources["train"], dict(sources)
    ids, seed = train.videos.ids, dataset.split_seed
    val, test = (0.0 if split in sources else fractions[split] for split in ("val", "test"))
    rule = f"{seed} {val} {test}"
    with IndexCache(root, remember) as index:

        def known(name: str) -> Split | None:
            return stored.get(name) or index.get_split(rule, name)

        rows = rows_by_fractions(ids, val=val, test=test, seed=seed, known=known)
        for split in SPLITS:
            names = (ids[row] for row in rows[split].tolist())
            index.put_splits(rule, split, (key for name in names for key in {name, _without_extensions(name)}))
    if not len(rows["train"]):
        raise VideoError(
            f"{root}: of {len(train.videos)} videos, dataset.splits {fractions} leave none to train on; "
            "add videos, lower the fractions, or set another dataset.split_seed"
        )
    for split in ("val", "test"):
        if len(rows[split]):
            sources[split] = train.select(rows[split])
    if len(rows["train"]) < len(train.videos):
        sources["train"] = train.select(rows["train"])
        sources["train"].skipped, sources["train"].passed_over = train.skipped, train.passed_over
    return {split: sources[split] for split in SPLITS if split in sources}


def rows_by_fractions(
    ids: Sequence[str], *, val: float, test: float, seed: int, known: Callable[[str], Split | None]
) -> dict[Split, np.ndarray]:
    """Divide videos among the splits, each by itself: whatever is added or removed moves no other.

    The place of a video in [0, 1) is the sha256 of "<seed><id>": its first 8 bytes divided by 2^64. Below `test` it is
    for testing, below `test + val` for validation, else for training. Extensions in ids do not count, since an id gets
    one when a file of the same name is added (see `find_videos`).

    A split that would be empty gets the nearest new video of a split that has several: the training split always, the
    others if their fractions are above 0 and there are 3 videos or more.

    Args:
        ids: of n videos.
        val, test: fractions in [0, 1).
        seed: `dataset.split_seed`.
        known: the split of a video that is not new, by its id; it stays there unless the fraction of that split is 0.
    Returns:
        ascending positions in `ids` per split; train is empty only if all videos are known in others.
    """
    ranges: dict[Split, tuple[float, float]] = {
        "test": (0.0, test), "val": (test, test + val), "train": (test + val, 1.0)
    }  # fmt: skip
    found = [known(name) or known(_without_extensions(name)) for name in ids]
    is_new = np.array([split is None or ranges[split][0] == ranges[split][1] for split in found], bool)
    places = np.array([_place(_without_extensions(name), seed) for name in ids], np.float64)
    by_place = np.select([places < test, places < test + val], ["test", "val"], "train")
    splits = np.where(is_new, by_place, np.array(found, object))
    enough = len(np.unique(places)) >= MIN_VIDEOS
    for split in ("train", "test", "val"):
        low, high = ranges[split]
        if (splits == split).any() or (split != "train" and (low == high or not enough)):
            continue
        # Videos in one place have one name, and stay together.
        several = [other for other in SPLITS if len(np.unique(places[splits == other])) > 1]
        candidates = places[is_new & np.isin(splits, several)]
        if split == "train" and not len(candidates):
            candidates = places[is_new]
        if len(candidates):
            nearest = candidates[np.maximum(low - candidates, candidates - high).argmin()]
            splits[is_new & (places == nearest)] = split
    return {split: np.flatnonzero(splits == split) for split in SPLITS}


def _place(name: str, seed: int) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}{name}".encode()).digest()[:8], "big") / 2**64


def _without_extensions(name: str) -> str:
    while (parts := os.path.splitext(name))[1].lower() in VIDEO_EXTENSIONS:
        name = parts[0]
    return name
