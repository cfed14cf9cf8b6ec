"""Preprocessing: from a decoded frame to an RGB picture, the same for video files, frame folders and shards.

Every decoded frame counts once, in presentation order, whatever its timestamp; frames 0, k, 2k... are kept
(k = frame_step). By default a frame is cropped to the centered part of the picture's shape, for square pictures to the
centered square of its short side (offset (long - short) // 2); `dataset.fit` can also fit all of it between black bars,
or stretch it. Then it is resized with an area filter (the mean over each output pixel's footprint, including fractions
of source pixels), or with a bicubic filter if a side has to be enlarged. Shape and offset are those of the frame as it
is shown, with square pixels and turned the right way up (`Display`); it is turned after resizing, when it is smallest.
Grayscale becomes three equal channels. What is transparent shows black behind it.

swscale resizes and converts to RGB in one pass, with 15 bits in between. With the flags below it agrees with float64
area averaging up to rounding (0.6 levels; the tests check this) where color is stored at the output's resolution or
more; coarser color is interpolated. Without the flags the error is up to 2.3 levels.

There are two paths through swscale, equal bit for bit (the tests check this too). The general one takes every format
and needs no setup. A filter graph crops without copying and has less overhead per frame, but takes 0.2 ms to build, as
long as it saves on some thirty frames; so it is built after that many frames of a kind, if chroma can be cropped at the
edges of its samples. Large frames have left the processor's cache when they arrive: there, copying is faster.
"""

import math
from functools import cache
from typing import Any

import av
import av.filter
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from stage1_autoencoder.videos.config import DatasetConfig, Fit
from stage1_autoencoder.videos.display import AS_STORED, Display, Placement, Region

# Full chroma resolution and exact rounding, without which swscale takes every other chroma sample and truncates.
_EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
_EXACT_NAMES = "accurate_rnd+full_chroma_int+full_chroma_inp"

# Frames of a kind before a filter graph is built; short reads do without one.
GRAPH_AFTER = 32

# Width times height of the largest frames for a graph. Measured on a core with 1 MB of cache, us per frame without and
# with it: 160x120 27 and 21, 480x320 80 and 72, 768x576 110 and 90, 1280x720 285 and up to 518.
_GRAPH_PIXELS = 1 << 19

# Planar 8-bit formats whose planes can be cropped, and the same format with one chroma sample per pixel.
_CROPPABLE = {f"yuv{jpeg}{chroma}p": f"yuv{jpeg}444p" for jpeg in ("", "j") for chroma in (420, 422, 440, 444)}
_CROPPABLE |= {f"yuv{chroma}p": "yuv444p" for chroma in (410, 411)}
_CROPPABLE |= {"gray": "gray", "gbrp": "gbrp"}


def preprocessing_description(dataset: DatasetConfig) -> dict[str, Any]:
    """Describe how frames are made, for the store's attributes and for fingerprints: the words must not change."""
    if dataset.fit != "crop":
        crop = {"crop": "none", "fit": dataset.fit}
    elif isinstance(dataset.image_size, int):
        crop = {"crop": "centred square of the short side, offset (long - short) // 2"}
    else:
        crop = {"crop": "centred part of the shape of image_size, offset (long - short) // 2"}
    return {
        "image_size": dataset.image_size,
        **crop,
        "resize_filter": "area",
        "upscale_filter": "bicubic",
        "frame_step": dataset.frame_step,
        "colour": "RGB, 8 bit, full range",
    } | ({} if dataset.fps is None else {"fps": dataset.fps})


def _pixels(plane: av.video.plane.VideoPlane) -> np.ndarray:
    """View a plane of an 8-bit planar frame as [height, width] uint8, without the padding of its rows."""
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


class FramePreprocessor:
    """Turns decoded frames into [h, w, 3] uint8 RGB arrays. One per video: it keeps scratch space.

    Attributes:
        uses_graph: the last frame took the filter graph.
    """

    def __init__(
        self, frame_size: tuple[int, int], fit: Fit, graph_after: int = GRAPH_AFTER, display: Display = AS_STORED
    ) -> None:
        """Prepare for any frames.

        Args:
            frame_size: (h, w).
            fit: how frames of another shape fit.
            graph_after: number of frames of a kind (size, format, color tags) before a filter graph is built.
            display: how the frames are shown.
        """
        self.frame_size, self.fit, self.graph_after, self.display = frame_size, fit, graph_after, display
        # One per conversion, because each holds swscale's tables for the last size and format.
        self._to_planar = VideoReformatter()
        self._to_size = VideoReformatter()
        self._to_packed = VideoReformatter()
        self._layout: tuple[str, int, int] | None = None
        self._cuts: list[tuple] = []
        self._part: av.VideoFrame | None = None
        self._targets: list[np.ndarray] = []
        self._kind: tuple | None = None  # what a graph depends on
        self._place: Placement  # of frames of this kind
        self._seen = 0  # frames of this kind
        self._graph: _Graph | None = None

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """Crop, resize and convert one frame.

        Args:
            frame: any size and pixel format.
        Returns:
            [h, w, 3] uint8 RGB in [0, 255].
        """
        kind = (frame.format.name, frame.width, frame.height, frame.color_range, frame.colorspace)
        if kind != self._kind:
            self._kind, self._seen, self._graph = kind, 0, None
            self._place = self.display.place(frame.width, frame.height, self.frame_size, self.fit)
        self._seen += 1
        if self._seen == self.graph_after + 1 and frame.width * frame.height <= _GRAPH_PIXELS:
            if _cut_by_slices(frame, self._place.region):
                self._graph = _Graph(frame, self._place)
        packed = self._convert(frame, self._place) if self._graph is None else self._graph.convert(frame)
        # A copy, because rows may be padded, and the array would keep FFmpeg's memory alive.
        pixels = np.frombuffer(packed.planes[0], np.uint8).reshape(packed.height, -1)
        result = np.empty((packed.height, packed.width, 3), np.uint8)
        result.reshape(packed.height, -1)[:] = pixels[:, : 3 * packed.width]
        return self._on_black(self.display.turn(result))

    @property
    def uses_graph(self) -> bool:
        return self._graph is not None

    def _on_black(self, shown: np.ndarray) -> np.ndarray:
        """Put what is shown at its place in the picture; the same array if it fills it."""
        if shown.shape[:2] == self.frame_size:
            return shown
        picture, (height, width) = np.zeros((*self.frame_size, 3), np.uint8), shown.shape[:2]
        top, left = self._place.top, self._place.left
        picture[top : top + height, left : left + width] = shown
        return picture

    def _convert(self, frame: av.VideoFrame, place: Placement) -> av.VideoFrame:
        """The general path: rgb24 of the size before turning."""
        whole = Region(0, 0, frame.width, frame.height)
        if frame.format.name == "rgb24" and place[:3] == (whole, frame.width, frame.height):
            return frame
        # Through planes: the scaler's packed RGB output takes twice the time.
        picture = self._to_size.reformat(
            self._crop(frame, place.region),
            place.width,
            place.height,
            "gbrp",
            interpolation=_EXACT | (Interpolation.BICUBIC if place.enlarges else Interpolation.AREA),
            threads=1,  # a small frame takes less time than starting threads
        )
        return self._to_packed.reformat(picture, format="rgb24", interpolation=_EXACT, threads=1)

    def _crop(self, frame: av.VideoFrame, region: Region) -> av.VideoFrame:
        """Cut a region out of a frame, to the pixel, as a planar 8-bit frame (valid until the next call)."""
        if frame.format.name not in _CROPPABLE:
            planar = "gbrap" if _has_alpha(frame.format.name) else "gbrp"
            frame = self._to_planar.reformat(frame, format=planar, interpolation=_EXACT, threads=1)
        layout = (frame.format.name, frame.width, frame.height)
        if layout != self._layout:
            self._layout = layout
            self._cuts, format_of_part = _cuts(frame, region)
            self._part = av.VideoFrame(region.width, region.height, format_of_part) if self._cuts else None
            self._targets = [_pixels(plane) for plane in self._part.planes] if self._part else []
        if self._part is None:
            return frame
        self._part.color_range = frame.color_range
        self._part.colorspace = frame.colorspace
        planes = [_pixels(plane)[cut] for plane, cut in zip(frame.planes, self._cuts, strict=True)]
        alpha = planes.pop() if len(planes) > len(self._targets) else None
        if alpha is not None and alpha.min() == 255:  # as of most frames
            alpha = None
        for target, source in zip(self._targets, planes, strict=True):
            target[:] = source if alpha is None else _over_black(source, alpha)
        return self._part


def _over_black(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return ((color.astype(np.uint16) * alpha + 127) // 255).astype(np.uint8)


@cache
def _has_alpha(name: str) -> bool:
    pixel_format = av.VideoFormat(name)
    return pixel_format.has_palette or any(component.is_alpha for component in pixel_format.components)


class _Graph:
    """A filter graph from frames of one kind (size, format, color tags) to rgb24 of the size before turning."""

    def __init__(self, frame: av.VideoFrame, place: Placement) -> None:
        region, flags = place.region, f"{'bicubic' if place.enlarges else 'area'}+{_EXACT_NAMES}"
        self._graph = graph = av.filter.Graph()
        graph.threads = 1
        self._source = graph.add(
            "buffer",
            video_size=f"{frame.width}x{frame.height}",
            pix_fmt=frame.format.name,
            time_base="1/1",  # required, but not used
            colorspace=str(int(frame.colorspace)),
            range=str(int(frame.color_range)),
        )
        # Tags that the general path does not pass to swscale either. No filter here applies rotation metadata.
        plain = graph.add(
            "setparams", "field_mode=prog:chroma_location=unspecified:color_primaries=unknown:color_trc=unknown"
        )
        crop = graph.add("crop", f"{region.width}:{region.height}:{region.left}:{region.top}:exact=1")
        resize = graph.add("scale", f"{place.width}:{place.height}:flags={flags}")
        planar = graph.add("format", "gbrp")
        pack, packed = graph.add("scale", f"flags={flags}"), graph.add("format", "rgb24")
        self._sink = graph.add("buffersink")
        graph.link_nodes(self._source, plain, crop, resize, planar, pack, packed, self._sink).configure()

    def convert(self, frame: av.VideoFrame) -> av.VideoFrame:
        self._source.push(frame)
        return self._sink.pull()


def _cut_by_slices(frame: av.VideoFrame, region: Region) -> bool:
    """Whether a frame has to be cropped, and can be at the edges of its chroma samples."""
    if frame.format.name not in _CROPPABLE:
        return False
    cuts, _ = _cuts(frame, region)
    return bool(cuts) and isinstance(cuts[0][0], slice)


def _cuts(frame: av.VideoFrame, region: Region) -> tuple[list[tuple], str]:
    """Numpy indices that cut a part out of each plane (none if it is all of an opaque frame), and the result's format.

    Args:
        frame: planar, 8 bit.
    """
    left, top, width, height = region
    name = frame.format.name
    opaque = name.replace("gbrap", "gbrp")
    # Pixels per sample of each plane, across and down.
    steps = [(_step(frame.width, plane.width), _step(frame.height, plane.height)) for plane in frame.planes]
    if all(left % x == top % y == width % x == height % y == 0 for x, y in steps):
        if (frame.width, frame.height) == (width, height) and opaque == name:
            return [], name
        cuts = [np.s_[top // y : (top + height) // y, left // x : (left + width) // x] for x, y in steps]
        return cuts, opaque
    # With odd sizes or offsets, where chroma cannot be cut at the edges of its samples, each pixel gets its own sample.
    rows, columns = np.arange(top, top + height)[:, None], np.arange(left, left + width)
    return [(rows // y, columns // x) for x, y in steps], _CROPPABLE[opaque]


def _step(pixels: int, samples: int) -> int:
    """Pixels per sample, a power of two; the last sample may cover fewer (65 pixels in 33 samples: 2)."""
    return 1 << math.ceil(math.log2(pixels / samples))
