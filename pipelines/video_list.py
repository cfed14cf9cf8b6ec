"""The list of videos that `data` leaves: which there are, in which split, and by what they are recognised."""

import csv
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from latent_cache.disk import PARTIAL
from stage1_autoencoder.videos.base import VideoSource
from stage1_autoencoder.videos.config import Split

COLUMNS = ("split", "id", "frames", "fps", "width", "height", "fingerprint")


def write_video_list(path: Path, sources: Mapping[Split, VideoSource]) -> int:
    """Write a table of all usable videos, tab-separated with a heading, a row a video, in the order of the store.

    The file is written aside and renamed: it is there whole or as it was before. `fingerprint` is what tells whether a
    video has changed; width and height are empty where frames are drawn.

    Returns:
        how many videos there are.
    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    count = 0
    try:
        with aside.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, dialect="excel-tab", lineterminator="\n")
            rows.writerow(COLUMNS)
            for split, source in sources.items():
                for video in source.videos:
                    size = video.size or ("", "")
                    rows.writerow((split, video.id, video.frames, f"{video.fps:g}", *size, video.fingerprint))
                    count += 1
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return count
