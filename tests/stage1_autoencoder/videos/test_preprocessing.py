"""Frames against float64 arithmetic: area filter, crop, color matrices and ranges. And both paths through swscale."""

import itertools
import json
from fractions import Fraction
from typing import get_args

import av
import av.filter
import numpy as np
import pytest

from stage1_autoencoder.videos.config import DatasetConfig, Fit
from stage1_autoencoder.videos.display import Display
from stage1_autoencoder.videos.preprocessing import GRAPH_AFTER, FramePreprocessor, preprocessing_description
from tests.stage1_autoencoder.videos.conftest import centered_square, fitted

BT601 = np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]])
BT709 = np.array([[1, 0, 1.5748], [1, -0.187324, -0.468124], [1, 1.8556, 0]])
# Half a level of the last rounding, and 15 bits before it for each of the scaler's passes. This is integer arithmetic,
# so the error does not depend on the processor.
ROUNDING = 0.6
CROPPABLE = [f"yuv{jpeg}{chroma}p" for jpeg in ("", "j") for chroma in (420, 422, 440, 444)]
CROPPABLE += ["yuv410p", "yuv411p", "gray", "gbrp"]
FITS = get_args(Fit)


def square(side: int, graph_after: int = GRAPH_AFTER) -> FramePreprocessor:
    return FramePreprocessor((side, side), "crop", graph_after)


def pixels_of(plane) -> np.ndarray:
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


def picture(kind: str, height: int, width: int, channel: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width] / max(height, width)
    if kind == "smooth":
        return (128 + 50 * np.sin(9 * x + channel) * np.cos(7 * y - channel)).astype(np.uint8)
    return np.random.default_rng(channel).integers(70, 190, (height, width), np.uint8)


def yuv_frame(pixel_format: str, width: int, height: int, kind: str) -> tuple[av.VideoFrame, np.ndarray]:
    """A frame, and its pixels as [h, w, 3] YUV, each pixel with the chroma sample that covers it."""
    frame = av.VideoFrame(width, height, pixel_format)
    planes = []
    for channel, plane in enumerate(frame.planes):
        values = picture(kind, plane.height, plane.width, channel)
        pixels_of(plane)[:] = values
        across, down = -(-width // plane.width), -(-height // plane.height)
        planes.append(values.repeat(across, 1).repeat(down, 0)[:height, :width])
    return frame, np.stack(planes, -1).astype(np.float64)


def to_rgb(yuv: np.ndarray, matrix: np.ndarray, full_range: bool) -> np.ndarray:
    if full_range:
        return (yuv - [0, 128, 128]) @ matrix.T
    return (yuv - [16, 128, 128]) * [255 / 219, 255 / 224, 255 / 224] @ matrix.T


@pytest.mark.parametrize("kind", ["smooth", "noise"])
@pytest.mark.parametrize(
    ("width", "height"), [(176, 144), (640, 272), (65, 65), (161, 121), (121, 161), (193, 131), (75, 200)]
)
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuvj420p", "yuv422p", "yuv444p"])
def test_yuv_is_averaged_exactly(pixel_format, width, height, kind):
    """Odd sizes and odd crop offsets included, where chroma samples cannot be cut at their own edges."""
    frame, yuv = yuv_frame(pixel_format, width, height, kind)
    difference = square(64)(frame) - centered_square(to_rgb(yuv, BT601, "j" in pixel_format), 64)
    assert np.abs(difference).max() < ROUNDING
    assert abs(difference.mean()) < 0.05
    frame.colorspace = 1  # AVCOL_SPC_BT709
    difference = square(64)(frame) - centered_square(to_rgb(yuv, BT709, "j" in pixel_format), 64)
    assert np.abs(difference).max() < ROUNDING


@pytest.mark.parametrize(("kind", "mean_square"), [("smooth", 0.5), ("noise", 2.5)])
def test_chroma_coarser_than_the_output_is_interpolated(kind, mean_square):
    frame, yuv = yuv_frame("yuv420p", 160, 120, kind)  # 60 chroma samples become 64
    difference = square(64)(frame) - centered_square(to_rgb(yuv, BT601, False), 64)
    assert np.sqrt(np.mean(difference**2)) < mean_square


@pytest.mark.parametrize("size", [(120, 120), (160, 120), (65, 49), (49, 65), (501, 333)])
@pytest.mark.parametrize("pixel_format", ["rgb24", "bgr24", "rgba", "gbrp"])
def test_rgb_is_averaged_exactly(pixel_format, size):
    rgb = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    frame = av.VideoFrame.from_ndarray(rgb, "rgb24").reformat(format=pixel_format)
    frame.color_range = size[0] % 3  # a tag that means nothing for RGB: unknown, limited or full
    assert np.abs(square(32)(frame) - centered_square(rgb, 32)).max() < ROUNDING


@pytest.mark.parametrize("size", [(128, 72), (160, 120), (120, 160), (211, 97), (97, 211)])
@pytest.mark.parametrize("frame_size", [(36, 64), (60, 33)])
@pytest.mark.parametrize("fit", FITS)
def test_frames_that_are_not_square_are_averaged_exactly(fit, frame_size, size):
    """Wide and tall, decoded as they are and turned, from RGB and through chroma that is cut or not cut."""
    rgb = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    frame = av.VideoFrame.from_ndarray(rgb, "rgb24")
    for orientation in range(1, 9):
        display = Display(orientation)
        ours = FramePreprocessor(frame_size, fit, display=display)(frame)
        assert np.abs(ours - fitted(display.turn(rgb), frame_size, fit)).max() < ROUNDING, orientation
        assert ours.flags.c_contiguous
    frame, yuv = yuv_frame("yuv420p", 2 * size[0] + 1, 2 * size[1] + 1, "noise")  # chroma at the output's resolution
    ours = FramePreprocessor(frame_size, fit)(frame)
    assert np.abs(ours - fitted(to_rgb(yuv, BT601, False), frame_size, fit)).max() < ROUNDING


def test_pixels_that_are_not_square_fit_as_they_are_shown():
    """A frame of a DVD, shown at 16:9, has no bars in a picture of 16:9, whichever way up."""
    rgb = np.random.default_rng(0).integers(0, 256, (576, 720, 3), np.uint8)
    frame, aspect = av.VideoFrame.from_ndarray(rgb, "rgb24"), Fraction(64, 45)
    whole = fitted(rgb, (72, 128), "stretch")
    for fit in FITS:
        assert np.abs(FramePreprocessor((72, 128), fit, display=Display(1, aspect))(frame) - whole).max() < ROUNDING
        turned = FramePreprocessor((128, 72), fit, display=Display(6, aspect))(frame)
        assert np.abs(turned - np.rot90(whole, -1)).max() < ROUNDING


@pytest.mark.parametrize(
    ("size", "bars"), [((128, 60), (6, 6, 0, 0)), ((96, 72), (0, 0, 16, 16)), ((95, 72), (0, 0, 16, 17))]
)
def test_bars_are_black_and_the_odd_pixel_is_at_the_right_or_the_bottom(size, bars):
    top, bottom, left, right = bars
    white = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 255, np.uint8), "rgb24")
    expected = np.pad(np.full((size[1], size[0], 3), 255, np.uint8), ((top, bottom), (left, right), (0, 0)))
    assert (FramePreprocessor((72, 128), "pad")(white) == expected).all()
    # The same pixels as shown, when they are decoded upside down.
    assert (FramePreprocessor((72, 128), "pad", display=Display(3))(white) == expected).all()
    # Limited range, where black is 16.
    grey = white.reformat(format="yuv420p")
    assert (FramePreprocessor((72, 128), "pad")(grey)[expected[..., 0] == 0] == 0).all()


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_shapes_fit_as_with_the_filters_of_ffmpeg(fit):
    rgb, graph = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8), av.filter.Graph()
    rule, cut = {"crop": ("increase", "crop=128:72"), "pad": ("decrease", "pad=128:72:(ow-iw)/2:(oh-ih)/2")}[fit]
    flags = "area+accurate_rnd+full_chroma_int+full_chroma_inp"
    source = graph.add("buffer", video_size="160x120", pix_fmt="gbrp", time_base="1/1")
    scale = graph.add("scale", f"128:72:force_original_aspect_ratio={rule}:flags={flags}")
    last, sink = graph.add(*cut.split("=")), graph.add("buffersink")
    graph.link_nodes(source, scale, last, sink).configure()
    source.push(av.VideoFrame.from_ndarray(rgb, "rgb24").reformat(format="gbrp"))
    ours = FramePreprocessor((72, 128), fit)(av.VideoFrame.from_ndarray(rgb, "rgb24"))
    assert np.abs(ours - sink.pull().to_ndarray(format="rgb24").astype(float)).max() <= 2


@pytest.mark.parametrize(("tag", "full_range"), [(None, False), (1, False), (2, True)])
def test_gray_stays_gray_and_fills_the_range(tag, full_range):
    preprocess = square(16)
    for level in range(256):
        frame = av.VideoFrame(40, 30, "yuv420p")
        if tag is not None:
            frame.color_range = tag
        for plane, value in zip(frame.planes, (level, 128, 128), strict=True):
            pixels_of(plane)[:] = value
        result = preprocess(frame)
        assert result.min() == result.max(), f"gray {level} became {result.reshape(-1, 3).min(0)}..."
        right = level if full_range else np.clip((level - 16) * 255 / 219, 0, 255)
        assert abs(float(result[0, 0, 0]) - right) <= 0.51


def test_gray_pictures_have_three_equal_channels():
    frame = av.VideoFrame(160, 120, "gray")
    noise = np.random.default_rng(0).integers(0, 256, (120, 160), np.uint8)
    pixels_of(frame.planes[0])[:] = noise
    result = square(64)(frame)
    assert (result == result[..., :1]).all()
    assert np.abs(result - centered_square(np.repeat(noise[..., None], 3, 2), 64)).max() < ROUNDING


def test_crop_is_exact_to_the_pixel():
    rgb = np.random.default_rng(0).integers(0, 256, (48, 67, 3), np.uint8)
    result = square(48)(av.VideoFrame.from_ndarray(rgb, "rgb24"))
    assert (result == rgb[:, 9:57]).all()
    small = rgb[:20, :20].copy()  # rows that FFmpeg pads
    assert (square(20)(av.VideoFrame.from_ndarray(small, "rgb24")) == small).all()


def test_small_frames_are_enlarged_smoothly():
    def wave(height: int, width: int) -> np.ndarray:
        y, x = ((np.arange(side) + 0.5) / side for side in (height, width))
        return 128 + 60 * np.sin(20 * y)[:, None] * np.cos(19 * x)

    for size in ((40, 40), (40, 200), (200, 40)):  # one side shrunk
        rgb = np.repeat(wave(*size).round().astype(np.uint8)[..., None], 3, 2)
        result = FramePreprocessor((64, 64), "stretch")(av.VideoFrame.from_ndarray(rgb, "rgb24"))
        assert np.abs(result[..., 0] - wave(64, 64))[3:-3, 3:-3].max() < 1.5, size
    flat = square(64)(av.VideoFrame.from_ndarray(np.full((9, 9, 3), 77, np.uint8), "rgb24"))
    assert (flat == 77).all()


@pytest.mark.parametrize("tag", [0, 1])
def test_ten_bits_are_scaled(tag):
    frame = av.VideoFrame(64, 48, "yuv420p10le")
    frame.color_range = tag
    for plane, value in zip(frame.planes, (500, 512, 512), strict=True):
        np.frombuffer(plane, np.uint16)[:] = value
    result = square(32)(frame)
    assert (result == result[..., :1]).all()
    assert np.abs(result - (500 / 4 - 16) * 255 / 219).max() < 1


@pytest.mark.parametrize("graph_after", [0, 99])
@pytest.mark.parametrize("size", [(20, 30), (8, 8)])
@pytest.mark.parametrize("pixel_format", ["rgb24", "gbrp", "gray"])
def test_results_are_arrays_of_their_own(pixel_format, size, graph_after):
    preprocess = square(8, graph_after)
    levels = (np.full((*size, 3), level, np.uint8) for level in (10, 240))
    dark, light = (av.VideoFrame.from_ndarray(level, "rgb24").reformat(format=pixel_format) for level in levels)
    first = preprocess(dark)
    was = first.copy()
    preprocess(light)
    assert (first == was).all()
    assert first.flags.c_contiguous
    assert first.flags.writeable
    first[:] = 77
    assert (preprocess(dark) == was).all()


def with_graph(frame_size: tuple[int, int], frame: av.VideoFrame, fit: Fit = "crop") -> tuple[np.ndarray, bool]:
    """A frame through a filter graph, if that is possible, and whether it was."""
    preprocess = FramePreprocessor(frame_size, fit, graph_after=0)
    return preprocess(frame), preprocess.uses_graph


def noisy(pixel_format: str, width: int, height: int, seed: int = 0) -> av.VideoFrame:
    frame = av.VideoFrame(width, height, pixel_format)
    for channel, plane in enumerate(frame.planes):
        values = np.random.default_rng((seed, channel)).integers(0, 256, plane.buffer_size, np.uint8)
        np.frombuffer(plane, np.uint8)[:] = values
    return frame


@pytest.mark.parametrize("size", [(160, 120), (96, 200), (182, 64), (65, 49), (162, 121), (120, 120)])
@pytest.mark.parametrize("pixel_format", [*CROPPABLE, "rgb24", "rgba", "yuva420p", "nv12", "yuv420p10le", "gray16le"])
def test_both_paths_give_the_same(pixel_format, size):
    """Every color range, shrunk, enlarged and as it is; through the graph wherever chroma can be cut at its edges."""
    frame, sliced = noisy(pixel_format, *size), False
    for side in (32, min(size), min(size) + 2, 150):
        for tag in (0, 1, 2):
            frame.color_range = tag
            pixels, through = with_graph((side, side), frame)
            assert (pixels == square(side)(frame)).all(), (side, tag)
            sliced |= through
    sliceable = size in ((160, 120), (96, 200)) and pixel_format not in ("yuv410p", "yuv411p")
    for frame_size, fit in itertools.product(((32, 64), (64, 32)), FITS):
        pixels, through = with_graph(frame_size, frame, fit)
        assert (pixels == FramePreprocessor(frame_size, fit)(frame)).all(), (frame_size, fit)
        assert through or fit != "crop" or not (sliceable and pixel_format in CROPPABLE), frame_size
    if pixel_format not in CROPPABLE or size[0] == size[1]:
        assert not sliced
    elif sliceable or pixel_format in ("gray", "gbrp", "yuv444p"):
        assert sliced


@pytest.mark.parametrize("colorspace", [0, 1, 2, 4, 5, 6, 7, 9])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuvj422p", "yuv444p", "gray"])
def test_both_paths_use_the_same_color_matrices(pixel_format, colorspace):
    frame = noisy(pixel_format, 80, 60)
    frame.colorspace = colorspace
    for tag in (0, 1, 2):
        frame.color_range = tag
        pixels, through = with_graph((32, 32), frame)
        assert through
        assert (pixels == square(32)(frame)).all(), tag


@pytest.mark.parametrize(
    "tags",
    ["field_mode=tff", "chroma_location=left", "chroma_location=topleft", "color_trc=smpte2084:color_primaries=bt2020"],
)
def test_both_paths_ignore_other_tags(tags):
    frame, graph = noisy("yuv420p", 80, 60), av.filter.Graph()
    plain = square(32)(frame)
    source = graph.add("buffer", video_size="80x60", pix_fmt="yuv420p", time_base="1/1")
    tag, sink = graph.add("setparams", tags), graph.add("buffersink")
    graph.link_nodes(source, tag, sink).configure()
    source.push(frame)
    tagged = sink.pull()
    assert tagged.interlaced_frame == ("field" in tags)
    assert (square(32)(tagged) == plain).all()
    pixels, through = with_graph((32, 32), tagged)
    assert through
    assert (pixels == plain).all()


def test_every_frame_gives_one_whatever_its_timestamp():
    """No timestamps, equal ones, backward ones; over the place where a graph takes over, and back and forth."""
    frames = [noisy("yuv420p", *((80, 60) if number % 90 < 70 else (60, 80)), seed=number) for number in range(180)]
    for frame, pts in zip(frames, [None, 7, 7, 100, 3, -5, 0, 1 << 40] * 30, strict=False):
        frame.pts = pts
    preprocess, ways = square(32), []
    for number, frame in enumerate(frames):
        frame.color_range = 2 if number >= 135 else 1
        assert (preprocess(frame) == square(32)(frame)).all(), number
        ways.append(preprocess.uses_graph)
    # After 32 of a kind: the kind changes at 70, 90, 135 and 160.
    assert [number for number in range(180) if ways[number]] == [*range(32, 70), *range(122, 135)]


def test_large_frames_are_copied():
    assert with_graph((32, 32), noisy("yuv420p", 1024, 512))[1]
    assert not with_graph((32, 32), noisy("yuv420p", 1028, 512))[1]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 2), (3, 5)])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv410p", "gray", "rgb24"])
def test_tiniest_frames(pixel_format, size):
    frame = av.VideoFrame(*size, pixel_format)
    for plane in frame.planes:
        np.frombuffer(plane, np.uint8)[:] = 128
    assert square(8)(frame).shape == (8, 8, 3)


def test_the_description_of_existing_stores():
    """It is part of fingerprints: its words must not change."""
    assert preprocessing_description(DatasetConfig(name="a", source="videos", image_size=64, frame_step=2)) == {
        "image_size": 64,
        "crop": "centred square of the short side, offset (long - short) // 2",
        "resize_filter": "area",
        "upscale_filter": "bicubic",
        "frame_step": 2,
        "colour": "RGB, 8 bit, full range",
    }


def test_every_shape_and_fit_has_its_own_description():
    shapes = itertools.product((64, [64, 128], [128, 64]), FITS)
    described = [
        json.dumps(preprocessing_description(DatasetConfig(name="a", source="videos", image_size=size, fit=fit)))
        for size, fit in shapes
    ]
    assert len(set(described)) == 9
