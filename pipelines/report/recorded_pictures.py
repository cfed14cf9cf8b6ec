"""Frames, taken back out of the pictures that `sample` and the autoencoder's training wrote."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from pipelines.prediction.pictures import (
    BORDER,
    LABEL_HEIGHT,
    LAST_FRAME_MS,
    PAPER,
    SHEET_GAP,
    SHEET_HEAD,
    SHEET_LABEL_WIDTH,
    SHEET_MARGIN,
    TILE_MARGINS,
    enlargement,
)

SHEET_ROWS = 3  # image, reconstruction, difference


def read_clip(path: Path, side: int, length: int) -> list[np.ndarray]:
    """The strips of a clip's GIF: the pictures that were looked at, whatever has become of videos and networks since.

    Of what `sample` writes GIFs are the nearest to the frames: 256 colours, but no colour runs over into its neighbour.

    Args:
        path: what `save_gif` wrote of an `animation` of one clip.
        side: of the frames, before they were enlarged.
        length: frames of the clip.
    Returns:
        Of each strip (truth, prediction, further samples) [length, side, side, 3] uint8.
    Raises:
        ValueError: no GIF, or none of strips of this side and length.
    """
    try:
        with Image.open(path) as image:
            shown = [(np.asarray(f.convert("RGB")), f.info["duration"]) for f in ImageSequence.Iterator(image)]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a GIF that can be read: {error}") from None
    frames = _with_repeats(shown, length)
    scale = enlargement(side)
    above, beside = TILE_MARGINS
    cell = side * scale + 2 * BORDER
    strips, rest = divmod(frames.shape[2] - 2 * beside, cell)
    if len(frames) != length or frames.shape[1] != 2 * above + LABEL_HEIGHT + cell or rest or strips < 2:
        raise ValueError(
            f"{path}: {len(frames)} frames of {frames.shape[2]}x{frames.shape[1]} pixels are not {length} frames of "
            f"clips of {side} pixels a side; `make sample` writes them anew"
        )
    top, lefts = above + LABEL_HEIGHT + BORDER, [beside + BORDER + number * cell for number in range(strips)]
    return [_shrink(frames[:, top : top + side * scale, left : left + side * scale], scale) for left in lefts]


def _with_repeats(shown: list[tuple[np.ndarray, int]], length: int) -> np.ndarray:
    """[n, h, w, 3] frames of a GIF in which equal neighbours became one that is shown for longer.

    Args:
        shown: pixels and milliseconds of each; the last one rests for a second, see `save_gif`.
    """
    frames, durations = [pixels for pixels, _ in shown], np.array([duration for _, duration in shown], float)
    if len(frames) == length or length < 2:
        return np.stack(frames)
    one = max(1.0, (durations.sum() - LAST_FRAME_MS) / (length - 1))
    durations[-1] -= LAST_FRAME_MS - one
    return np.repeat(np.stack(frames), (durations / one).round().astype(int).clip(1, length), axis=0)


def read_reconstructions(path: Path, side: int) -> list[np.ndarray]:
    """The columns of a sheet of reconstructions.

    Args:
        path: what `reconstruction_sheet` was saved to.
        side: of the images, before they were enlarged.
    Returns:
        Of each image [3, side, side, 3] uint8: itself, its reconstruction, four times the difference.
    Raises:
        ValueError: no picture, or another one.
    """
    try:
        with Image.open(path) as image:
            sheet = np.asarray(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a picture that can be read: {error}") from None
    scale = enlargement(side)
    shown, cell = side * scale, side * scale + 2
    columns, beside = divmod(sheet.shape[1] - 2 * SHEET_MARGIN - SHEET_LABEL_WIDTH, cell)
    blocks, below = divmod(sheet.shape[0] - 2 * SHEET_MARGIN - SHEET_HEAD, SHEET_ROWS * cell + SHEET_GAP)
    if beside or below or columns < 1 or blocks < 1:
        raise ValueError(f"{path}: not a sheet of images of {side} pixels a side; the next validation writes one")
    found = []
    for number in range(columns * blocks):
        left = SHEET_MARGIN + SHEET_LABEL_WIDTH + number % columns * cell
        first = SHEET_MARGIN + SHEET_HEAD + number // columns * (SHEET_ROWS * cell + SHEET_GAP)
        tops = [first + row * cell for row in range(SHEET_ROWS)]
        column = np.stack([sheet[top : top + shown, left : left + shown] for top in tops])
        if not (column == PAPER).all():  # the last block need not be full
            found.append(_shrink(column, scale))
    return found


def _shrink(frames: np.ndarray, scale: int) -> np.ndarray:
    """[n, h, w, 3] to [n, h / scale, w / scale, 3]: what `framed` enlarged, as it was."""
    return np.ascontiguousarray(frames[:, ::scale, ::scale])
