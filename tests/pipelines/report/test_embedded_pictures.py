"""Pictures of the report: frames read back from GIFs, and embedded within a budget."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.prediction.pictures import GRAY, RED, Strip, animation, clip_strips, save_gif
from pipelines.report.embedded_pictures import (
    MAX_SHEET_WIDTH,
    encode_all,
    fitting_divisor,
    fitting_frames,
    read_clip,
    sheet,
    shrunk,
)


def noise(*shape: int, levels: int = 6, seed: int = 0) -> np.ndarray:
    """Few grey values, so that a GIF holds all of them."""
    grey = np.random.default_rng(seed).integers(0, levels, shape) * 40
    return np.repeat(grey[..., None], 3, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("side", [16, 32, 64, 128])
def test_frames_are_read_back_from_a_clip(tmp_path: Path, side: int):
    truth, ours, other = (noise(5, side, side, seed=seed) for seed in range(3))
    strips = [*clip_strips(truth, ours, 2), Strip("sample 2", other, 2, RED)]
    save_gif(tmp_path / "a.gif", animation([("a", strips)]), fps=10)
    found = read_clip(tmp_path / "a.gif", side, 5)
    for video, expected in zip(found, (truth, ours, other), strict=True):
        assert video.shape == expected.shape
        assert np.abs(video.astype(int) - expected).max() <= 8


@pytest.mark.parametrize("equal", [(0, 1), (3, 4), (0, 1, 2, 3, 4), (2, 3, 4)])
def test_equal_neighbors_are_read_back(tmp_path: Path, equal: tuple[int, ...]):
    truth = noise(5, 32, 32)
    truth[list(equal)] = truth[equal[0]]
    strips = [Strip("truth", truth, 0, GRAY), Strip("prediction", truth, 0, RED)]
    save_gif(tmp_path / "a.gif", animation([("a", strips)]), fps=25)
    assert np.abs(read_clip(tmp_path / "a.gif", 32, 5)[1].astype(int) - truth).max() <= 8


def test_other_pictures_are_refused(tmp_path: Path):
    save_gif(tmp_path / "a.gif", animation([("a", clip_strips(noise(4, 32, 32), noise(4, 32, 32), 1))]), fps=10)
    (tmp_path / "b.gif").write_bytes(b"GIF89a, cut short")
    for name, side, length in (("a", 64, 4), ("a", 32, 5), ("b", 32, 4), ("none", 32, 4)):
        with pytest.raises(ValueError, match=re.escape(f"{name}.gif: ")):
            read_clip(tmp_path / f"{name}.gif", side, length)


def test_pictures_are_lossless_where_there_is_room_and_fit_where_there_is_not():
    def size(url: str) -> int:
        return len(base64.b64decode(url.partition(",")[2]))

    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    (url,) = encode_all([picture], 10**6)
    assert url.startswith("data:image/webp;base64,")
    decoded = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert (np.asarray(decoded.convert("RGB")) == picture).all()
    fitted = encode_all([picture, picture], size(url))
    assert 0 < sum(map(size, fitted)) <= size(url)
    with pytest.raises(ValueError, match="100"):
        encode_all([picture], 100)


@pytest.mark.parametrize(("length", "side"), [(30, 64), (40, 256), (1000, 256), (16, 1024), (5, 97)])
def test_sheets_stay_small_enough_for_a_phone(length: int, side: int):
    kept, divisor = fitting_frames(length, side), fitting_divisor(side)
    assert side % divisor == 0
    assert len(kept) * side // divisor <= MAX_SHEET_WIDTH
    assert (kept[0], kept[-1]) == (0, length - 1)
    assert len(kept) == length or length == 1000


def test_large_frames_are_shrunk_by_means_and_lie_side_by_side():
    video = noise(3, 8, 8)
    assert (shrunk(video) == video).all()
    large = noise(2, 512, 512)
    means = large.astype(float).reshape(2, 256, 2, 256, 2, 3).mean((2, 4))
    np.testing.assert_allclose(shrunk(large), means, atol=0.5)
    assert (sheet([video, video])[8:16, 16:24] == video[2]).all()
