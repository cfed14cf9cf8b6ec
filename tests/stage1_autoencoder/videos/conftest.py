"""Tiny videos that the tests encode themselves, and the exact answers to compare with."""

import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from stage1_autoencoder.videos.config import Fit
from stage1_autoencoder.videos.source import VideoSource


def encode(
    path: Path,
    frames: Sequence[np.ndarray],
    codec: str = "mpeg4",
    pts: Sequence[int] | None = None,
    rate: int | Fraction = 10,
    **options: str,
) -> Path:
    """Encode [h, w, 3] uint8 frames, at times of 0, 1, 2 ... unless given; the extension chooses the container."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixel_format = {"gif": "rgb8", "mjpeg": "yuvj420p", "ffv1": "bgr0"}.get(codec, "yuv420p")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixel_format
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format=pixel_format)
            frame.pts = pts[number] if pts else number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_pictures(path: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    """Write a video of JPEG pictures of the given sizes, all of which are keyframes."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = *sizes[0], "yuvj420p"
        for number, size in enumerate(sizes):
            picture = io.BytesIO()
            Image.new("RGB", size).save(picture, "JPEG")
            packet = av.Packet(picture.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 10)
            packet.is_keyframe = True
            container.mux(packet)
    return path


def ids(sources: dict[str, VideoSource]) -> dict[str, list[str]]:
    """Names of the videos of each split."""
    return {split: [video.id for video in source.videos] for split, source in sources.items()}


def brightening(count: int, width: int = 64, height: int = 48) -> list[np.ndarray]:
    """Flat grey frames from which the frame number can be read back: brightness 20 + 14 x number, for 16 at most."""
    return [np.full((height, width, 3), 20 + 14 * number, np.uint8) for number in range(count)]


def numbers(frames: Sequence[np.ndarray] | np.ndarray) -> list[int]:
    """Frame numbers of `brightening` frames, read back."""
    return [round((float(np.mean(frame)) - 20) / 14) for frame in frames]


def area_weights(source: int, target: int) -> np.ndarray:
    """[target, source]: the share of each source pixel in the footprint of each target pixel."""
    edges, pixels = np.linspace(0, source, target + 1), np.arange(source)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.clip(overlap, 0, None) * target / source


def fitted(rgb: np.ndarray, frame_size: tuple[int, int], fit: Fit) -> np.ndarray:
    """Centered crop, bars or neither, and exact area average of [h, w, 3], as shown, in float64."""
    height, width = rgb.shape[:2]
    tall, wide = frame_size
    if fit == "crop":
        scale = min(height / tall, width / wide)
        down, across = round(tall * scale), round(wide * scale)
        top, left = (height - down) // 2, (width - across) // 2
        rgb = rgb[top : top + down, left : left + across]
    if fit == "pad":
        scale = max(height / tall, width / wide)
        tall, wide = round(height / scale), round(width / scale)
    rows, columns = area_weights(rgb.shape[0], tall), area_weights(rgb.shape[1], wide)
    resized = np.clip(np.einsum("yi,ijc,xj->yxc", rows, rgb.astype(np.float64), columns, optimize=True), 0, 255)
    above, before = (frame_size[0] - tall) // 2, (frame_size[1] - wide) // 2
    return np.pad(resized, ((above, frame_size[0] - tall - above), (before, frame_size[1] - wide - before), (0, 0)))


def centered_square(rgb: np.ndarray, size: int) -> np.ndarray:
    """Centered crop and exact area average of [h, w, 3] in float64."""
    return fitted(rgb, (size, size), "crop")


@pytest.fixture
def make_video(tmp_path: Path) -> Callable[..., Path]:
    """Encode `count` brightening frames into a file below the test's folder."""

    def make(
        name: str, count: int = 5, codec: str = "mpeg4", width: int = 64, height: int = 48, **options: object
    ) -> Path:
        return encode(tmp_path / name, brightening(count, width, height), codec, **options)

    return make


@pytest.fixture
def make_frames(tmp_path: Path) -> Callable[..., Path]:
    """Write `count` brightening frames as pictures into a folder below the test's folder."""

    def make(name: str, count: int = 5, pattern: str = "{}.png", width: int = 20, height: int = 16) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, pixels in enumerate(brightening(count, width, height)):
            av.VideoFrame.from_ndarray(pixels, "rgb24").to_image().save(folder / pattern.format(number))
        return folder

    return make


@pytest.fixture
def read_numbers() -> Callable[..., list[int]]:
    return numbers


@pytest.fixture
def encode_frames() -> Callable[..., Path]:
    return encode
