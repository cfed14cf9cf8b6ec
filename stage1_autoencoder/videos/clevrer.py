"""CLEVRER: `video_00000.mp4` to `video_19999.mp4`, split by their numbers (`source: clevrer`)."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.folders import Clip, FolderSource, find_named, make_clip
from stage1_autoencoder.videos.index import index_videos
from stage1_autoencoder.videos.source import SkippedVideo, VideoError
from stage1_autoencoder.videos.splits import CLEVRER_NUMBERS, SPLITS, numbers_of_splits

_WAY_OUT = (
    "fetch the data by `make data DATASET=clevrer`, or unpack it from archives that you have by "
    "`make data DATASET=clevrer MIRROR=<folder with video_train.zip, video_validation.zip, video_test.zip>`"
)


def _video_id(stem: str) -> str | None:
    match = re.fullmatch(r"video_(\d+)", stem)
    return f"video_{int(match[1]):05d}" if match else None


def _number(video_id: str) -> int:
    return int(video_id.removeprefix("video_"))


def open_clevrer(dataset: DatasetConfig, root: Path, remember: bool = True) -> dict[Split, FolderSource]:
    """Index CLEVRER's videos below `root` and divide them by their numbers; splits without videos are left out.

    Ids are as video_00042, whatever folder the file lies in. `dataset.splits` gives the numbers of each split, by
    default the official ones: 0-9999, 10000-14999 and 15000-19999. Numbers in no split go unused.

    Raises:
        VideoError: no folder, no CLEVRER videos, two files for one video, overlapping splits, nothing to train on.
    """
    owner = numbers_of_splits(dataset.splits)
    found = find_named(root, _video_id, "video_00000.mp4", _WAY_OUT)
    ids: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for number, video_id in sorted((_number(video_id), video_id) for video_id in found.names):
        if number in owner:
            ids[owner[number]].append(video_id)
    skipped: dict[Split, list[SkippedVideo]] = {split: [] for split in SPLITS} | {"train": found.skipped}
    indexed = index_videos(root, [found.names[video_id] for split in SPLITS for video_id in ids[split]], remember)

    def usable(split: Split) -> Iterator[Clip]:
        for video_id, entry in zip(ids[split], indexed, strict=False):
            if entry.probe is None:
                skipped[split].append(SkippedVideo(video_id, entry.reason or ""))
            else:
                yield make_clip(video_id, found.names[video_id], entry, dataset.frame_step)

    passed_over = {"train": found.passed_over}
    with contextlib.closing(indexed):
        sources = {
            split: FolderSource(dataset, root, usable(split), skipped[split], passed_over.get(split))
            for split in SPLITS
        }
    if not sources["train"].videos:
        given = dataset.splits.get("train", CLEVRER_NUMBERS["train"] if not dataset.splits else "nothing")
        raise VideoError(f"{root}: no usable video of the numbers to train on ({given}); {_WAY_OUT}")
    return {split: source for split, source in sources.items() if source.videos}
