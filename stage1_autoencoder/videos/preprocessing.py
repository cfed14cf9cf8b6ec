"""From a decoded frame to a square RGB picture: the one path that all videos and frame folders take.

The rule: every decoded frame counts once, in presentation order, whatever its timestamp; frames 0, k, 2k... are kept
(k = frame_step). A frame is cropped to the centred square of its short side (offset (long - short) // 2), then resized
to image_size with an area filter (the mean over each output pixel's footprint, fractions of source pixels included),
or with a bicubic filter when it is smaller than image_size. Greyscale becomes three equal channels. Rotation metadata
is ignored, and so is transparency.

swscale does the resizing and the conversion to RGB in one pass, at 15 bits between the two. With the flags below it
agrees with float64 area averaging to rounding (0.6 levels; the tests hold this), where colour is stored at the output's
resolution or more; coarser colour is interpolated. Without the flags it is off by up to 2.3 levels.

There are two ways through swscale, equal bit for bit (the tests hold this too). The general one takes every format and
begins at once. A filter graph crops without copying and has less between the steps, but takes 0.2 ms to build, as long
as it saves on some thirty frames; so it is built after as many of a kind, for what is cut at chroma samples' own edges.
Large frames have left the processor's cache when they arrive: copying fetches them faster than the scaler does.
"""

import math

import av
import av.filter
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from stage1_autoencoder.videos.config import DatasetConfig

# Full chroma resolution and exact rounding, without which swscale takes every other chroma sample and truncates.
_EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
_EXACT_NAMES = "accurate_rnd+full_chroma_int+full_chroma_inp"

# Frames of a kind that the general way takes before a filter graph is built: short reads do without one.
_PATIENCE = 32

# Width times height of the largest frames that a graph takes. Measured on a core with 1 MB of cache, us a frame without
# and with it: 160x120 27 and 21, 480x320 80 and 72, 768x576 110 and 90, 1280x720 285 and up to 518.
_GRAPH_PIXELS = 1 << 19

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
        self._to_packed = VideoReformatter()
        self._layout: tuple[str, int, int] | None = None
        self._cuts: list[tuple] = []
        self._square: av.VideoFrame | None = None
        self._targets: list[np.ndarray] = []
        self._kind: tuple | None = None  # all that a graph is built for
        self._seen = 0  # frames of this kind
        self._graph: _SquareGraph | None = None

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """Crop, resize and convert one frame.

        Args:
            frame: any size and pixel format.
        Returns:
            [image_size, image_size, 3] uint8 RGB in [0, 255].
        """
        kind = (frame.format.name, frame.width, frame.height, frame.color_range, frame.colorspace)
        if kind != self._kind:
            self._kind, self._seen, self._graph = kind, 0, None
        self._seen += 1
        if self._seen == _PATIENCE + 1 and frame.width * frame.height <= _GRAPH_PIXELS and _cut_by_slices(frame):
            self._graph = _SquareGraph(frame, self.image_size)
        packed = self._convert(frame) if self._graph is None else self._graph.convert(frame)
        # A copy, because rows may be padded, and FFmpeg's own memory would be held as long as the array is.
        pixels = np.frombuffer(packed.planes[0], np.uint8).reshape(self.image_size, -1)
        result = np.empty((self.image_size, self.image_size, 3), np.uint8)
        result.reshape(self.image_size, -1)[:] = pixels[:, : 3 * self.image_size]
        return result

    def _convert(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The general way: [image_size, image_size] rgb24."""
        side = self.image_size
        if (frame.format.name, frame.width, frame.height) == ("rgb24", side, side):
            return frame
        square = self._crop(frame)
        # By way of planes: the scaler's packed RGB output takes twice the time.
        picture = self._to_square.reformat(
            square,
            side,
            side,
            "gbrp",
            interpolation=_EXACT | (Interpolation.AREA if square.width >= side else Interpolation.BICUBIC),
            threads=1,  # a small frame takes less time than handing it out
        )
        return self._to_packed.reformat(picture, format="rgb24", interpolation=_EXACT, threads=1)

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


class _SquareGraph:
    """A filter graph from frames of one kind (size, format, colour tags) to squares of [image_size, image_size]."""

    def __init__(self, frame: av.VideoFrame, image_size: int) -> None:
        side = min(frame.width, frame.height)
        left, top = (frame.width - side) // 2, (frame.height - side) // 2
        flags = f"{'area' if side >= image_size else 'bicubic'}+{_EXACT_NAMES}"
        self._graph = graph = av.filter.Graph()
        graph.threads = 1
        self._source = graph.add(
            "buffer",
            video_size=f"{frame.width}x{frame.height}",
            pix_fmt=frame.format.name,
            time_base="1/1",  # needed, not used: each frame that is pushed is one that is pulled
            colorspace=str(int(frame.colorspace)),
            range=str(int(frame.color_range)),
        )
        # What the general way does not hand to swscale either. Rotation is metadata that no filter here looks at.
        plain = graph.add(
            "setparams", "field_mode=prog:chroma_location=unspecified:color_primaries=unknown:color_trc=unknown"
        )
        crop = graph.add("crop", f"{side}:{side}:{left}:{top}:exact=1")
        resize = graph.add("scale", f"{image_size}:{image_size}:flags={flags}")
        planar = graph.add("format", "gbrp")
        pack, packed = graph.add("scale", f"flags={flags}"), graph.add("format", "rgb24")
        self._sink = graph.add("buffersink")
        graph.link_nodes(self._source, plain, crop, resize, planar, pack, packed, self._sink).configure()

    def convert(self, frame: av.VideoFrame) -> av.VideoFrame:
        self._source.push(frame)
        return self._sink.pull()


def _cut_by_slices(frame: av.VideoFrame) -> bool:
    """Tell whether a centred square has to be cut out of a frame, and can be at the edges of its chroma samples."""
    if frame.format.name not in _CROPPABLE:
        return False
    cuts, _ = _cuts(frame)
    return bool(cuts) and isinstance(cuts[0][0], slice)


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
