"""Assignment of frames and videos to the files of a split."""

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
from latent_cache.schema import CHUNK_BYTES, MOST_FILES, SHARD_CHUNKS


class Piece(NamedTuple):
    """Frames `start` to `stop` (excluded) of one video; `video` is its row in the split."""

    video: int
    start: int
    stop: int


@dataclass(frozen=True)
class ChunkPlan:
    """One file of the store: frames `start` to `stop` (excluded) of the split, and the pieces of videos that fill it.

    The file is a chunk, or a shard of several chunks. `video_ids` and `video_views` name the pieces, so a chunk can be
    encoded without the plan of the split. `key` is a digest of the pieces' ids, views, fingerprints and frame ranges:
    if it is unchanged, the chunk on disk is the planned one, however other videos of the split have changed.
    """

    index: int
    start: int
    stop: int
    pieces: tuple[Piece, ...]
    video_ids: tuple[str, ...]
    video_views: tuple[str, ...]
    key: str

    @property
    def frames(self) -> int:
        """Number of frames; the last chunk of a split may have fewer than the others."""
        return self.stop - self.start

    def videos_of(self, frames: np.ndarray) -> list[str]:
        """Ids of the videos that contain the given frames of the chunk, counted from its start; each once, in order."""
        ends = np.cumsum([piece.stop - piece.start for piece in self.pieces])
        return list(dict.fromkeys(self.video_ids[row] for row in np.searchsorted(ends, frames, side="right")))


@dataclass(frozen=True, eq=False)
class SplitPlan:
    """A split's videos, one after another, divided into chunks of whole frames.

    Args:
        video_ids: [videos] names; a name may occur with several views.
        video_views: [videos] view of each video.
        lengths: [videos] number of frames, >= 1.
        latent_shape: (channels, height, width) of a frame's latent.
        chunk_frames: frames per chunk, see `default_chunk_frames`.
        fingerprints: [videos] fingerprints of the source videos; a chunk is written again when one of its videos has
            changed. None: changes of the sources are not detected.
        fps: [videos] frames per second, after the frame step; None: all videos have the store's rate.
        sizes: [videos, 2] width and height of the source videos, 0 where unknown; None: all are unknown.
        shard_chunks: chunks per file, see `default_shard_chunks`.
    Raises:
        StoreError: no videos, a video without name or frames, a repeated (name, view).
        ValueError: lists of different lengths, sizes below 1.
    """

    video_ids: Sequence[str]
    video_views: Sequence[str]
    lengths: Sequence[int] | np.ndarray
    latent_shape: tuple[int, int, int]
    chunk_frames: int
    fingerprints: Sequence[str] | None = None
    fps: Sequence[float] | np.ndarray | None = None
    sizes: Sequence[tuple[int, int]] | np.ndarray | None = None
    shard_chunks: int = 1
    offsets: np.ndarray = field(init=False, repr=False)  # [videos + 1] int64, first frame of each video

    def __post_init__(self) -> None:
        lengths = np.array(self.lengths, dtype=np.int64)
        set_field = object.__setattr__
        set_field(self, "video_ids", tuple(self.video_ids))
        set_field(self, "video_views", tuple(self.video_views))
        set_field(self, "latent_shape", tuple(int(size) for size in self.latent_shape))
        set_field(self, "fingerprints", tuple(self.fingerprints or [""] * len(self.video_ids)))
        if not len(self.video_ids) == len(self.video_views) == len(self.fingerprints) == len(lengths):
            raise ValueError(
                f"{len(self.video_ids)} video ids, {len(self.video_views)} views, {len(self.fingerprints)} "
                f"fingerprints and {len(lengths)} lengths: expected one of each per video"
            )
        for name, values, shape in (("fps", self.fps, ()), ("sizes", self.sizes, (2,))):
            if values is not None and np.shape(values) != (len(lengths), *shape):
                raise ValueError(f"{name} has shape {np.shape(values)}: expected {(len(lengths), *shape)}")
        if len(self.latent_shape) != 3 or min(self.latent_shape) < 1:
            raise ValueError(f"latent_shape = {self.latent_shape}: expected (channels, height, width), each >= 1")
        if self.chunk_frames < 1 or self.shard_chunks < 1:
            raise ValueError(
                f"chunk_frames = {self.chunk_frames}, shard_chunks = {self.shard_chunks}: expected at least 1"
            )
        if len(lengths) == 0:
            raise StoreError("the split has no videos: check dataset.root and dataset.splits")
        if not all(self.video_ids) or not all(self.video_views):
            raise StoreError("a video has an empty id or view: every video needs a name")
        if lengths.min() < 1:
            empty = [self.video_ids[row] for row in np.flatnonzero(lengths < 1)[:5]]
            raise StoreError(f"{int((lengths < 1).sum())} video(s) without frames, first {empty}: exclude them")
        times = Counter(zip(self.video_ids, self.video_views, strict=True))
        twice = [pair for pair, count in times.items() if count > 1]
        if twice:
            raise StoreError(f"{len(twice)} (video, view) pair(s) given more than once, first {twice[:3]}: rename them")
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        for name, values in (("lengths", lengths), ("offsets", offsets)):
            values.setflags(write=False)
            set_field(self, name, values)

    @property
    def frames(self) -> int:
        """Frames of all videos together."""
        return int(self.offsets[-1])

    @property
    def file_frames(self) -> int:
        """Frames per file: of a chunk, or of a shard."""
        return self.chunk_frames * self.shard_chunks

    @cached_property
    def chunks(self) -> "Sequence[ChunkPlan]":
        """The chunks in order, each computed on demand."""
        return _Chunks(self)

    def chunk(self, index: int) -> ChunkPlan:
        """The chunk with this index, 0 <= index < len(self.chunks)."""
        start = index * self.file_frames
        stop = min(start + self.file_frames, self.frames)
        first, last = np.searchsorted(self.offsets, [start, stop - 1], side="right") - 1
        pieces = tuple(
            Piece(
                video=video,
                start=max(start, int(self.offsets[video])) - int(self.offsets[video]),
                stop=min(stop, int(self.offsets[video + 1])) - int(self.offsets[video]),
            )
            for video in range(first, last + 1)
        )
        rows = range(first, last + 1)
        ids, views = tuple(self.video_ids[row] for row in rows), tuple(self.video_views[row] for row in rows)
        prints = (self.fingerprints[row] for row in rows)
        named = [(*names, *piece[1:]) for *names, piece in zip(ids, views, prints, pieces, strict=True)]
        key = hashlib.sha256(json.dumps(named).encode()).hexdigest()
        return ChunkPlan(index=index, start=start, stop=stop, pieces=pieces, video_ids=ids, video_views=views, key=key)


def default_chunk_frames(latent_shape: tuple[int, int, int], frames: int) -> int:
    """Whole fp16 frames in about 8 MiB: 16384 at 4x8x8, 2048 at 8x16x16.

    Args:
        latent_shape: (channels, height, width).
        frames: frames of the split. A smaller split is one chunk of its own size: chunks on disk are always full, and
            a few frames should not be padded to 8 MiB.
    Returns:
        At least 1.
    """
    return max(1, min(frames, CHUNK_BYTES // (2 * prod(latent_shape))))


def default_shard_chunks(frames: int, chunk_frames: int) -> int:
    """Chunks per file: 1, or 8 for a split of more than 5000 chunks."""
    return SHARD_CHUNKS if frames > MOST_FILES * chunk_frames else 1


class _Chunks(Sequence[ChunkPlan]):
    """A split's chunks as a sequence that stores none of them."""

    def __init__(self, plan: SplitPlan) -> None:
        self._plan = plan

    def __len__(self) -> int:
        return -(-self._plan.frames // self._plan.file_frames)

    @overload
    def __getitem__(self, index: int) -> ChunkPlan: ...
    @overload
    def __getitem__(self, index: slice) -> list[ChunkPlan]: ...
    def __getitem__(self, index: int | slice) -> ChunkPlan | list[ChunkPlan]:
        positions = range(len(self))[index]  # raises IndexError and resolves negative indices like a list
        if isinstance(positions, range):
            return [self._plan.chunk(position) for position in positions]
        return self._plan.chunk(positions)

    def __iter__(self) -> Iterator[ChunkPlan]:
        return (self._plan.chunk(index) for index in range(len(self)))
