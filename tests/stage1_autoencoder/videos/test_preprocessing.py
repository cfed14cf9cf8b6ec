"""Frames against float64 arithmetic: area filter, crop, color matrices and ranges. And both paths through swscale."""

import av
import av.filter
import numpy as np
import pytest

from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.preprocessing import FramePreprocessor, preprocessing_description
from tests.stage1_autoencoder.videos.conftest import centered_square

BT601 = np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]])
BT709 = np.array([[1, 0, 1.5748], [1, -0.187324, -0.468124], [1, 1.8556, 0]])
# Half a level of the last rounding, and 15 bits before it for each of the scaler's passes. This is integer arithmetic,
# so the error does not depend on the processor.
ROUNDING = 0.6
CROPPABLE = [f"yuv{jpeg}{chroma}p" for jpeg in ("", "j") for chroma in (420, 422, 440, 444)]
CROPPABLE += ["yuv410p", "yuv411p", "gray", "gbrp"]


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
    difference = FramePreprocessor(64)(frame) - centered_square(to_rgb(yuv, BT601, "j" in pixel_format), 64)
    assert np.abs(difference).max() < ROUNDING
    assert abs(difference.mean()) < 0.05
    frame.colorspace = 1  # AVCOL_SPC_BT709
    difference = FramePreprocessor(64)(frame) - centered_square(to_rgb(yuv, BT709, "j" in pixel_format), 64)
    assert np.abs(difference).max() < ROUNDING


@pytest.mark.parametrize(("kind", "mean_square"), [("smooth", 0.5), ("noise", 2.5)])
def test_chroma_coarser_than_the_output_is_interpolated(kind, mean_square):
    frame, yuv = yuv_frame("yuv420p", 160, 120, kind)  # 60 chroma samples become 64
    difference = FramePreprocessor(64)(frame) - centered_square(to_rgb(yuv, BT601, False), 64)
    assert np.sqrt(np.mean(difference**2)) < mean_square


@pytest.mark.parametrize("size", [(120, 120), (160, 120), (65, 49), (49, 65), (501, 333)])
@pytest.mark.parametrize("pixel_format", ["rgb24", "bgr24", "rgba", "gbrp"])
def test_rgb_is_averaged_exactly(pixel_format, size):
    rgb = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    frame = av.VideoFrame.from_ndarray(rgb, "rgb24").reformat(format=pixel_format)
    frame.color_range = size[0] % 3  # a tag that means nothing for RGB: unknown, limited or full
    assert np.abs(FramePreprocessor(32)(frame) - centered_square(rgb, 32)).max() < ROUNDING


@pytest.mark.parametrize(("tag", "full_range"), [(None, False), (1, False), (2, True)])
def test_gray_stays_gray_and_fills_the_range(tag, full_range):
    preprocess = FramePreprocessor(16)
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
    result = FramePreprocessor(64)(frame)
    assert (result == result[..., :1]).all()
    assert np.abs(result - centered_square(np.repeat(noise[..., None], 3, 2), 64)).max() < ROUNDING


def test_crop_is_exact_to_the_pixel():
    rgb = np.random.default_rng(0).integers(0, 256, (48, 67, 3), np.uint8)
    result = FramePreprocessor(48)(av.VideoFrame.from_ndarray(rgb, "rgb24"))
    assert (result == rgb[:, 9:57]).all()
    square = rgb[:20, :20].copy()  # rows that FFmpeg pads
    assert (FramePreprocessor(20)(av.VideoFrame.from_ndarray(square, "rgb24")) == square).all()


def test_small_frames_are_enlarged_smoothly():
    def wave(side: int) -> np.ndarray:
        x = (np.arange(side) + 0.5) / side
        return 128 + 60 * np.sin(6 * x)[:, None] * np.cos(5 * x)

    rgb = np.repeat(wave(40).round().astype(np.uint8)[..., None], 3, 2)
    result = FramePreprocessor(64)(av.VideoFrame.from_ndarray(rgb, "rgb24"))
    assert np.abs(result[..., 0] - wave(64))[3:-3, 3:-3].max() < 1.5
    flat = FramePreprocessor(64)(av.VideoFrame.from_ndarray(np.full((9, 9, 3), 77, np.uint8), "rgb24"))
    assert (flat == 77).all()


@pytest.mark.parametrize("tag", [0, 1])
def test_ten_bits_are_scaled(tag):
    frame = av.VideoFrame(64, 48, "yuv420p10le")
    frame.color_range = tag
    for plane, value in zip(frame.planes, (500, 512, 512), strict=True):
        np.frombuffer(plane, np.uint16)[:] = value
    result = FramePreprocessor(32)(frame)
    assert (result == result[..., :1]).all()
    assert np.abs(result - (500 / 4 - 16) * 255 / 219).max() < 1


@pytest.mark.parametrize("graph_after", [0, 99])
@pytest.mark.parametrize("size", [(20, 30), (8, 8)])
@pytest.mark.parametrize("pixel_format", ["rgb24", "gbrp", "gray"])
def test_results_are_arrays_of_their_own(pixel_format, size, graph_after):
    preprocess = FramePreprocessor(8, graph_after)
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


def with_graph(image_size: int, frame: av.VideoFrame) -> tuple[np.ndarray, bool]:
    """A frame through a filter graph, if that is possible, and whether it was."""
    preprocess = FramePreprocessor(image_size, graph_after=0)
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
    for image_size in (32, min(size), min(size) + 2, 150):
        for tag in (0, 1, 2):
            frame.color_range = tag
            pixels, through = with_graph(image_size, frame)
            assert (pixels == FramePreprocessor(image_size)(frame)).all(), (image_size, tag)
            sliced |= through
    sliceable = size in ((160, 120), (96, 200)) and pixel_format not in ("yuv410p", "yuv411p")
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
        pixels, through = with_graph(32, frame)
        assert through
        assert (pixels == FramePreprocessor(32)(frame)).all(), tag


@pytest.mark.parametrize(
    "tags",
    ["field_mode=tff", "chroma_location=left", "chroma_location=topleft", "color_trc=smpte2084:color_primaries=bt2020"],
)
def test_both_paths_ignore_other_tags(tags):
    frame, graph = noisy("yuv420p", 80, 60), av.filter.Graph()
    plain = FramePreprocessor(32)(frame)
    source = graph.add("buffer", video_size="80x60", pix_fmt="yuv420p", time_base="1/1")
    tag, sink = graph.add("setparams", tags), graph.add("buffersink")
    graph.link_nodes(source, tag, sink).configure()
    source.push(frame)
    tagged = sink.pull()
    assert tagged.interlaced_frame == ("field" in tags)
    assert (FramePreprocessor(32)(tagged) == plain).all()
    pixels, through = with_graph(32, tagged)
    assert through
    assert (pixels == plain).all()


def test_every_frame_gives_one_whatever_its_timestamp():
    """No timestamps, equal ones, backward ones; over the place where a graph takes over, and back and forth."""
    frames = [noisy("yuv420p", *((80, 60) if number % 90 < 70 else (60, 80)), seed=number) for number in range(180)]
    for frame, pts in zip(frames, [None, 7, 7, 100, 3, -5, 0, 1 << 40] * 30, strict=False):
        frame.pts = pts
    preprocess, ways = FramePreprocessor(32), []
    for number, frame in enumerate(frames):
        frame.color_range = 2 if number >= 135 else 1
        assert (preprocess(frame) == FramePreprocessor(32)(frame)).all(), number
        ways.append(preprocess.uses_graph)
    # After 32 of a kind: the kind changes at 70, 90, 135 and 160.
    assert [number for number in range(180) if ways[number]] == [*range(32, 70), *range(122, 135)]


def test_large_frames_are_copied():
    assert with_graph(32, noisy("yuv420p", 1024, 512))[1]
    assert not with_graph(32, noisy("yuv420p", 1028, 512))[1]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 2), (3, 5)])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv410p", "gray", "rgb24"])
def test_tiniest_frames(pixel_format, size):
    frame = av.VideoFrame(*size, pixel_format)
    for plane in frame.planes:
        np.frombuffer(plane, np.uint8)[:] = 128
    assert FramePreprocessor(8)(frame).shape == (8, 8, 3)


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
