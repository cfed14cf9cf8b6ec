"""Damaged chunks of latents and codes, in files and shards, here and behind a URL, name their file and their videos."""

import re
import struct
from collections.abc import Callable

import dask.array
import numpy as np
import pytest
import zarr

import latent_cache
from latent_cache import CorruptStoreError, DamagedFramesError, LatentCache
from tests.latent_cache.conftest import flip_a_bit

DAMAGES = {
    "flipped bit": (flip_a_bit, "is damaged"),
    "flipped bit in the padding": (lambda file: flip_a_bit(file, -10), "is damaged"),  # of chunk 5, 2 frames of 4
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-7]), "truncated .*189 bytes, expected 196"),
    "no checksum": (lambda file: file.write_bytes(file.read_bytes()[:-4]), "truncated .*192 bytes"),
    "overlong": (lambda file: file.write_bytes(file.read_bytes() + b"x"), "overlong: 197 bytes"),
    "empty": (lambda file: file.write_bytes(b""), "is empty"),
    "missing": (lambda file: file.unlink(), "is missing"),
}


def read_chunk(cache: LatentCache, index: int) -> None:
    frames = min(4, cache.frames - 4 * index)
    cache.latent_reader.read_chunk(index, np.empty((frames, *cache.latent_shape), np.float16))


def first_damage(cache: LatentCache) -> None:
    raise next(damage for damage in cache.latent_reader.damages() if damage is not None)


VIDEO_IN = {1: "clip-01", 5: "clip-04"}  # by chunk
READINGS = {
    "load": lambda cache, index: cache.load(),  # looks at sizes first
    "chunk": read_chunk,
    "video": lambda cache, index: cache.video(VIDEO_IN[index]),  # by zarr
    "window": lambda cache, index: cache.latent_reader.read_window(4 * index, 4 * index + 1),
    "damages": lambda cache, index: first_damage(cache),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("index", [1, 5])
@pytest.mark.parametrize("remote", [False, True], ids=["file", "url"])
def test_a_damaged_chunk_names_its_file_and_its_videos(toys, publish, damage, index, remote) -> None:
    break_it, message = DAMAGES[damage]
    break_it(toys / f"train/latents/c/{index}/0/0/0")
    url = publish(toys) if remote else str(toys)
    cache = latent_cache.open(url)
    for read in READINGS.values():
        with pytest.raises(DamagedFramesError, match=rf"{message}.*--overwrite") as raised:
            read(cache, index)
        error = raised.value
        assert error.file == f"{url}/train/latents/c/{index}/0/0/0"
        assert f"{error.file} {error.what}" in str(error)
        assert f"1 video(s): '{VIDEO_IN[index]}'" in str(error)
        assert (error.start, error.stop) == (4 * index, min(4 * index + 4, 22))


def test_many_missing_chunks_are_counted(kit, tmp_path) -> None:
    path = kit.build(tmp_path / "many.zarr", {"train": kit.plan([1] * 20)})
    for index in (1, 2, 4):
        (path / f"train/latents/c/{index}/0/0/0").unlink()
    with pytest.raises(CorruptStoreError, match=r"c/1/0/0/0 is missing .*3 of 5.*4 video\(s\): 'clip-04', .*'clip-06'"):
        latent_cache.open(path).load()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_behind_a_right_checksum_is_refused(toys, value) -> None:
    latent_cache.unseal(toys)
    zarr.open_array(toys / "train/latents", mode="r+")[5, 1, 2, 3] = value
    cache = latent_cache.open(toys)
    for reading in READINGS.values():
        with pytest.raises(CorruptStoreError, match=r"c/1/0/0/0 .*NaN or infinity.*'clip-01'"):
            reading(cache, 1)
    assert np.isfinite(cache.video("clip-04")).all()


@pytest.mark.parametrize("frame", [0, 39])
def test_nan_anywhere_in_a_large_chunk_is_found(kit, tmp_path, frame) -> None:
    """A chunk of 1.25 MiB is read in two blocks."""
    kit.shape = (4, 64, 64)
    path = kit.build(tmp_path / "large.zarr", {"train": kit.plan([40], chunk_frames=40)}, codes=False)
    zarr.open_array(path / "train/latents", mode="r+")[frame, 1, 2, 3] = np.nan
    with pytest.raises(CorruptStoreError, match=r"c/0/0/0/0 .*NaN"):
        latent_cache.open(path).load()


@pytest.mark.parametrize("remote", [False, True], ids=["file", "url"])
def test_damaged_codes(toys, publish, damage, remote) -> None:
    damage(toys / "train/codes/c/1/0/0")
    cache = latent_cache.open(publish(toys) if remote else toys)
    with pytest.raises(CorruptStoreError, match=r"codes/c/1/0/0 .*'clip-01'"):
        cache.video_codes("clip-01")
    assert [damage is None for damage in cache.code_reader.damages()] == [True, False, True, True, True, True]


# Shards


def test_shards_hold_what_chunks_hold(kit, tmp_path, shards, publish) -> None:
    path = kit.build(tmp_path / "shards.zarr", shards)
    plain = kit.build(tmp_path / "plain.zarr", {split: kit.plan(plan.lengths) for split, plan in shards.items()})
    for split, files in (("train", 3), ("test", 1)):
        ours, theirs = latent_cache.open(path, split), latent_cache.open(plain, split)
        assert (ours.latents.chunks[0], ours.latents.shards[0]) == (4, 12)
        assert len(list((path / split / "latents/c").iterdir())) == files
        expected = theirs.load().numpy()
        remote = latent_cache.open(publish(path), split)
        for loaded in (ours.load().numpy(), remote.load().numpy(), ours.latents[:], dask.array.from_zarr(ours.latents)):
            np.testing.assert_array_equal(loaded, expected)
        np.testing.assert_array_equal(ours.codes[:], theirs.codes[:])
        assert ours.fingerprint == theirs.fingerprint


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(b""), "is empty"),
        (lambda file: file.write_bytes(file.read_bytes()[:-30]), "is truncated"),
        (lambda file: file.write_bytes(file.read_bytes()[:300]), "is truncated"),
        (lambda file: flip_a_bit(file, 10), "is damaged"),
        (lambda file: flip_a_bit(file, -10), "is damaged"),  # the index of its chunks
    ],
)
@pytest.mark.parametrize("remote", [False, True], ids=["file", "url"])
def test_a_damaged_shard_is_named(kit, tmp_path, shards, publish, damage: Callable, message: str, remote: bool) -> None:
    """Its second file has frames 12 to 23: of the fourth, fifth and sixth video."""
    path = kit.build(tmp_path / "shards.zarr", shards)
    damage(path / "train/latents/c/1/0/0/0")
    cache = latent_cache.open(publish(path) if remote else path)
    cache.video(0)  # in another file
    for read in (cache.load, lambda: read_chunk(cache, 3), lambda: first_damage(cache)):
        with pytest.raises(CorruptStoreError, match=rf"train/latents/c/1/0/0/0 {message}.*clip-03") as raised:
            read()
        assert "clip-00" not in str(raised.value)
        by_size = read == cache.load and message != "is damaged"  # then the whole file is known to be unusable
        assert (raised.value.start, raised.value.stop) == (12, 24 if by_size else 16)


def test_a_chunk_in_a_shard_names_its_own_videos(kit, tmp_path, shards) -> None:
    """Damage in the third chunk of a file, frames 20 to 23, does not concern the first."""
    path = kit.build(tmp_path / "shards.zarr", shards)
    file = path / "train/latents/c/1/0/0/0"
    content = file.read_bytes()
    offset, length = struct.unpack_from("<QQ", content, len(content) - 4 - 3 * 16 + 2 * 16)
    assert length == 4 * 2 * 3 * 4 * 2 + 4
    flip_a_bit(file, offset + 5)
    cache = latent_cache.open(path)
    cache.latent_reader.read(12, 20)
    for read in (lambda: cache.latent_reader.read(20, 21), cache.load):
        with pytest.raises(CorruptStoreError, match=re.escape("2 video(s): 'clip-04', 'clip-05'")):
            read()
