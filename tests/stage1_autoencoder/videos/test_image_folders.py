"""Folders of frames: natural order, every kind of picture, damage."""

import numpy as np
import pytest
from PIL import Image

from stage1_autoencoder.videos.image_folders import decode_folder, list_frames, probe_folder
from stage1_autoencoder.videos.source import BrokenVideoError


def arrays(folder, first, stop, step=1):
    return [frame.to_ndarray(format="rgb24") for frame in decode_folder(folder, "v", first, stop, step)]


@pytest.mark.parametrize("pattern", ["{}.png", "frame_{}.jpg", "{}.JPEG", "a{}b.png"])
def test_natural_order_whatever_the_names(make_frames, read_numbers, pattern):
    folder = make_frames("v", 13, pattern)
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    assert len(list_frames(folder)) == 13
    probe = probe_folder(folder, "v")
    assert (probe.frames, probe.width, probe.height) == (13, 20, 16)
    assert read_numbers(arrays(folder, 0, 13)) == list(range(13))
    assert read_numbers(arrays(folder, 2, 12, 4)) == [2, 6, 10]


def test_pictures_of_every_mode(tmp_path):
    rng = np.random.default_rng(0)
    rgb, grey = rng.integers(0, 256, (9, 7, 3), np.uint8), rng.integers(0, 256, (9, 7), np.uint8)
    Image.fromarray(rgb).save(tmp_path / "0.png")
    Image.fromarray(grey).save(tmp_path / "1.png")
    Image.fromarray(grey.astype(np.uint16) << 8 | 200).save(tmp_path / "2.png")  # 16 bits
    Image.fromarray(np.dstack([rgb, grey])).save(tmp_path / "3.png")
    Image.fromarray(grey // 2).convert("P").save(tmp_path / "4.png")
    threefold = np.repeat(grey[..., None], 3, 2)
    right = [rgb, threefold, threefold, rgb, threefold // 2]
    for result, wanted in zip(arrays(tmp_path, 0, 5), right, strict=True):
        assert (result == wanted).all()


def test_frames_that_are_not_kept_are_not_opened(make_frames, read_numbers):
    folder = make_frames("v", 6)
    for number in (1, 3, 5):
        (folder / f"{number}.png").write_bytes(b"damaged")
    assert read_numbers(arrays(folder, 0, 6, 2)) == [0, 2, 4]


def test_damage_is_named(make_frames):
    folder = make_frames("v", 4)
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[:-30])
    with pytest.raises(BrokenVideoError, match=r"v: 2\.png"):
        arrays(folder, 0, 4)
    (folder / "2.png").write_bytes(b"")
    with pytest.raises(BrokenVideoError, match=r"v: 2\.png .*empty"):
        probe_folder(folder, "v")
    (folder / "2.png").write_bytes(whole)
    (folder / "0.png").write_text("text")
    with pytest.raises(BrokenVideoError, match=r"v: 0\.png"):
        probe_folder(folder, "v")


def test_different_sizes_and_missing_frames(make_frames):
    folder = make_frames("v", 3)
    Image.new("RGB", (20, 17)).save(folder / "1.png")
    with pytest.raises(BrokenVideoError, match=r"v: 1\.png .*20x17.*20x16"):
        arrays(folder, 0, 3)
    with pytest.raises(BrokenVideoError, match=r"v: .* 3 .* 5"):
        arrays(folder, 0, 5)
