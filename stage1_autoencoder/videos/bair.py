"""BAIR robot pushing as it is published: TFRecords in `softmotion30_44k/{train,test}` (`source: bair`)."""

import math
import re
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.folders import split_training
from stage1_autoencoder.videos.preprocessing import FramePreprocessor
from stage1_autoencoder.videos.shards import list_shards
from stage1_autoencoder.videos.source import (
    BrokenVideoError,
    SkippedVideo,
    VideoError,
    VideoInfo,
    VideoSource,
    VideoTable,
)
from stage1_autoencoder.videos.splits import join_names
from stage1_autoencoder.videos.tfrecords import Record, RecordError, example_bytes, read_record, walk_records
from stage1_autoencoder.videos.video_files import UNKNOWN_FPS

FOLDER = "softmotion30_44k"
EXTENSIONS = frozenset({".tfrecords", ".tfrecord"})
# There is no official validation split. So many of the 43 264 training videos make one of about the test set's size.
DEFAULT_VAL = 0.006

_KEY = re.compile(r"(\d+)/image_aux1/encoded")
_WAY_OUT = (
    "fetch the data by `make data DATASET=bair_64`, or unpack it from an archive that you have by "
    "`make data DATASET=bair_64 MIRROR=<folder with bair_robot_pushing_dataset_v0.tar>`"
)


class BairSource(VideoSource):
    """Videos of TFRecord files, one an example: the raw frames of its features `<number>/image_aux1/encoded`."""

    videos: VideoTable

    def __init__(self, dataset: DatasetConfig, folder: Path, files: list[str]) -> None:
        """Index files by walking their records' frames; of the data, only each file's first example is read.

        Examples that turn out to be of another length or size than the first one of their file are broken videos.

        Args:
            files: names in `folder`, in the order that the videos shall have.
        """
        self.dataset, self.folder, self.files = dataset, folder, files
        self.skipped = []
        places, numbers, native = array("q"), array("i"), array("i")

        def infos() -> Iterator[VideoInfo]:
            # disable=None: no bar where nobody looks at a terminal
            for number, name in enumerate(tqdm(files, f"index {folder.name}", leave=False, unit="file", disable=None)):
                for record, frames, info in self._index_file(name):
                    places.extend(record)
                    numbers.append(number)
                    native.append(frames)
                    yield info

        self.videos = VideoTable(infos())
        self._records = np.array(places, np.int64).reshape(-1, 3)  # offset, length, checksum
        self._file_of = np.array(numbers, np.int32)
        self._native = np.array(native, np.int32)  # frames before `frame_step`

    def _index_file(self, name: str) -> Iterator[tuple[Record, int, VideoInfo]]:
        path, step = self.folder / name, self.dataset.frame_step
        try:
            shape = None
            for number, record in enumerate(walk_records(path)):
                count, side = shape = shape or _look_at(path, record)
                info = VideoInfo(
                    id=f"{path.stem}/{number}",
                    frames=(count - 1) // step + 1,
                    fps=UNKNOWN_FPS / step,
                    fingerprint=f"crc32c:{record.checksum:08x}:{record.length}",
                    size=(side, side),
                )
                yield record, count, info
            if shape is None:
                raise RecordError("is empty")
        except RecordError as error:
            self.skipped.append(SkippedVideo(path.stem, f"{name} {error}; fetch it again"))
        except OSError as error:
            self.skipped.append(SkippedVideo(path.stem, f"{name} cannot be read ({error.strerror})"))

    @property
    def native_frames(self) -> int:
        return int(self._native.sum())

    def select(self, rows: np.ndarray, skipped: Iterable[SkippedVideo] = ()) -> "BairSource":
        """A source of some of the videos, by their positions [m] int64."""
        source = BairSource(self.dataset, self.folder, [])
        source.files, source.skipped, source.videos = self.files, list(skipped), self.videos.select(rows)
        source._records, source._file_of = self._records[rows], self._file_of[rows]
        source._native = self._native[rows]
        return source

    def iterate(self, index: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        start, stop = self.check_range(index, start, stop)
        if start == stop:
            return
        video, step, side = self.videos[index], self.dataset.frame_step, self.videos[index].size[0]
        frames = self._read_frames(index, video.id)
        preprocess = FramePreprocessor(self.dataset.image_size)
        for position in range(start * step, (stop - 1) * step + 1, step):
            if len(frames[position]) != 3 * side * side:
                raise BrokenVideoError(
                    video.id, f"frame {position} has {len(frames[position])} bytes instead of {side}x{side}x3"
                )
            pixels = np.frombuffer(frames[position], np.uint8).reshape(side, side, 3)
            yield preprocess(av.VideoFrame.from_ndarray(pixels, "rgb24"))

    def _read_frames(self, index: int, video_id: str) -> list[memoryview]:
        path = self.folder / self.files[self._file_of[index]]
        try:
            frames = _frames(read_record(path, Record(*self._records[index].tolist())))
        except RecordError as error:
            raise BrokenVideoError(video_id, f"{path} {error}; fetch it again") from error
        except OSError as error:
            raise BrokenVideoError(video_id, f"{path} cannot be read ({error.strerror})") from error
        if len(frames) != self._native[index]:
            raise BrokenVideoError(
                video_id, f"has {len(frames)} frames, but the first example of {path.name} {self._native[index]}"
            )
        return frames


def _frames(data: memoryview) -> list[memoryview]:
    """The raw frames of an example, in order.

    Raises:
        RecordError: it has none, or not all from 0 on.
    """
    found = {int(match[1]): value for key, value in example_bytes(data) if (match := _KEY.fullmatch(key))}
    if not found:
        raise RecordError("has an example without '0/image_aux1/encoded', which the frames of BAIR are called")
    if (missing := next((number for number in range(len(found)) if number not in found), None)) is not None:
        raise RecordError(f"has an example without frame {missing}")
    return [found[number] for number in range(len(found))]


def _look_at(path: Path, record: Record) -> tuple[int, int]:
    """Number and side of an example's frames."""
    frames = _frames(read_record(path, record))
    side = math.isqrt(len(frames[0]) // 3)
    if side == 0 or 3 * side * side != len(frames[0]):
        raise RecordError(f"has frames of {len(frames[0])} bytes, which are no square RGB picture")
    return len(frames), side


def open_bair(dataset: DatasetConfig, root: Path) -> dict[Split, BairSource]:
    """Index BAIR's TFRecords below `root`, in its folder `softmotion30_44k` or directly.

    The files in `test` are the test split. Of those in `train`, the fraction `dataset.splits.val` (0.006 unless given,
    that is about as many as there are to test on) is held out for validation, by the rule of `rows_by_fractions`. Ids
    are as traj_0_to_255/12, the file and the number of the example in it.

    Raises:
        VideoError: no such folder, no TFRecords in it, two of one name, none that can be used.
    """
    inside = root / FOLDER if (root / FOLDER).is_dir() else root
    if not root.is_dir():
        raise VideoError(f"{root}: there is no such folder; {_WAY_OUT}")
    sources: dict[Split, BairSource] = {}
    for split in ("train", "test"):
        folder = inside / split
        if not folder.is_dir():
            raise VideoError(f"{folder}: there is no such folder, which BAIR's {split} split lies in; {_WAY_OUT}")
        shards = list_shards(folder, EXTENSIONS)
        if not shards.names:
            there = f"only {join_names(sorted(shards.passed_over))}" if shards.passed_over else "nothing"
            raise VideoError(f"{folder}: no .tfrecords in it, {there}; {_WAY_OUT}")
        source = BairSource(dataset, folder, shards.names)
        source.passed_over = shards.passed_over
        if not source.videos:
            reasons = join_names(video.reason for video in source.skipped)
            raise VideoError(f"{folder}: none of its {len(shards.names)} files can be used: {reasons}; {_WAY_OUT}")
        sources[split] = source
    fractions: dict[Split, float] = {"val": float(dataset.splits.get("val", DEFAULT_VAL)), "test": 0.0}
    return split_training(dataset, root, sources, fractions)
