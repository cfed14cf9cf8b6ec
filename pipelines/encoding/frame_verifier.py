"""Encoding frames of a store again from their videos, and comparing the result with what is stored."""

import functools
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
from pipelines.encoding.chunk_encoder import video_rows
from pipelines.encoding.store_checks import stored_precision
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.frame_encoder import FrameEncoder, exact_kernels
from stage1_autoencoder.videos.source import BrokenVideoError, VideoSource
from stage1_autoencoder.views import view_transform

# A frame is wrong when its latents deviate by more than this share of the channels' standard deviation (rms over the
# frame), beyond the rounding of the store's dtype. Measured on the autoencoder of tests/fixtures: fp32 against fp64
# 0.13 % at most, convolutions that round as TF32 does 0.3 %, as bf16 does 1.9 %; another frame or its mirror image
# from 95 %, contrast that is 2 % lower 2 %.
LATENT_TOLERANCE = 0.01
# For stores in bf16, where both sides round, each in its own order.
BF16_TOLERANCE = 0.05
# Of squared distances to codes, relative to the squares they are differences of: a few fp32 roundings.
DISTANCE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class DrawnFrame:
    """A frame of a store.

    Attributes:
        place: in the split.
        row: of its video in the split.
        number: in its video.
    """

    cache: LatentCache
    place: int
    row: int
    number: int

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
    """Result of encoding a frame again.

    Attributes:
        video: (split, id).
        compared: whether it could be encoded and read.
        bit_equal: latents and codes equal the stored ones bit for bit.
        deviation: rms deviation of the latents, in units of the tolerance: above 1 they are wrong.
        problem: what is wrong; empty when nothing is.
    """

    video: tuple[str, str]
    compared: bool
    bit_equal: bool = False
    deviation: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class Encoded:
    """What a frame is encoded to now.

    Attributes:
        latents: [c, h, w] float32.
        rounded: the same in the dtype of the store, as they would be stored.
        codes: [h, w] int64.
    """

    latents: np.ndarray
    rounded: np.ndarray
    codes: np.ndarray


def draw_frames(caches: Sequence[LatentCache], count: int, seed: int) -> list[DrawnFrame]:
    """Draw `count` frames (at most all) uniformly from all frames of some splits, without replacement.

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


class FrameVerifier:
    """Encodes drawn frames as `encode` does, and compares.

    Args:
        splits: videos of each split.
        device: where the autoencoder is.
    """

    def __init__(
        self,
        caches: Sequence[LatentCache],
        splits: Mapping[str, VideoSource],
        autoencoder: Autoencoder,
        device: torch.device,
    ) -> None:
        self.splits, self.rows = splits, video_rows(splits)
        self.codebook = autoencoder.quantizer.codebook.detach().cpu().numpy()
        self.precision = stored_precision(caches[0].metadata)
        frame_size = next(iter(splits.values())).dataset.frame_size
        self.frame_encoder = FrameEncoder(autoencoder, device, frame_size, precision=self.precision)
        self.dtype = getattr(torch, caches[0].latents.dtype.name)
        self.encoders = len(os.sched_getaffinity(0)) if device.type == "cpu" else 1
        # Frames come in the order of the store: each chunk of latents and of codes is read and checked once.
        self.read_chunk = functools.lru_cache(maxsize=2)(_read_chunk)

    def check(self, drawn: Sequence[DrawnFrame]) -> Iterator[FrameCheck]:
        """Check frames in the order of `draw_frames`. Each video is decoded once; few frames are held at a time."""
        threads = torch.get_num_threads()
        # Each thread computes alone, as when the store was written: see `frame_encoder`.
        pool = ThreadPoolExecutor(self.encoders, "verify", initializer=torch.set_num_threads, initargs=(1,))
        broken: list[FrameCheck] = []
        decoded = self._decode(drawn, broken)
        pending: deque[tuple[list[DrawnFrame], Future[list[Encoded]]]] = deque()
        try:
            with exact_kernels(self.precision):
                while batch := list(itertools.islice(decoded, self.frame_encoder.frames)):
                    frames, pixels = zip(*batch, strict=True)
                    pending.append((frames, pool.submit(self._encode, frames, np.stack(pixels))))
                    if len(pending) > 2 * self.encoders:
                        yield from self._compare(*pending.popleft())
                while pending:
                    yield from self._compare(*pending.popleft())
            yield from broken
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)

    def _decode(self, drawn: Sequence[DrawnFrame], broken: list[FrameCheck]) -> Iterator[tuple[DrawnFrame, np.ndarray]]:
        """Frames with their pixels; those that cannot be decoded are appended to `broken`."""
        # Views of a video are adjacent, so that one pass over the video serves them all.
        for (split, video_id), group in itertools.groupby(drawn, key=lambda frame: frame.video):
            frames = list(group)
            numbers = sorted({frame.number for frame in frames})
            try:
                pixels = dict(zip(numbers, self.splits[split].read(self.rows[split][video_id], numbers), strict=True))
            except BrokenVideoError as error:
                problem = f"cannot be decoded here, though it was encoded: {error.reason}"
                broken += [FrameCheck(frame.video, compared=False, problem=f"{frame}: {problem}") for frame in frames]
            else:
                yield from ((frame, pixels[frame.number]) for frame in frames)

    @torch.inference_mode()
    def _encode(self, frames: Sequence[DrawnFrame], pixels: np.ndarray) -> list[Encoded]:
        encoded = self.frame_encoder.encode(pixels, [view_transform(frame.view, frame.video[1]) for frame in frames])
        rounded = self.frame_encoder.rounded(encoded, self.dtype).latents
        arrays = (values.cpu().numpy() for values in (encoded.latents, rounded, encoded.codes))
        return [Encoded(*values) for _, *values in zip(frames, *arrays, strict=False)]  # padding has no frame

    def _compare(self, frames: Sequence[DrawnFrame], encoding: Future[list[Encoded]]) -> Iterator[FrameCheck]:
        return map(self._compare_frame, frames, encoding.result())

    def _compare_frame(self, frame: DrawnFrame, fresh: Encoded) -> FrameCheck:
        cache, codes = frame.cache, None
        try:
            latents = self._stored(cache.latent_reader, frame.place)
            if cache.code_reader is not None:
                codes = self._stored(cache.code_reader, frame.place)
        except CorruptStoreError as error:
            return FrameCheck(frame.video, compared=False, problem=f"{frame}: could not be compared: {error}")
        tolerance = BF16_TOLERANCE if self.precision == "bf16" else LATENT_TOLERANCE
        deviation = latent_deviation(fresh.rounded, latents, cache.std, tolerance)
        bad_codes = np.zeros(0, bool) if codes is None else unexplained_codes(fresh, latents, codes, self.codebook)
        equal = fresh.rounded.tobytes() == latents.tobytes() and (codes is None or np.array_equal(fresh.codes, codes))
        found = []
        if deviation > 1:
            found.append(f"latents deviate {deviation:.3g} times as much as another device explains")
        if bad_codes.any():
            found.append(f"{bad_codes.sum()} of its {bad_codes.size} codes are not the nearest ones of its latents")
        problem = f"{frame}: {' and '.join(found)}" if found else ""
        return FrameCheck(frame.video, compared=True, bit_equal=equal, deviation=deviation, problem=problem)

    def _stored(self, reader: FrameReader, place: int) -> np.ndarray:
        index, row = divmod(place, reader.chunk_frames)
        return self.read_chunk(reader, index)[row]


def _read_chunk(reader: FrameReader, index: int) -> np.ndarray:
    """All frames of a chunk. Raises CorruptStoreError when it is missing or damaged."""
    start = index * reader.chunk_frames
    frames = min(reader.chunk_frames, reader.array.shape[0] - start)
    values = np.empty((frames, *reader.array.shape[1:]), reader.array.dtype)
    reader.read_chunk(index, values)
    return values


def unexplained_codes(
    fresh: Encoded, stored_latents: np.ndarray, stored_codes: np.ndarray, codebook: np.ndarray
) -> np.ndarray:
    """Positions of a frame whose stored code is farther away than the deviation of the latents explains.

    The stored code s is the nearest code of the stored latent z', or of one that z' is the rounding of; the nearest
    code of our latent z is n. By the triangle inequality |z - s| <= |z' - s| + |z - z'| <= |z' - n| + |z - z'| <=
    |z - n| + 2 |z - z'|.

    Args:
        stored_latents: [c, h, w].
        stored_codes: [h, w].
        codebook: [codes, c].
    Returns:
        [h, w] bool.
    """
    codebook = codebook.astype(np.float64)
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
    """Rms deviation of a frame's latents, in units of the tolerance.

    Args:
        latents: [c, h, w] as encoded now.
        stored: [c, h, w] in the dtype of the store.
        std: [c] of the store.
        tolerance: as a share of `std`.
    Returns:
        >= 0; above 1 they are wrong. Infinite when the latents are not finite.
    """
    theirs = stored.astype(np.float64)
    rounding = np.finfo(stored.dtype).eps * np.sqrt(np.square(theirs).mean(axis=(1, 2)))
    # A constant channel of zeros tolerates what a float32 of size 1 does.
    tolerated = tolerance * std + rounding + np.finfo(np.float32).eps
    relative = (latents.astype(np.float64) - theirs) / tolerated[:, None, None]
    deviation = float(np.sqrt(np.square(relative).mean()))
    return deviation if np.isfinite(deviation) else float("inf")
