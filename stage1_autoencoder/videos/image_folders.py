"""Pictures as videos, through Pillow: folders of frames in natural order, and animated WebP files.

A picture is taken as viewers show it: turned by its EXIF orientation, on black where it is transparent, 16 bits scaled
to 8, palettes and CMYK as RGB.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
from PIL import ExifTags, Image, ImageOps, ImageSequence

from stage1_autoencoder.videos.names import natural_order
from stage1_autoencoder.videos.source import (
    MOST_PIXELS,
    UNKNOWN_FPS,
    BrokenVideoError,
    UnreadableVideoError,
    is_of_the_system,
    plausible_rate,
)
from stage1_autoencoder.videos.video_files import SINGLE_PICTURE, Probe

# What Pillow may open, whatever a file is named: others run programs (EPS) or are no pictures of a camera.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

WEBP = ".webp"
IMAGE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg"})


def is_frame(name: str) -> bool:
    """Whether a file name is that of a frame: a known extension, not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def is_webp(path: Path) -> bool:
    """Whether a video file is one that Pillow decodes."""
    return path.suffix.lower() == WEBP


def is_still_webp(path: str | Path) -> bool:
    """Whether a WebP file is a single picture, by its header; a file that cannot be read is not known to be one."""
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            return False
        with open(path, "rb") as file:
            header = file.read(21)
    except OSError:
        return False
    # Animations have the extended format, and a flag.
    return header[:4] == b"RIFF" and header[8:12] == b"WEBP" and not (header[12:16] == b"VP8X" and header[20] & 2)


def list_frames(folder: Path) -> list[Path]:
    """List the frames of a folder in natural order (frame 2 before frame 10)."""
    names = [name for name in os.listdir(folder) if is_frame(name)]
    return [folder / names[row] for row in natural_order(names)]


def probe_folder(folder: Path, video_id: str) -> Probe:
    """Count the frames of a folder; only the header of the first one is read. Folders have no frame rate of their own.

    Raises:
        BrokenVideoError: there are none, one of the files is empty, or the first frame cannot be read.
    """
    frames = list_frames(folder)
    if not frames:
        raise BrokenVideoError(video_id, "has no frames")
    for frame in frames:
        if frame.stat().st_size == 0:
            raise BrokenVideoError(video_id, f"{frame.name} is empty")
    with _open(frames[0], video_id) as image:
        width, height = image.size
        # Of a PNG, Pillow would decode it to look behind the pixels.
        if (image.format != "PNG" or "exif" in image.info) and image.getexif().get(ExifTags.Base.Orientation, 1) > 4:
            width, height = height, width
        return Probe(len(frames), UNKNOWN_FPS, width, height)


def decode_folder(folder: Path, video_id: str, first: int, stop: int, step: int) -> Iterator[av.VideoFrame]:
    """Decode frames first, first + step, ... before `stop` of a folder of frames; other frames are not opened.

    Yields:
        rgb24 frames in the pictures' own size, the right way up.
    Raises:
        BrokenVideoError: a picture cannot be decoded or differs in size from the first one, or frames are missing.
    """
    try:
        frames = list_frames(folder)
    except OSError as error:
        raise UnreadableVideoError.of(video_id, error) from error
    if len(frames) < stop:
        raise BrokenVideoError(video_id, f"has {len(frames)} frames, but its index expects {stop}")
    size = None
    for path in frames[first:stop:step]:
        with _open(path, video_id) as image:
            ImageOps.exif_transpose(image, in_place=True)
            pixels = _to_rgb(image)
        if pixels.shape != (size := size or pixels.shape):
            raise BrokenVideoError(
                video_id,
                f"{path.name} is {pixels.shape[1]}x{pixels.shape[0]}, the frames before it {size[1]}x{size[0]}; "
                "all frames of a video must have one size",
            )
        yield av.VideoFrame.from_ndarray(pixels, "rgb24")


def probe_webp(path: Path, video_id: str) -> Probe:
    """Count the frames of an animated WebP file, which is decoded for it: FFmpeg's libraries cannot.

    Raises:
        BrokenVideoError: it is a single picture, or cannot be decoded.
    """
    with _open(path, video_id) as image:
        if not getattr(image, "is_animated", False):
            raise BrokenVideoError(video_id, f"is {SINGLE_PICTURE}")
        durations = [frame.load() and frame.info["duration"] for frame in ImageSequence.Iterator(image)]
        seconds = sum(durations) / 1000
        rate = plausible_rate(len(durations) / seconds) if seconds else UNKNOWN_FPS
        return Probe(len(durations), rate, *image.size)


def decode_webp(path: Path, video_id: str, first: int, stop: int, step: int) -> Iterator[av.VideoFrame]:
    """Decode frames first, first + step, ... before `stop` of an animated WebP file, from its start.

    Yields:
        rgb24 frames.
    Raises:
        BrokenVideoError: a frame cannot be decoded, or frames are missing.
    """
    with _open(path, video_id) as image:
        number = -1
        for number, frame in enumerate(ImageSequence.Iterator(image)):
            if number >= stop:
                return
            if number >= first and (number - first) % step == 0:
                yield av.VideoFrame.from_ndarray(_to_rgb(frame), "rgb24")
        if number + 1 < stop:
            raise BrokenVideoError(video_id, f"ends after {number + 1} frames, but its index expects {stop}")


@contextmanager
def _open(path: Path, video_id: str) -> Iterator[Image.Image]:
    """Open a picture.

    Raises:
        BrokenVideoError: it cannot be opened, or what is done with it inside fails.
        UnreadableVideoError: the system does not give it.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise BrokenVideoError(video_id, f"{path.name} is not a regular file, but a pipe or device")
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                size = f"{image.width}x{image.height}, more than {MOST_PIXELS} pixels"
                raise BrokenVideoError(video_id, f"{path.name} has {size}")
            yield image
    except BrokenVideoError:
        raise
    except Exception as error:  # Pillow has no error of its own for damaged files, and one for sizes out of reason
        if is_of_the_system(error):
            raise UnreadableVideoError.of(video_id, error, path.name) from error
        raise BrokenVideoError(video_id, f"{path.name} cannot be decoded ({error})") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Decode a picture of any mode to [h, w, 3] uint8."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255 instead of scaling
        grey = np.asarray(image).astype(np.uint16) >> 8
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return np.ascontiguousarray(image.convert("RGB"))
