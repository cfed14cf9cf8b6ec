"""CLEVRER: `video_00000.mp4` to `video_19999.mp4`, split by their numbers (`source: clevrer`)."""

import re
from pathlib import Path

from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.folders import FolderSource, open_divided
from stage1_autoencoder.videos.listing import find_named_videos
from stage1_autoencoder.videos.names import natural_order
from stage1_autoencoder.videos.source import VideoError
from stage1_autoencoder.videos.splits import assign_numbers

# The official splits.
NUMBERS: dict[Split, str] = {"train": "0-9999", "val": "10000-14999", "test": "15000-19999"}

_WAY_OUT = (
    "download the data with `river data --config clevrer`, or unpack archives with "
    "`river data --config clevrer --mirror <folder with video_train.zip, video_validation.zip, video_test.zip>`"
)


def open_clevrer(dataset: DatasetConfig, root: Path, remember: bool = True) -> dict[Split, FolderSource]:
    """Index CLEVRER's videos below `root` and divide them by their numbers; splits without videos are omitted.

    An id such as video_00042 does not depend on the folder. `dataset.splits` has the numbers of each split, by default
    the official ones: 0-9999, 10000-14999 and 15000-19999. Other numbers are not used.

    Raises:
        VideoError: no folder, no CLEVRER videos, two files for one video, overlapping splits, nothing to train on.
    """
    splits = dataset.splits or NUMBERS
    owner = assign_numbers(splits, "video", example=NUMBERS["train"])
    listing = find_named_videos(root, _video_id, "video_00000.mp4", _WAY_OUT)
    listing = listing.select(natural_order(listing.ids))
    sources = open_divided(dataset, listing, lambda video_id: owner.get(_number(video_id)), remember)
    if "train" not in sources:
        raise VideoError(
            f"{root}: no usable video to train on (dataset.splits.train {splits.get('train')}); {_WAY_OUT}"
        )
    return sources


def _video_id(stem: str) -> str | None:
    match = re.fullmatch(r"video_(\d+)", stem)
    return f"video_{int(match[1]):05d}" if match else None


def _number(video_id: str) -> int:
    return int(video_id.removeprefix("video_"))
