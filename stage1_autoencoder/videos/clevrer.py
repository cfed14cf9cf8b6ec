"""CLEVRER: `video_00000.mp4` to `video_19999.mp4`, split by their numbers (`source: clevrer`)."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from stage1_autoencoder.videos.base import SkippedVideo, VideoError
from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.folders import Clip, FolderSource, make_clip
from stage1_autoencoder.videos.index import find_videos, index_videos
from stage1_autoencoder.videos.splits import CLEVRER_NUMBERS, SPLITS, numbers_of_splits

_WAY_OUT = (
    "fetch the data by `make data DATASET=clevrer`, or unpack it from archives that you have by "
    "`make data DATASET=clevrer MIRROR=<folder with video_train.zip, video_validation.zip, video_test.zip>`"
)


def open_clevrer(dataset: DatasetConfig, root: Path, remember: bool = True) -> dict[Split, FolderSource]:
    """Index CLEVRER's videos below `root` and divide them by their numbers; splits without videos are left out.

    Ids are as video_00042, whatever folder the file lies in. `dataset.splits` gives the numbers of each split, by
    default the official ones: 0-9999, 10000-14999 and 15000-19999. Numbers in no split go unused.

    Raises:
        VideoError: no folder, no CLEVRER videos, two files for one video, overlapping splits, nothing to train on.
    """
    owner = numbers_of_splits(dataset.splits)
    if not root.is_dir():
        raise VideoError(f"{root}: there is no such folder; {_WAY_OUT}")
    try:
        found = find_videos(root)
    except VideoError as error:
        raise VideoError(f"{error}; {_WAY_OUT}") from error
    matches = [re.fullmatch(r"video_(\d+)", Path(name).stem) for name in found.names]
    if not any(matches):
        raise VideoError(f"{root}: none of its {len(found)} videos is named as video_00000.mp4; {_WAY_OUT}")
    rows: dict[int, int] = {}
    for row, match in enumerate(matches):
        if match and (other := rows.setdefault(int(match[1]), row)) != row:
            raise VideoError(
                f"{root / found.names[other]} and {root / found.names[row]} are both video {int(match[1])}: "
                "remove one of them"
            )
    skipped: dict[Split, list[SkippedVideo]] = {split: [] for split in SPLITS}
    skipped["train"] += found.unreadable
    skipped["train"] += [
        SkippedVideo(video_id, "is not named as video_00000.mp4")
        for video_id, match in zip(found.ids, matches, strict=True)
        if match is None
    ]
    numbers = {split: sorted(number for number in rows if owner.get(number) == split) for split in SPLITS}
    wanted = [number for split in SPLITS for number in numbers[split]]
    indexed = index_videos(root, [found.names[rows[number]] for number in wanted], remember)

    def usable(split: Split) -> Iterator[Clip]:
        for number, entry in zip(numbers[split], indexed, strict=False):
            video_id = f"video_{number:05d}"
            if entry.probe is None:
                skipped[split].append(SkippedVideo(video_id, entry.reason or ""))
            else:
                yield make_clip(video_id, found.names[rows[number]], entry, dataset.frame_step)

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
