"""Which frames of which videos lie in which chunk of a split."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import NamedTuple, overload

import numpy as np

from latent_cache.errors import StoreError
from latent_cache.schema import CHUNK_BYTES


class Piece(NamedTuple):
    """Frames `start` to `stop` (excluded) of one video; `video` is its row in the split."""

    video: int
    start: int
    stop: int


@dataclass(frozen=True)
class ChunkPlan:
    """One chunk: frames `start` to `stop` (excluded) of the split, and the pieces of videos that fill it.

    `key` digests the pieces' video ids, views and extents. A chunk on disk whose key is unchanged holds what this
    plan wants, however the other videos of the split have changed.
    """

    index: int
    start: int
    stop: int
    pieces: tuple[Piece, ...]
    key: str

    @property
    def frames(self) -> int:
        """Number of frames; the last chunk of a split may have fewer than the others."""
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class SplitPlan:
    """A split's videos, laid end to end and cut into chunks of whole frames.

    Args:
        video_ids: [videos] names; the same name may come with several views.
        video_views: [videos] view of each.
        lengths: [videos] frames of each, >= 1.
        latent_shape: (channels, height, width) of a frame's latent.
        chunk_frames: frames in a chunk, see `default_chunk_frames`.
    Raises:
        StoreError: no videos, one without name or frames, a (name, view) given twice.
        ValueError: lists of unequal length, sizes below 1.
    """

    video_ids: Sequence[str]
    video_views: Sequence[str]
    lengths: Sequence[int] | np.ndarray
    latent_shape: tuple[int, int, int]
    chunk_frames: int
    offsets: np.ndarray = field(init=False, repr=False)  # [videos + 1] int64, first frame of each video

    def __post_init__(self) -> None:
        lengths = np.array(self.lengths, dtype=np.int64)
        set_field = object.__setattr__
        set_field(self, "video_ids", tuple(self.video_ids))
        set_field(self, "video_views", tuple(self.video_views))
        set_field(self, "latent_shape", tuple(int(size) for size in self.latent_shape))
        if not len(self.video_ids) == len(self.video_views) == len(lengths):
            raise ValueError(
                f"{len(self.video_ids)} video ids, {len(self.video_views)} views and {len(lengths)} lengths: "
                "one of each a video is wanted"
            )
        if len(self.latent_shape) != 3 or min(self.latent_shape) < 1:
            raise ValueError(f"latent_shape = {self.latent_shape}: (channels, height, width), each >= 1, is wanted")
        if self.chunk_frames < 1:
            raise ValueError(f"chunk_frames = {self.chunk_frames}: at least 1 is wanted")
        if len(lengths) == 0:
            raise StoreError("the split has no videos: check dataset.root and dataset.splits")
        if not all(self.video_ids) or not all(self.video_views):
            raise StoreError("a video has an empty id or view: name every one")
        if lengths.min() < 1:
            empty = [self.video_ids[row] for row in np.flatnonzero(lengths < 1)[:5]]
            raise StoreError(f"{int((lengths < 1).sum())} video(s) without frames, {empty} first: leave them out")
        times = Counter(zip(self.video_ids, self.video_views, strict=True))
        twice = [pair for pair, count in times.items() if count > 1]
        if twice:
            raise StoreError(f"{len(twice)} (video, view) pair(s) given more than once, {twice[:3]} first: rename them")
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        for name, values in (("lengths", lengths), ("offsets", offsets)):
            values.setflags(write=False)
            set_field(self, name, values)

    @property
    def frames(self) -> int:
        """Frames of all videos together."""
        return int(self.offsets[-1])

    @cached_property
    def chunks(self) -> "Sequence[ChunkPlan]":
        """The chunks in order, each worked out when it is asked for."""
        return _Chunks(self)

    def chunk(self, index: int) -> ChunkPlan:
        """The chunk of that index, 0 <= index < len(self.chunks)."""
        start = index * self.chunk_frames
        stop = min(start + self.chunk_frames, self.frames)
        first, last = np.searchsorted(self.offsets, [start, stop - 1], side="right") - 1
        pieces = tuple(
            Piece(
                video=video,
                start=max(start, int(self.offsets[video])) - int(self.offsets[video]),
                stop=min(stop, int(self.offsets[video + 1])) - int(self.offsets[video]),
            )
            for video in range(first, last + 1)
        )
        named = [(self.video_ids[piece.video], self.video_views[piece.video], *piece[1:]) for piece in pieces]
        key = hashlib.sha256(json.dumps(named).encode()).hexdigest()
        return ChunkPlan(index=index, start=start, stop=stop, pieces=pieces, key=key)


def default_chunk_frames(latent_shape: tuple[int, int, int], frames: int) -> int:
    """Whole fp16 frames in about 8 MiB: 16384 at 4x8x8, 2048 at 8x16x16.

    Args:
        latent_shape: (channels, height, width).
        frames: of the split. A smaller split is one chunk of its own size: a chunk on disk is always full, and a
            few frames should not be padded to 8 MiB.
    Returns:
        At least 1.
    """
    return max(1, min(frames, CHUNK_BYTES // (2 * prod(latent_shape))))


class _Chunks(Sequence[ChunkPlan]):
    """A split's chunks as a sequence that holds none of them."""

    def __init__(self, plan: SplitPlan) -> None:
        self._plan = plan

    def __len__(self) -> int:
        return -(-self._plan.frames // self._plan.chunk_frames)

    @overload
    def __getitem__(self, index: int) -> ChunkPlan: ...
    @overload
    def __getitem__(self, index: slice) -> list[ChunkPlan]: ...
    def __getitem__(self, index: int | slice) -> ChunkPlan | list[ChunkPlan]:
        positions = range(len(self))[index]  # raises IndexError, and resolves negative indices, as lists do
        if isinstance(positions, range):
            return [self._plan.chunk(position) for position in positions]
        return self._plan.chunk(positions)

    def __iter__(self) -> Iterator[ChunkPlan]:
        return (self._plan.chunk(index) for index in range(len(self)))
