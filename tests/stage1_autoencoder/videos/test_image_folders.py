"""Folders of frames: natural order, every kind of picture, damage."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from stage1_autoencoder.videos import open_source, open_video
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.image_folders import decode_folder, list_frames, probe_folder, probe_webp
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
    on_black = rgb.astype(np.float64) * grey[..., None] / 255
    right = [rgb, threefold, threefold, on_black, threefold // 2]
    for result, wanted in zip(arrays(tmp_path, 0, 5), right, strict=True):
        assert np.abs(result - wanted).max() <= 0.51


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


def png_of_size(side: int) -> bytes:
    """A small PNG whose header promises a very large picture."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    content = io.BytesIO()
    Image.new("RGB", (2, 2)).save(content, "PNG")
    return content.getvalue()[:8] + header + content.getvalue()[33:]


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize(
    "content", [png_of_size(100_000), png_of_size(20_000), b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"GIF89a"]
)
def test_a_picture_that_pillow_refuses_costs_its_video_alone(tmp_path, make_frames, content, at):
    make_frames("data/good", 3)
    (make_frames("data/bad", 3) / f"{at}.png").write_bytes(content)
    dataset = DatasetConfig(name="a", source="videos", root=str(tmp_path / "data"), image_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        source = open_source(dataset, "", "train")
        if at == 0:
            assert [video.id for video in source.skipped] == ["bad"]
        else:
            assert [video.id for video in source.videos] == ["bad", "good"]
            with pytest.raises(BrokenVideoError, match=r"bad: 1\.png"):
                source.read(0)
        assert source.read(len(source.videos) - 1).shape == (3, 8, 8, 3)


def test_a_single_webp_is_no_video(tmp_path):
    path = tmp_path / "cover.webp"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(BrokenVideoError, match=r"cover\.webp: .*single picture"):
        open_video(DatasetConfig(name="a", source="videos", image_size=8), path)


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_a_webp_that_is_cut_off(tmp_path, share):
    noise = [Image.fromarray(pixels) for pixels in np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3), np.uint8)]
    noise[0].save(tmp_path / "a.webp", save_all=True, append_images=noise[1:], lossless=True)
    assert probe_webp(tmp_path / "a.webp", "a").frames == 6
    content = (tmp_path / "a.webp").read_bytes()
    (tmp_path / "a.webp").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BrokenVideoError, match="a: "):
        probe_webp(tmp_path / "a.webp", "a")
