"""Shards: files that hold many videos each, listed in a folder, indexed once, and opened for each read."""

import abc
import contextlib
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import av
import numpy as np
from tqdm import tqdm

from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.index import IndexCache
from stage1_autoencoder.videos.names import escaped, join_names, natural_order
from stage1_autoencoder.videos.preprocessing import FramePreprocessor
from stage1_autoencoder.videos.source import (
    BrokenVideoError,
    DivisibleSource,
    SkippedVideo,
    UnreadableVideoError,
    VideoError,
    VideoInfo,
    VideoTable,
)


class ShardError(Exception):
    """A shard, or a video in it, cannot be used; the message has the reason, without the name of the file."""


class ShardSource(DivisibleSource):
    """Videos in shards, with ids <shard>/<video>. A subclass reads one format."""

    extensions: ClassVar[Collection[str]]
    way_out: ClassVar[str]  # what to do about a damaged shard

    def __init__(
        self, dataset: DatasetConfig, folder: Path, files: Sequence[str], cache: IndexCache | None = None
    ) -> None:
        """Index shards; unusable ones are listed in `skipped`.

        Args:
            files: names in `folder`, in the order of the videos.
            cache: entries of videos that were indexed before.
        """
        self.dataset, self.folder, self.files, self.skipped = dataset, folder, files, []
        places: list[Any] = []
        file_of, native = array("i"), array("i")

        def infos() -> Iterator[VideoInfo]:
            # disable=None: no bar unless on a terminal
            for number, name in enumerate(tqdm(files, f"index {folder.name}", leave=False, unit="file", disable=None)):
                path = folder / name
                try:
                    if path.exists() and not path.is_file():  # a pipe would be waited for
                        raise ShardError("is not a regular file")
                    for place, frames, info in self.index_shard(path, cache):
                        places.append(place)
                        file_of.append(number)
                        native.append(frames)
                        yield info
                except (ShardError, OSError) as error:
                    self.skip(escaped(path.stem), error, path)

        self.videos = VideoTable(infos())
        # Per video: what `read_pictures` finds it by, the number of its shard, and frames before `frame_step`.
        self._places = self.pack_places(places)
        self._file_of, self._native = np.array(file_of, np.int32), np.array(native, np.int32)

    @abc.abstractmethod
    def index_shard(self, path: Path, cache: IndexCache | None) -> Iterator[tuple[Any, int, VideoInfo]]:
        """Index the videos of a shard: per video its place in the shard, frames before `frame_step`, and its info.

        Raises:
            ShardError, OSError: the rest of the shard cannot be used.
        """

    @abc.abstractmethod
    def pack_places(self, places: list[Any]) -> np.ndarray:
        """The places of n videos in an array with n rows."""

    @abc.abstractmethod
    def read_pictures(self, path: Path, place: Any, video: VideoInfo, frames: int, wanted: range) -> Iterator[Any]:
        """Read some frames of a video, numbered before `frame_step`.

        Args:
            place: its row of `pack_places`.
            frames: how many it has according to the index.
        Yields:
            [h, w, 3] uint8 RGB arrays.
        Raises:
            ShardError, OSError: the shard or the video is damaged, or contradicts the index.
        """

    def skip(self, video_id: str, error: ShardError | OSError, path: Path) -> None:
        """List an unusable shard or video as skipped."""
        self.skipped.append(SkippedVideo(video_id, f"{_reason(error)} (in {path.name}); {self.way_out}"))

    @property
    def native_frames(self) -> int:
        return int(self._native.sum())

    def select(self, rows: np.ndarray) -> Self:
        source = super().select(rows)
        source._places, source._file_of, source._native = self._places[rows], self._file_of[rows], self._native[rows]
        return source

    def iterate(self, index: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        start, stop = self.check_range(index, start, stop)
        if start == stop:
            return
        video, step = self.videos[index], self.dataset.frame_step
        path = self.folder / self.files[self._file_of[index]]
        wanted = range(start * step, (stop - 1) * step + 1, step)
        preprocess = FramePreprocessor(self.dataset.frame_size, self.dataset.fit)
        pictures = self.read_pictures(path, self._places[index], video, int(self._native[index]), wanted)
        try:
            with contextlib.closing(pictures):
                for pixels in pictures:
                    yield preprocess(av.VideoFrame.from_ndarray(pixels, "rgb24"))
        except OSError as error:
            raise UnreadableVideoError.of(video.id, error, str(path)) from error
        except ShardError as error:
            raise BrokenVideoError(video.id, f"{error} (in {path}); {self.way_out}") from error


def _reason(error: ShardError | OSError) -> str:
    return f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)


Source = TypeVar("Source", bound=ShardSource)


@dataclass(frozen=True)
class ShardFiles:
    """Shards of a folder.

    Attributes:
        names: in natural order; their stems, with which the ids of videos begin, are all different.
        passed_over: number of other files by extension (by name where they have none).
    """

    names: list[str]
    passed_over: dict[str, int]


def list_shards(folder: Path, extensions: Collection[str]) -> ShardFiles:
    """List the files of a folder that have one of the extensions, in lower or upper case; hidden ones are ignored.

    Files of other programs, such as `a.tfrecords.part`, are not shards.

    Raises:
        VideoError: the folder cannot be listed, or two files would give their videos the same ids.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise VideoError(f"{folder}: cannot be listed ({error.strerror})") from error
    names: dict[str, str] = {}
    others: Counter[str] = Counter()
    for path in paths:
        extension = path.suffix.lower()
        if extension not in extensions:
            others[extension or path.name] += 1
        elif (other := names.setdefault(path.stem.casefold(), path.name)) != path.name:
            raise VideoError(
                f"{folder / other} and {path} would both be {path.stem!r}: rename one of them, or remove it"
            )
    listed = list(names.values())
    return ShardFiles([listed[row] for row in natural_order(listed)], dict(others))


def open_shards(
    kind: type[Source],
    dataset: DatasetConfig,
    folders: Mapping[Split, Path],
    way_out: str,
    cache: IndexCache | None = None,
) -> dict[Split, Source]:
    """Index the shards of each split's folder.

    Args:
        way_out: how to get the data, for messages.
    Raises:
        VideoError: a folder that cannot be listed, or has no usable shards.
    """
    sources: dict[Split, Source] = {}
    for split, folder in folders.items():
        shards = list_shards(folder, kind.extensions)
        if not shards.names:
            found = f"only {join_names(sorted(shards.passed_over))}" if shards.passed_over else "nothing"
            expected = " or ".join(sorted(kind.extensions))
            raise VideoError(f"{folder}: contains no {expected} files, {found}; {way_out}")
        source = kind(dataset, folder, shards.names, cache)
        source.passed_over = shards.passed_over
        if not source.videos:
            reasons = join_names(f"{video.id}: {video.reason}" for video in source.skipped) or "all are empty"
            raise VideoError(f"{folder}: no video in its {len(shards.names)} files can be used: {reasons}; {way_out}")
        sources[split] = source
    return sources
