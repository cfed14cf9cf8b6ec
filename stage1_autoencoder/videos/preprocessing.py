"""From a decoded frame to a square RGB picture: the one path that all videos and frame folders take.

The rule: every decoded frame counts once, in presentation order, whatever its timestamp; frames 0, k, 2k... are kept
(k = frame_step). A frame is cropped to the centred square of its short side (offset (long - short) // 2), then resized
to image_size with an area filter (the mean over each output pixel's footprint, fractions of source pixels included),
or with a bicubic filter when it is smaller than image_size. Greyscale becomes three equal channels. Rotation metadata
is ignored, and so is transparency.

swscale does the resizing and the conversion to RGB in one pass, at 15 bits between the two. With the flags below it
agrees with float64 area averaging to rounding (0.6 levels; the tests hold this), where colour is stored at the output's
resolution or more; coarser colour is interpolated. Without the flags it is off by up to 2.3 levels.
"""

import math

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from stage1_autoencoder.videos.config import DatasetConfig

# Full chroma resolution and exact rounding, without which swscale takes every other chroma sample and truncates.
_EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP

# Planar 8-bit formats whose planes can be cropped as they are, and the same format with a chroma sample a pixel.
_CROPPABLE = {f"yuv{jpeg}{chroma}p": f"yuv{jpeg}444p" for jpeg in ("", "j") for chroma in (420, 422, 440, 444)}
_CROPPABLE |= {f"yuv{chroma}p": "yuv444p" for chroma in (410, 411)}
_CROPPABLE |= {"gray": "gray", "gbrp": "gbrp"}


def preprocessing_description(dataset: DatasetConfig) -> dict[str, str | int]:
    """Describe how frames are made, in words that go into the store's attributes and into fingerprints."""
    return {
        "image_size": dataset.image_size,
        "crop": "centred square of the short side, offset (long - short) // 2",
        "resize_filter": "area",
        "upscale_filter": "bicubic",
        "frame_step": dataset.frame_step,
        "colour": "RGB, 8 bit, full range",
    }


def _pixels(plane: av.video.plane.VideoPlane) -> np.ndarray:
    """View a plane of an 8-bit planar frame as [height, width] uint8, without the padding that ends its rows."""
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


class FramePreprocessor:
    """Makes [image_size, image_size, 3] uint8 RGB arrays of decoded frames. One a video: it keeps scratch space."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size
        # One a conversion, because each holds swscale's tables for the last sizes and formats it saw.
        self._to_planar = VideoReformatter()
        self._to_square = VideoReformatter()
        self._layout: tuple[str, int, int] | None = None
        self._cuts: list[tuple] = []
        self._square: av.VideoFrame | None = None
        self._targets: list[np.ndarray] = []

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """Crop, resize and convert one frame.

        Args:
            frame: any size and pixel format.
        Returns:
            [image_size, image_size, 3] uint8 RGB in [0, 255].
        """
        square = self._crop(frame)
        shrinks = square.width >= self.image_size
        # Planar output: swscale's packed RGB output takes twice the time.
        picture = self._to_square.reformat(
            square,
            self.image_size,
            self.image_size,
            "gbrp",
            interpolation=_EXACT | (Interpolation.AREA if shrinks else Interpolation.BICUBIC),
            threads=1,  # a small frame takes less time than handing it out
        )
        result = np.empty((self.image_size, self.image_size, 3), np.uint8)
        green, blue, red = picture.planes
        result[..., 0] = _pixels(red)
        result[..., 1] = _pixels(green)
        result[..., 2] = _pixels(blue)
        return result

    def _crop(self, frame: av.VideoFrame) -> av.VideoFrame:
        """Cut the centred square out of a frame, to the pixel, as a planar 8-bit frame (valid until the next call)."""
        if frame.format.name not in _CROPPABLE:
            frame = self._to_planar.reformat(frame, format="gbrp", interpolation=_EXACT, threads=1)
        layout = (frame.format.name, frame.width, frame.height)
        if layout != self._layout:
            self._layout = layout
            self._cuts, square_format = _cuts(frame)
            side = min(frame.width, frame.height)
            self._square = av.VideoFrame(side, side, square_format) if self._cuts else None
            self._targets = [_pixels(plane) for plane in self._square.planes] if self._square else []
        if self._square is None:
            return frame
        self._square.color_range = frame.color_range
        self._square.colorspace = frame.colorspace
        for target, source, cut in zip(self._targets, frame.planes, self._cuts, strict=True):
            target[:] = _pixels(source)[cut]
        return self._square


def _cuts(frame: av.VideoFrame) -> tuple[list[tuple], str]:
    """How to cut the centred square out of each plane: numpy indices (none for a square), and the result's format."""
    name, side = frame.format.name, min(frame.width, frame.height)
    left, top = (frame.width - side) // 2, (frame.height - side) // 2
    # How many pixels a sample of each plane stands for, across and down.
    steps = [(_step(frame.width, plane.width), _step(frame.height, plane.height)) for plane in frame.planes]
    if all(left % x == top % y == side % x == side % y == 0 for x, y in steps):
        if frame.width == frame.height:
            return [], name
        return [np.s_[top // y : (top + side) // y, left // x : (left + side) // x] for x, y in steps], name
    # Chroma samples can be cut only at their own edges. With odd sizes or offsets each pixel gets its own sample.
    rows, columns = np.arange(top, top + side)[:, None], np.arange(left, left + side)
    return [(rows // y, columns // x) for x, y in steps], _CROPPABLE[name]


def _step(pixels: int, samples: int) -> int:
    """Pixels a sample, a power of two, where the last sample may stand for fewer (65 pixels in 33 samples: 2)."""
    return 1 << math.ceil(math.log2(pixels / samples))
