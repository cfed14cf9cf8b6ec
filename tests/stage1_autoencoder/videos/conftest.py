"""Tiny videos that the tests encode themselves, and the exact answers to compare with."""

from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import pytest


def encode(path: Path, frames: Sequence[np.ndarray], codec: str = "mpeg4", rate: int = 10, **options: str) -> Path:
    """Encode [h, w, 3] uint8 frames; the extension chooses the container."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixel_format = {"gif": "rgb8", "mjpeg": "yuvj420p", "ffv1": "bgr0"}.get(codec, "yuv420p")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixel_format
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format=pixel_format)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def brightening(count: int, width: int = 64, height: int = 48) -> list[np.ndarray]:
    """Flat grey frames from which the frame number can be read back: brightness 20 + 14 x number, for 16 at most."""
    return [np.full((height, width, 3), 20 + 14 * number, np.uint8) for number in range(count)]


def numbers(frames: Sequence[np.ndarray] | np.ndarray) -> list[int]:
    """Frame numbers of `brightening` frames, read back."""
    return [round((float(np.mean(frame)) - 20) / 14) for frame in frames]


@pytest.fixture
def make_video(tmp_path: Path) -> Callable[..., Path]:
    """Encode `count` brightening frames into a file below the test's folder."""

    def make(
        name: str, count: int = 5, codec: str = "mpeg4", width: int = 64, height: int = 48, **options: str
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
