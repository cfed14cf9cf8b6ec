"""Clips of the report: frames read back from GIFs, and pictures embedded within a budget."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.prediction.pictures import RED, Strip, animation, clip_strips, save_gif
from pipelines.report import predictions
from pipelines.report.predictions import picture_url, read_clip


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Few gray values, so that a GIF holds all of them."""
    gray = np.random.default_rng(seed).integers(0, 6, shape) * 40
    return np.repeat(gray[..., None], 3, axis=-1).astype(np.uint8)


@pytest.mark.parametrize(("frame_size", "equal"), [
    ((16, 16), []), ((24, 40), []), ((128, 72), []), ((32, 32), [0, 1]), ((32, 32), [3, 4]), ((32, 32), [2, 3, 4]),
    ((32, 32), [0, 1, 2, 3, 4]),
])  # fmt: skip
def test_frames_are_read_back_from_a_clip(tmp_path: Path, frame_size: tuple[int, int], equal: list[int]):
    """Also where a GIF holds equal neighbors as one frame that is shown for longer."""
    truth, ours, other = (noise(5, *frame_size, seed=seed) for seed in range(3))
    for video in (truth, ours, other):
        video[equal] = video[equal[:1]]
    strips = [*clip_strips(truth, ours, 2), Strip("sample 2", other, 2, RED)]
    if equal:
        strips = [Strip(name, video, 0, RED) for name, video in (("a", truth), ("b", ours), ("c", other))]
    for fps in (0.4, 10, 29.97):
        save_gif(tmp_path / "a.gif", animation([("a", strips)]), fps)
        found = read_clip(tmp_path / "a.gif", frame_size, 5, fps)
        for video, expected in zip(found, (truth, ours, other), strict=True):
            assert np.abs(video.astype(int) - expected).max() <= 8


def test_frames_that_a_fast_gif_leaves_out_are_those_before(tmp_path: Path):
    truth, ours = (noise(8, 32, 32, seed=seed) for seed in range(2))
    save_gif(tmp_path / "a.gif", animation([("a", clip_strips(truth, ours, 2))]), 100)
    for video, expected in zip(read_clip(tmp_path / "a.gif", (32, 32), 8, 100), (truth, ours), strict=True):
        assert np.abs(video.astype(int) - expected[[0, 0, 2, 2, 4, 4, 6, 7]]).max() <= 8


@pytest.mark.parametrize(
    ("name", "frame_size", "length", "fps"),
    [
        ("a", (64, 64), 4, 10),
        ("a", (16, 32), 4, 10),
        ("a", (32, 32), 5, 10),
        ("a", (32, 32), 5, 12.5),
        ("b", (32, 32), 4, 10),
        ("none", (32, 32), 4, 10),
    ],
)
def test_other_pictures_are_refused(tmp_path: Path, name: str, frame_size: tuple[int, int], length: int, fps: float):
    save_gif(tmp_path / "a.gif", animation([("a", clip_strips(noise(4, 32, 32), noise(4, 32, 32), 1))]), fps=10)
    (tmp_path / "b.gif").write_bytes(b"GIF89a, cut short")
    with pytest.raises((OSError, ValueError)):
        read_clip(tmp_path / f"{name}.gif", frame_size, length, fps)


def test_pictures_are_lossless_where_there_is_room_and_fit_where_there_is_not(monkeypatch: pytest.MonkeyPatch):
    def content(url: str) -> bytes:
        assert url.startswith("data:image/webp;base64,")
        return base64.b64decode(url.partition(",")[2])

    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    lossless = content(picture_url(picture))
    assert (np.asarray(Image.open(io.BytesIO(lossless)).convert("RGB")) == picture).all()
    monkeypatch.setattr(predictions, "PICTURE_BUDGET", len(lossless) // 2)
    assert 0 < len(content(picture_url(picture))) <= len(lossless) // 2
    monkeypatch.setattr(predictions, "PICTURE_BUDGET", 100)
    with pytest.raises(ValueError, match="100"):
        picture_url(picture)
