"""BAIR robot pushing as published: TFRecords in `softmotion30_44k/{train,test}` (`source: bair`)."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.division import split_training
from stage1_autoencoder.videos.index import IndexCache
from stage1_autoencoder.videos.names import escaped
from stage1_autoencoder.videos.shards import ShardError, ShardSource, open_shards
from stage1_autoencoder.videos.source import MOST_PIXELS, UNKNOWN_FPS, VideoError, VideoInfo
from stage1_autoencoder.videos.tfrecords import Record, example_bytes, read_record, walk_records

FOLDER = "softmotion30_44k"
# There is no official validation split. This fraction of the 43 264 training videos is about as large as the test set.
DEFAULT_VAL = 0.006

_KEY = re.compile(r"(\d+)/image_aux1/encoded")
_MOST_DIGITS = 100  # of the number of a frame; Python converts no thousands of them
_WAY_OUT = (
    "download the data with `river data --config bair_64`, or unpack an archive with "
    "`river data --config bair_64 --mirror <folder with bair_robot_pushing_dataset_v0.tar>`"
)


class BairSource(ShardSource):
    """Videos of TFRecord files, one per example: the raw frames in its features `<number>/image_aux1/encoded`.

    Only the first example of a file is read for the index; other examples that differ in length or size are broken.
    """

    extensions = frozenset({".tfrecords", ".tfrecord"})
    way_out = "download it again"

    def index_shard(self, path: Path, cache: IndexCache | None) -> Iterator[tuple[Record, int, VideoInfo]]:
        step, shape = self.dataset.frame_step, None
        for number, record in enumerate(walk_records(path)):
            count, side = shape = shape or _count_and_side(path, record)
            info = VideoInfo(
                id=f"{escaped(path.stem)}/{number}",
                frames=(count - 1) // step + 1,
                fps=UNKNOWN_FPS / step,
                fingerprint=f"crc32c:{record.checksum:08x}:{record.length}",
                size=(side, side),
            )
            yield record, count, info
        if shape is None:
            raise ShardError("is empty")

    def pack_places(self, places: list[Record]) -> np.ndarray:
        return np.array(places, np.int64).reshape(-1, 3)

    def read_pictures(
        self, path: Path, place: np.ndarray, video: VideoInfo, frames: int, wanted: range
    ) -> Iterator[np.ndarray]:
        encoded, side = _frames(read_record(path, Record(*place.tolist()))), video.size[0]
        if len(encoded) != frames:
            raise ShardError(f"has {len(encoded)} frames, but the first example of its file {frames}")
        for number in wanted:
            if len(encoded[number]) != 3 * side * side:
                raise ShardError(f"frame {number} has {len(encoded[number])} bytes instead of {side}x{side}x3")
            yield np.frombuffer(encoded[number], np.uint8).reshape(side, side, 3)


def _frames(data: memoryview) -> list[memoryview]:
    """The raw frames of an example, in order.

    Raises:
        ShardError: there are none, one is missing, or has an absurd number.
    """
    encoded = {match[1]: value for key, value in example_bytes(data) if (match := _KEY.fullmatch(key))}
    if (longest := max(map(len, encoded), default=0)) > _MOST_DIGITS:
        raise ShardError(f"has an example with a frame number of {longest} digits")
    found = {int(number): value for number, value in encoded.items()}
    if not found:
        raise ShardError("has an example without '0/image_aux1/encoded', which BAIR stores frames under")
    if (missing := next((number for number in range(len(found)) if number not in found), None)) is not None:
        raise ShardError(f"has an example without frame {missing}")
    return [found[number] for number in range(len(found))]


def _count_and_side(path: Path, record: Record) -> tuple[int, int]:
    """Number and side of an example's frames."""
    frames = _frames(read_record(path, record))
    side = math.isqrt(len(frames[0]) // 3)
    if side == 0 or 3 * side * side != len(frames[0]):
        raise ShardError(f"has frames of {len(frames[0])} bytes, which are not square RGB pictures")
    if side * side > MOST_PIXELS:
        raise ShardError(f"has frames of {side}x{side}, more than {MOST_PIXELS} pixels")
    return len(frames), side


def open_bair(
    dataset: DatasetConfig, root: Path, remember: bool, stored: Mapping[str, Split]
) -> dict[Split, BairSource]:
    """Index BAIR's TFRecords below `root`, in its folder `softmotion30_44k` or directly.

    The files in `test` are the test split. Of those in `train`, the fraction `dataset.splits.val` (0.006 unless set) is
    held out for validation, see `division`. An id such as traj_0_to_255/12 is the file and the number of the
    example in it.

    Raises:
        VideoError: no such folder, no TFRecords in it, two with one name, or none that can be used.
    """
    inside = root / FOLDER if (root / FOLDER).is_dir() else root
    folders: dict[Split, Path] = {"train": inside / "train", "test": inside / "test"}
    for folder in (root, *folders.values()):
        if not folder.is_dir():
            raise VideoError(f"{folder}: no such folder; {_WAY_OUT}")
    sources = open_shards(BairSource, dataset, folders, _WAY_OUT)
    fractions: dict[Split, float] = {"val": float(dataset.splits.get("val", DEFAULT_VAL)), "test": 0.0}
    return split_training(dataset, root, sources, fractions, stored, remember)
