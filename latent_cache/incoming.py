"""Checks of what a writer is given, before any of it reaches the disk."""

from typing import Any

import numpy as np

from latent_cache.chunks import all_finite, some_names
from latent_cache.errors import StoreError
from latent_cache.plan import ChunkPlan


def stored_latents(
    latents: np.ndarray, dtype: np.dtype[Any], shape: tuple[int, ...], chunk: ChunkPlan, where: str
) -> np.ndarray:
    """Latents in the dtype of the store.

    Args:
        latents: [chunk.frames, c, h, w] float.
        dtype: float16 or float32.
        shape: (c, h, w) of the store.
        where: path of the split, for messages.
    Returns:
        The same, contiguous, rounded to `dtype`, all finite.
    Raises:
        StoreError: NaN, infinity, or values beyond the dtype's range; names the videos.
        ValueError: another shape, or no floats.
    """
    expected = (chunk.frames, *shape)
    if latents.shape != expected or latents.dtype.kind != "f":
        raise ValueError(f"latents {latents.dtype}{list(latents.shape)}: floats {list(expected)} are wanted")
    with np.errstate(over="ignore"):  # the check below speaks of it, and names the video
        stored = np.ascontiguousarray(latents, dtype=dtype)
    if all_finite(stored):
        return stored

    wrong = ~np.isfinite(stored)
    value = latents[wrong][0]
    overflows = bool(np.isfinite(value))
    frames = np.flatnonzero(wrong.any(axis=(1, 2, 3)))
    what = f"{value} does not fit {dtype.name}" if overflows else f"they hold {value}"
    raise StoreError(
        f"{where}: latents are refused, {what}, in {len(frames)} frame(s) of {some_names(chunk.videos_of(frames))}: "
        "check these videos and the autoencoder" + (", or set cache.dtype to float32" if overflows else "")
    )


def checked_codes(codes: np.ndarray, shape: tuple[int, ...], chunk: ChunkPlan) -> np.ndarray:
    """Codes as uint16.

    Args:
        codes: [chunk.frames, h, w] integer in 0..65535.
        shape: (h, w) of the store.
    Raises:
        ValueError: another shape, type or range.
    """
    expected = (chunk.frames, *shape)
    if codes.shape != expected or codes.dtype.kind not in "iu":
        raise ValueError(f"codes {codes.dtype}{list(codes.shape)}: integers {list(expected)} are wanted")
    largest = np.iinfo(np.uint16).max
    if codes.dtype != np.uint16 and (codes.min() < 0 or codes.max() > largest):
        raise ValueError(f"codes from {codes.min()} to {codes.max()}: 0 to {largest} can be stored")
    return codes.astype(np.uint16, copy=False)
