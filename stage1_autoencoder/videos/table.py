"""The videos of a split in columns: some hundred bytes a video, so that a million of them fit beside the rest."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

from stage1_autoencoder.videos.base import VideoInfo


class VideoTable(Sequence[VideoInfo]):
    """A sequence of `VideoInfo`, each made when it is asked for.

    Attributes:
        ids, fingerprints: a text a video.
        frames: [n] int64, after `frame_step`.
    """

    ids: list[str]
    fingerprints: list[str]
    frames: np.ndarray

    def __init__(self, videos: Iterable[VideoInfo] = ()) -> None:
        """Take videos from any stream, one at a time."""
        self.ids, self.fingerprints = [], []
        frames, fps, sizes = array("q"), array("d"), array("i")
        for video in videos:
            self.ids.append(video.id)
            self.fingerprints.append(video.fingerprint)
            frames.append(video.frames)
            fps.append(video.fps)
            sizes.extend(video.size or (0, 0))
        self.frames = np.frombuffer(frames, np.int64) if frames else np.empty(0, np.int64)
        self._fps = np.frombuffer(fps, np.float64) if fps else np.empty(0, np.float64)
        self._sizes = np.frombuffer(sizes, np.int32).reshape(-1, 2) if sizes else np.empty((0, 2), np.int32)

    @classmethod
    def of(cls, videos: Sequence[VideoInfo]) -> "VideoTable":
        """The same videos as a table; a table is taken as it is."""
        return videos if isinstance(videos, cls) else cls(videos)

    def select(self, rows: np.ndarray) -> "VideoTable":
        """Some of the videos, by their positions [m] int64."""
        table = VideoTable()
        table.ids = [self.ids[row] for row in rows.tolist()]
        table.fingerprints = [self.fingerprints[row] for row in rows.tolist()]
        table.frames, table._fps, table._sizes = self.frames[rows], self._fps[rows], self._sizes[rows]
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
        video_id = self.ids[index]  # IndexError comes from here, by which iteration ends
        width, height = self._sizes[index].tolist()
        return VideoInfo(
            id=video_id,
            frames=int(self.frames[index]),
            fps=float(self._fps[index]),
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
