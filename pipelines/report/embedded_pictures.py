"""Pictures of the page: frames read back from the pictures of a run, and embedded as WebP within a budget."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from pipelines.prediction.pictures import BORDER, LABEL_HEIGHT, LAST_FRAME_MS, TILE_MARGINS, enlargement

# Largest side of an embedded frame.
MAX_SIDE = 256
# WebP's own limit is 16383; phones have difficulties below it.
MAX_SHEET_WIDTH = 12_000
# Options of WebP, the best quality first; `quality` of a lossless picture is effort.
QUALITIES = ({"lossless": True, "quality": 60}, *({"quality": quality} for quality in (92, 80, 60, 35)))


def read_clip(path: Path, side: int, length: int) -> list[np.ndarray]:
    """The strips of a clip's GIF as `save_gif` wrote an `animation` of one clip.

    Of the pictures that `sample` writes, GIFs are nearest to the frames: 256 colors, but no blur between neighbors.

    Args:
        side: of the frames, before they were enlarged.
        length: frames of the clip.
    Returns:
        Per strip (truth, prediction, further samples) [length, side, side, 3] uint8.
    Raises:
        ValueError: no GIF, or none of strips of this side and length.
    """
    try:
        with Image.open(path) as image:
            shown = [(np.asarray(f.convert("RGB")), f.info["duration"]) for f in ImageSequence.Iterator(image)]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a readable GIF: {error}") from None
    frames = _with_repeats(shown, length)
    scale, (above, beside) = enlargement(side), TILE_MARGINS
    cell, top = side * scale + 2 * BORDER, above + LABEL_HEIGHT + BORDER
    strips, rest = divmod(frames.shape[2] - 2 * beside, cell)
    if len(frames) != length or frames.shape[1] != 2 * above + LABEL_HEIGHT + cell or rest or strips < 2:
        raise ValueError(
            f"{path}: expected {length} frames of clips of {side} pixels a side, not {len(frames)} frames of "
            f"{frames.shape[2]}x{frames.shape[1]} pixels; `make sample` writes them again"
        )
    lefts = [beside + BORDER + number * cell for number in range(strips)]
    return [frames[:, top : top + side * scale : scale, left : left + side * scale : scale] for left in lefts]


def _with_repeats(shown: list[tuple[np.ndarray, int]], length: int) -> np.ndarray:
    """[n, h, w, 3] frames of a GIF in which equal neighbors became one that is shown for longer.

    Args:
        shown: pixels and milliseconds of each; the last one rests for `LAST_FRAME_MS`.
    """
    frames, durations = np.stack([pixels for pixels, _ in shown]), np.array([duration for _, duration in shown], float)
    if len(frames) == length or length < 2:
        return frames
    one = max(1.0, (durations.sum() - LAST_FRAME_MS) / (length - 1))
    durations[-1] -= LAST_FRAME_MS - one
    return np.repeat(frames, (durations / one).round().astype(int).clip(1, length), axis=0)


def fitting_divisor(side: int) -> int:
    """The smallest divisor of a side that leaves at most `MAX_SIDE` pixels."""
    return next(part for part in range(1, side + 1) if side % part == 0 and side // part <= MAX_SIDE)


def shrunk(video: np.ndarray) -> np.ndarray:
    """[n, side, side, 3] uint8 made smaller by `fitting_divisor`, by means over blocks."""
    divisor = fitting_divisor(video.shape[1])
    return np.stack([np.asarray(Image.fromarray(frame).reduce(divisor)) for frame in video])


def fitting_frames(length: int, side: int) -> np.ndarray:
    """Indices of the frames of a video, regularly chosen, that fit side by side onto a sheet."""
    shown = min(length, MAX_SHEET_WIDTH // (side // fitting_divisor(side)))
    return np.unique(np.linspace(0, length - 1, shown).round().astype(int))


def sheet(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Videos [n, h, w, 3] as one picture: a row per video, a column per frame."""
    return np.concatenate([np.concatenate(list(video), axis=1) for video in rows], axis=0)


def encode_all(pictures: Sequence[np.ndarray], budget: int) -> list[str]:
    """Pictures [h, w, 3] as `data:` URLs of WebP, in the best quality in which all fit.

    Args:
        budget: bytes for all of them together; as base64 they take a third more.
    Raises:
        ValueError: they do not fit in any quality.
    """
    for options in QUALITIES:
        encoded: list[bytes] = []
        for picture in pictures:
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "WEBP", method=4, **options)
            encoded.append(file.getvalue())
            if sum(map(len, encoded)) > budget:
                break
        else:
            return [f"data:image/webp;base64,{base64.b64encode(picture).decode()}" for picture in encoded]
    raise ValueError(f"pictures do not fit into {budget} bytes in any quality")
