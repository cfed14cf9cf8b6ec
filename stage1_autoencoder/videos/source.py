"""The interface of all video sources, its results and its errors."""

import abc
import copy
import errno
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Self, overload

import numpy as np

from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.preprocessing import preprocessing_description

# For videos without a frame rate; it only sets the speed at which previews play.
UNKNOWN_FPS = 10.0

# Rates of headers outside of this range are mistakes, and would make few frames of many or many of few.
SLOWEST_FPS, FASTEST_FPS = 0.1, 100_000.0

# Of a picture or a frame: 8192x8192, or 200 MB of RGB. A file of a few kilobytes can claim any size.
MOST_PIXELS = 2**26

# Pauses before further attempts to read a video, after errors that may pass.
RETRY_SECONDS = (0.1, 1.0, 4.0)
# Errors that stay until somebody changes a file, a permission or a mount.
_LASTING = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP})

# Opening a file again costs about as much as decoding this many small frames.
MIN_SKIPPED = 64


def plausible_rate(claimed: float) -> float:
    """A frame rate as a file claims it, or `UNKNOWN_FPS` where no video has it."""
    return claimed if SLOWEST_FPS <= claimed <= FASTEST_FPS else UNKNOWN_FPS


class VideoError(Exception):
    """The user's videos cannot be used; the message says which, why, and the way out."""


class BrokenVideoError(VideoError):
    """One video cannot be decoded up to the number of frames in the index.

    Attributes:
        video_id: the id of the video in its split.
        reason: what went wrong, without the id.
    """

    def __init__(self, video_id: str, reason: str) -> None:
        super().__init__(video_id, reason)  # both arguments, so that the error can be sent between processes
        self.video_id = video_id
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.video_id}: {self.reason}"


class UnreadableVideoError(BrokenVideoError):
    """The file system or the network does not give a video's bytes: no verdict on them, and another time it may.

    Attributes:
        may_pass: whether it may go better in a moment.
    """

    def __init__(self, video_id: str, reason: str, may_pass: bool = True) -> None:
        super().__init__(video_id, reason)
        self.args = (video_id, reason, may_pass)
        self.may_pass = may_pass

    @classmethod
    def of(cls, video_id: str, error: OSError, name: str = "") -> Self:
        """From an error of the system.

        Args:
            name: of the file in the video that the error is about.
        """
        reason = f"{name} cannot be read ({os.strerror(error.errno or 0)})".lstrip()
        return cls(video_id, reason, error.errno not in _LASTING)


def is_of_the_system(error: BaseException) -> bool:
    """Whether an error is one of the file system or the network; libraries raise numberless ones for damaged bytes."""
    return isinstance(error, OSError) and bool(error.errno)


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """One video of a split.

    Attributes:
        id: unique in its split.
        frames: number of frames after resampling and `frame_step`, at least 1.
        fps: frames per second after resampling and `frame_step`.
        fingerprint: changes with the content, but not with path or time stamps: a digest of the file's bytes (of a
            frame folder see `index.digest`), with start and stop if it is cut (see `index_videos` for `stops`); of a
            drawn video, its settings.
        size: native (width, height) in pixels; None if frames are drawn at the requested size.
    """

    id: str
    frames: int
    fps: float
    fingerprint: str
    size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Recording:
    """What was filmed in one go. Videos that were cut from it are alike, and no independent evidence of anything.

    Attributes:
        name: unique in its split.
        person: who was filmed; None where the data set does not say.
    """

    name: str
    person: str | None = None


@dataclass(frozen=True, slots=True)
class SkippedVideo:
    """A video that exists but cannot be used, and the reason."""

    id: str
    reason: str


class VideoSource(abc.ABC):
    """One split of a data set: its videos and their frames.

    Sources hold no open files, so they can be pickled and used by many threads and processes at once.

    Attributes:
        dataset: settings of the frames.
        videos: the usable videos, in natural order of their ids; a `VideoTable` if there may be many.
        skipped: the unusable ones.
        passed_over: number of files that are not videos, by extension; counted once, in the first split.
        action_size: values of an action of a robot, of which each frame has one; 0: there are none.
    """

    dataset: DatasetConfig
    videos: Sequence[VideoInfo]
    skipped: Sequence[SkippedVideo]
    passed_over: Mapping[str, int] = MappingProxyType({})
    action_size: int = 0

    @abc.abstractmethod
    def iterate(self, index: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Stream frames start..stop-1 of a video, in order, without holding the whole video in memory.

        Args:
            index: which of `videos`.
            start: first frame, counted after `frame_step`.
            stop: one past the last frame; None for the end of the video.
        Yields:
            [h, w, 3] uint8 RGB with (h, w) = `dataset.frame_size`, each an array of its own.
        Raises:
            IndexError: a range outside the video, when the first frame is requested.
            BrokenVideoError: decoding fails, or ends before the last frame of the index.
        """

    def read(self, index: int, positions: Sequence[int] | None = None) -> np.ndarray:
        """Read some frames of a video, decoding no further than the last of them, and skipping from one to the next.

        Args:
            index: which of `videos`.
            positions: frame numbers in any order, possibly repeated; None for all frames.
        Returns:
            [n, h, w, 3] uint8 RGB with (h, w) = `dataset.frame_size`, in the order of `positions`.
        Raises:
            IndexError: a position outside the video.
            BrokenVideoError: as in `iterate`.
        """
        if positions is None:
            positions = range(self.videos[index].frames)
        frames = np.empty((len(positions), *self.dataset.frame_size, 3), np.uint8)
        if len(positions) == 0:
            return frames
        wanted: dict[int, list[int]] = {}
        for row, position in enumerate(positions):
            wanted.setdefault(int(position), []).append(row)
        for part in self._parts(index, np.array(sorted(wanted))):
            first, last = part[[0, -1]].tolist()
            for position, frame in enumerate(self.iterate(index, first, last + 1), start=first):
                for row in wanted.get(position, ()):
                    frames[row] = frame
        return frames

    def actions(self, index: int) -> np.ndarray:
        """Actions [frames, action_size] float32 of the frames of a video. Raises BrokenVideoError."""
        return np.empty((self.videos[index].frames, self.action_size), np.float32)

    def restarts(self, index: int) -> np.ndarray:
        """Frames [n] int64 of a video, ascending, before which nothing is decoded if reading starts there."""
        return np.empty(0, np.int64)

    def _parts(self, index: int, positions: np.ndarray) -> list[np.ndarray]:
        """Cut ascending positions where starting again skips frames that would be decoded for nothing."""
        restarts = self.restarts(index)
        before = np.searchsorted(restarts, positions[1:], side="right") - 1
        gaps = np.where(before < 0, 0, np.append(restarts, 0)[before] - positions[:-1])
        return np.split(positions, np.flatnonzero(gaps > MIN_SKIPPED) + 1)

    def check_range(self, index: int, start: int, stop: int | None) -> tuple[int, int]:
        """Resolve a range of frames of a video to (start, stop).

        Raises:
            IndexError: it does not lie inside the video.
        """
        video = self.videos[index]
        stop = video.frames if stop is None else stop
        if not 0 <= start <= stop <= video.frames:
            raise IndexError(f"frames {start}..{stop} of {video.id}, which has {video.frames}")
        return start, stop

    def recording(self, index: int) -> Recording:
        """The recording that a video is, or was cut from."""
        return Recording(self.videos[index].id)

    @property
    def native_frames(self) -> int | None:
        """Total number of frames before `frame_step`; None if unknown."""
        return None

    @property
    def fingerprint(self) -> str:
        """sha256 (hexadecimal) over all videos and the preprocessing: equal if and only if the frames are."""
        # The digest of one JSON document, {"preprocessing": ..., "videos": [...]}, which is never built as a whole.
        described = json.dumps({"preprocessing": preprocessing_description(self.dataset)}, sort_keys=True)
        digest = hashlib.sha256(f'{described[:-1]}, "videos": ['.encode())
        for number, video in enumerate(self.videos):
            digest.update(f"{', ' if number else ''}{json.dumps(asdict(video), sort_keys=True)}".encode())
        digest.update(b"]}")
        return digest.hexdigest()


class VideoTable(Sequence[VideoInfo]):
    """A sequence of `VideoInfo` stored in columns; items are made on access.

    Attributes:
        ids, fingerprints: one string per video.
        frames: [n] int64, after `frame_step`.
        fps: [n] float64, after `frame_step`.
        sizes: [n, 2] int32, native width and height; 0 where frames are drawn at the requested size.
    """

    ids: list[str]
    fingerprints: list[str]
    frames: np.ndarray
    fps: np.ndarray
    sizes: np.ndarray

    def __init__(self, videos: Iterable[VideoInfo] = ()) -> None:
        """Consume a stream of videos, one at a time."""
        self.ids, self.fingerprints = [], []
        frames, fps, sizes = array("q"), array("d"), array("i")
        for video in videos:
            self.ids.append(video.id)
            self.fingerprints.append(video.fingerprint)
            frames.append(video.frames)
            fps.append(video.fps)
            sizes.extend(video.size or (0, 0))
        self.frames = np.frombuffer(frames, np.int64) if frames else np.empty(0, np.int64)
        self.fps = np.frombuffer(fps, np.float64) if fps else np.empty(0, np.float64)
        self.sizes = np.frombuffer(sizes, np.int32).reshape(-1, 2) if sizes else np.empty((0, 2), np.int32)

    @classmethod
    def of(cls, videos: Sequence[VideoInfo]) -> "VideoTable":
        """The same videos as a table; a table is returned as it is."""
        return videos if isinstance(videos, cls) else cls(videos)

    def select(self, rows: np.ndarray) -> "VideoTable":
        """Some of the videos, by their positions [m] int64."""
        table = VideoTable()
        table.ids = [self.ids[row] for row in rows.tolist()]
        table.fingerprints = [self.fingerprints[row] for row in rows.tolist()]
        table.frames, table.fps, table.sizes = self.frames[rows], self.fps[rows], self.sizes[rows]
        return table

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> VideoInfo: ...

    @overload
    def __getitem__(self, index: slice) -> list[VideoInfo]: ...

    def __getitem__(self, index: int | slice) -> VideoInfo | list[VideoInfo]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        video_id = self.ids[index]  # raises the IndexError that ends iteration
        width, height = self.sizes[index].tolist()
        return VideoInfo(
            id=video_id,
            frames=int(self.frames[index]),
            fps=float(self.fps[index]),
            fingerprint=self.fingerprints[index],
            size=(width, height) if width else None,
        )

    def __iter__(self) -> Iterator[VideoInfo]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None


class DivisibleSource(VideoSource):
    """A source of stored videos, of which some can be selected."""

    videos: VideoTable

    def select(self, rows: np.ndarray) -> Self:
        """A source of some of the videos, by their positions [m] int64; it skips and passes over nothing."""
        source = copy.copy(self)
        source.videos, source.skipped, source.passed_over = self.videos.select(rows), [], {}
        return source
