"""Frames of a store encoded again from their videos, and whether what is stored is what comes out."""

import itertools
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from latent_cache import CorruptStoreError, LatentCache
from latent_cache.reading.frame_reader import FrameReader
from pipelines.encoding.store_checks import stored_precision
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.frame_encoder import FrameEncoder, exact_kernels
from stage1_autoencoder.videos.source import BrokenVideoError, VideoSource, VideoTable
from stage1_autoencoder.views import ViewTransform, view_transform

# A frame is wrong when its latents deviate by more than this share of the channels' standard deviation (rms over the
# frame), beyond the rounding of the store's dtype. Measured on the autoencoder of tests/fixtures: fp32 against fp64
# 0.13 % at most, convolutions that round as TF32 does 0.3 %, as bf16 does 1.9 %; another frame or its mirror image
# from 95 %, contrast that is 2 % lower 2 %.
LATENT_TOLERANCE = 0.01
# Where both sides round as bf16 does, each in its own order.
BF16_TOLERANCE = 0.05
# Of squared distances to codes, in units of the squares that they are differences of: fp32 with room.
DISTANCE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class DrawnFrame:
    """A frame of a store: its place in the split, and whose it is."""

    cache: LatentCache
    place: int  # in the split
    row: int
    number: int  # in the video

    @property
    def video(self) -> tuple[str, str]:
        return self.cache.split, self.cache.video_ids[self.row]

    @property
    def view(self) -> str:
        return self.cache.video_views[self.row]

    def __str__(self) -> str:
        reader = self.cache.latent_reader
        file = f"{self.cache.url}/{reader.chunk_key(self.place // reader.chunk_frames)}"
        split, video = self.video
        return f"{split}, video {video!r}, view {self.view}, frame {self.number} ({file})"


@dataclass(frozen=True)
class FrameCheck:
    """What encoding a frame again came to.

    Attributes:
        video: (split, id).
        compared: whether it could be encoded and read.
        bit_equal: latents and codes are the stored ones, to the bit.
        deviation: rms deviation of the latents, in units of what is tolerated: above 1 they are wrong.
        problem: what is wrong, by name; empty when nothing is.
    """

    video: tuple[str, str]
    compared: bool
    bit_equal: bool = False
    deviation: float = 0.0
    problem: str = ""


def draw_frames(caches: Sequence[LatentCache], count: int, seed: int) -> list[DrawnFrame]:
    """Draw frames uniformly from all frames of some splits, without replacement; all where there are not more.

    Returns:
        in the order in which they lie in the store.
    """
    ends = np.cumsum([cache.frames for cache in caches])
    generator = np.random.default_rng([seed, *b"verify"])
    places = np.sort(generator.choice(ends[-1], min(count, int(ends[-1])), replace=False, shuffle=False))
    drawn = []
    for place in places.tolist():
        split = int(np.searchsorted(ends, place, side="right"))
        cache = caches[split]
        place -= int(ends[split]) - cache.frames
        row = int(np.searchsorted(cache.offsets, place, side="right")) - 1
        drawn.append(DrawnFrame(cache, place, row, place - int(cache.offsets[row])))
    return drawn


@dataclass(frozen=True)
class _Fresh:
    """What frames were encoded to now.

    Attributes:
        latents: [..., c, h, w] float32.
        rounded: the same in the dtype of the store, as they would be stored.
        codes: [..., h, w] int64.
    """

    latents: np.ndarray
    rounded: np.ndarray
    codes: np.ndarray


class FrameVerifier:
    """Encodes drawn frames as the encoder of stores does, and compares.

    Args:
        splits: where frames come from.
        device: where the autoencoder is.
    """

    def __init__(
        self,
        caches: Sequence[LatentCache],
        splits: Mapping[str, VideoSource],
        autoencoder: Autoencoder,
        device: torch.device,
    ) -> None:
        self.splits, self.autoencoder = splits, autoencoder
        tables = {split: VideoTable.of(source.videos) for split, source in splits.items()}
        self.rows = {split: {name: row for row, name in enumerate(table.ids)} for split, table in tables.items()}
        self.precision = stored_precision(caches[0].metadata)
        side = next(iter(splits.values())).dataset.image_size
        self.frame_encoder = FrameEncoder(autoencoder, device, side, precision=self.precision)
        self.stored = {cache.split: _Stored(cache) for cache in caches}
        self.dtype = getattr(torch, caches[0].latents.dtype.name)
        self.encoders = len(os.sched_getaffinity(0)) if device.type == "cpu" else 1

    def check(self, drawn: Sequence[DrawnFrame]) -> Iterator[FrameCheck]:
        """Check frames, which are in the order of `draw_frames`; each video is decoded once."""
        with exact_kernels(self.precision):
            yield from self._check(drawn)

    def _check(self, drawn: Sequence[DrawnFrame]) -> Iterator[FrameCheck]:
        threads = torch.get_num_threads()
        # Threads that compute alone, as when the store was written: see `frame_encoder`.
        pool = ThreadPoolExecutor(self.encoders, "verify", initializer=torch.set_num_threads, initargs=(1,))
        try:
            pending: deque[tuple[list[DrawnFrame], Future]] = deque()
            batch: list[tuple[DrawnFrame, np.ndarray, ViewTransform]] = []
            for frame, pixels in self._decode(drawn):
                if isinstance(pixels, BrokenVideoError):
                    problem = f"{frame}: cannot be decoded here, and could be when it was encoded: {pixels.reason}"
                    yield FrameCheck(frame.video, compared=False, problem=problem)
                    continue
                batch.append((frame, pixels, view_transform(frame.view, frame.video[1])))
                if len(batch) == self.frame_encoder.frames:
                    pending.append(self._submit(pool, batch))
                    batch = []
                if len(pending) > 2 * self.encoders:
                    yield from self._compare(*pending.popleft())
            if batch:
                pending.append(self._submit(pool, batch))
            while pending:
                yield from self._compare(*pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)

    def _decode(self, drawn: Sequence[DrawnFrame]) -> Iterator[tuple[DrawnFrame, np.ndarray | BrokenVideoError]]:
        # Views of a video lie side by side, so that one pass over the video serves them all.
        for (split, video_id), group in itertools.groupby(drawn, key=lambda frame: frame.video):
            frames = list(group)
            numbers = sorted({frame.number for frame in frames})
            try:
                pixels = dict(zip(numbers, self.splits[split].read(self.rows[split][video_id], numbers), strict=True))
            except BrokenVideoError as error:
                yield from ((frame, error) for frame in frames)
            else:
                yield from ((frame, pixels[frame.number]) for frame in frames)

    def _submit(
        self, pool: ThreadPoolExecutor, batch: Sequence[tuple[DrawnFrame, np.ndarray, ViewTransform]]
    ) -> tuple[list[DrawnFrame], Future]:
        frames, pixels, views = zip(*batch, strict=True)
        return list(frames), pool.submit(self._encode, np.stack(pixels), views)

    @torch.inference_mode()
    def _encode(self, pixels: np.ndarray, views: Sequence[ViewTransform]) -> _Fresh:
        encoded = self.frame_encoder.encode(pixels, views)
        rounded = self.frame_encoder.rounded(encoded, self.dtype).latents
        return _Fresh(*(values.cpu().numpy() for values in (encoded.latents, rounded, encoded.codes)))

    def _compare(self, frames: Sequence[DrawnFrame], encoding: Future) -> Iterator[FrameCheck]:
        fresh = encoding.result()
        for row, frame in enumerate(frames):
            yield self._compare_frame(frame, _Fresh(fresh.latents[row], fresh.rounded[row], fresh.codes[row]))

    def _compare_frame(self, frame: DrawnFrame, fresh: _Fresh) -> FrameCheck:
        """Compare what one frame was encoded to with what is stored."""
        try:
            stored_latents, stored_codes = self.stored[frame.cache.split].read(frame.place)
        except CorruptStoreError as error:
            return FrameCheck(frame.video, compared=False, problem=f"{frame}: could not be compared: {error}")
        tolerance = BF16_TOLERANCE if self.precision == "bf16" else LATENT_TOLERANCE
        deviation = latent_deviation(fresh.rounded, stored_latents, frame.cache.std, tolerance)
        bad_codes = np.zeros(fresh.codes.shape, bool)
        if stored_codes is not None:
            bad_codes = self._unexplained_codes(fresh, stored_latents, stored_codes)
        equal = fresh.rounded.tobytes() == stored_latents.tobytes()
        equal = equal and (stored_codes is None or np.array_equal(fresh.codes, stored_codes))
        found = []
        if deviation > 1:
            found.append(f"latents deviate {deviation:.3g} times as much as another device explains")
        if bad_codes.any():
            found.append(f"{bad_codes.sum()} of its {bad_codes.size} codes are not the nearest ones of its latents")
        problem = f"{frame}: {' and '.join(found)}" if found else ""
        return FrameCheck(frame.video, compared=True, bit_equal=equal, deviation=deviation, problem=problem)

    def _unexplained_codes(self, fresh: _Fresh, stored_latents: np.ndarray, stored_codes: np.ndarray) -> np.ndarray:
        """[h, w] bool: where the stored code is farther than the latents' deviation explains.

        The store's code s is the nearest of the stored latent z', or of one that z' is the rounding of; for ours, z,
        the nearest is n. By the triangle inequality |z - s| <= |z' - s| + |z - z'| <= |z' - n| + |z - z'| <= |z - n| +
        2 |z - z'|.
        """
        codebook = self.autoencoder.quantizer.codebook.detach().cpu().double().numpy()
        outside = stored_codes >= len(codebook)
        ours = np.moveaxis(fresh.latents, 0, -1).astype(np.float64)
        theirs = np.moveaxis(stored_latents, 0, -1).astype(np.float64)
        rounding = np.finfo(stored_latents.dtype).eps * np.linalg.norm(theirs, axis=-1)
        moved = np.linalg.norm(ours - theirs, axis=-1) + rounding
        theirs_chosen = codebook[np.where(outside, 0, stored_codes)]
        to_stored = np.linalg.norm(ours - theirs_chosen, axis=-1)
        to_nearest = np.linalg.norm(ours - codebook[fresh.codes], axis=-1)
        squares = np.square(ours).sum(-1) + np.square(theirs_chosen).sum(-1)
        allowed = 2 * moved * (to_stored + to_nearest) + DISTANCE_TOLERANCE * squares
        return outside | (to_stored**2 - to_nearest**2 > allowed)


def latent_deviation(
    latents: np.ndarray, stored: np.ndarray, std: np.ndarray, tolerance: float = LATENT_TOLERANCE
) -> float:
    """Rms deviation of a frame's latents, in units of what is tolerated.

    Args:
        latents: [c, h, w] as they came out now.
        stored: [c, h, w] in the dtype of the store.
        std: [c] of the store.
        tolerance: as a share of `std`.
    Returns:
        >= 0; above 1 they are wrong. Infinite where the latents are not finite.
    """
    theirs = stored.astype(np.float64)
    rounding = np.finfo(stored.dtype).eps * np.sqrt(np.square(theirs).mean(axis=(1, 2)))
    # A constant channel of zeros tolerates what a float32 of size 1 does.
    tolerated = tolerance * std + rounding + np.finfo(np.float32).eps
    relative = (latents.astype(np.float64) - theirs) / tolerated[:, None, None]
    deviation = float(np.sqrt(np.square(relative).mean()))
    return deviation if np.isfinite(deviation) else float("inf")


class _Stored:
    """Frames of a split as they are stored, read in ascending order: each chunk is read and checked once."""

    def __init__(self, cache: LatentCache) -> None:
        self._latents = _LastChunk(cache.latent_reader)
        self._codes = None if cache.code_reader is None else _LastChunk(cache.code_reader)

    def read(self, place: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Latents [c, h, w] and codes [h, w] of a frame; None in a store without codes."""
        return self._latents.frame(place), None if self._codes is None else self._codes.frame(place)


class _LastChunk:
    def __init__(self, reader: FrameReader) -> None:
        self._reader = reader
        self._index, self._values = -1, np.empty(0)

    def frame(self, place: int) -> np.ndarray:
        size = self._reader.chunk_frames
        index = place // size
        if index != self._index:
            frames = min(size, self._reader.array.shape[0] - index * size)
            values = np.empty((frames, *self._reader.array.shape[1:]), self._reader.array.dtype)
            self._reader.read_chunk(index, values)
            self._index, self._values = index, values
        return self._values[place - index * size]
