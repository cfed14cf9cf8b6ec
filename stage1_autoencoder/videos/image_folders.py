"""Folders of frames as videos, through Pillow: listing, counting and decoding pictures in natural order."""

import os
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image

from stage1_autoencoder.videos.names import natural_order
from stage1_autoencoder.videos.source import UNKNOWN_FPS, BrokenVideoError
from stage1_autoencoder.videos.video_files import Probe

IMAGE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg"})


def is_frame(name: str) -> bool:
    """Whether a file name is that of a frame: a known extension, not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def list_frames(folder: Path) -> list[Path]:
    """List the frames of a folder in natural order (frame 2 before frame 10)."""
    names = [name for name in os.listdir(folder) if is_frame(name)]
    return [folder / names[row] for row in natural_order(names)]


def probe_folder(folder: Path, video_id: str) -> Probe:
    """Count the frames of a folder; only the header of the first one is read. Folders have no frame rate of their own.

    Raises:
        BrokenVideoError: one of the files is empty, or the first frame cannot be read.
    """
    frames = list_frames(folder)
    for frame in frames:
        if frame.stat().st_size == 0:
            raise BrokenVideoError(video_id, f"{frame.name} is empty")
    try:
        with Image.open(frames[0]) as image:
            return Probe(len(frames), UNKNOWN_FPS, *image.size)
    except OSError as error:
        raise BrokenVideoError(video_id, f"{frames[0].name} cannot be read as a picture") from error


def decode_folder(folder: Path, video_id: str, first: int, stop: int, step: int) -> Iterator[av.VideoFrame]:
    """Decode frames first, first + step, ... before `stop` of a folder of frames; other frames are not opened.

    Yields:
        rgb24 frames in the pictures' own size.
    Raises:
        BrokenVideoError: a picture cannot be decoded or differs in size from the first one, or frames are missing.
    """
    try:
        frames = list_frames(folder)
    except OSError as error:
        raise BrokenVideoError(video_id, f"cannot be listed ({error.strerror})") from error
    if len(frames) < stop:
        raise BrokenVideoError(video_id, f"has {len(frames)} frames, but its index expects {stop}")
    size = None
    for path in frames[first:stop:step]:
        try:
            with Image.open(path) as image:
                pixels = _to_rgb(image)
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
            raise BrokenVideoError(video_id, f"{path.name} cannot be decoded ({error})") from error
        if pixels.shape != (size := size or pixels.shape):
            raise BrokenVideoError(
                video_id,
                f"{path.name} is {pixels.shape[1]}x{pixels.shape[0]}, the frames before it {size[1]}x{size[0]}; "
                "all frames of a video must have one size",
            )
        yield av.VideoFrame.from_ndarray(pixels, "rgb24")


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Decode a picture of any mode to [h, w, 3] uint8."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255 instead of scaling
        grey = np.asarray(image).astype(np.uint16) >> 8
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    return np.ascontiguousarray(image.convert("RGB"))
