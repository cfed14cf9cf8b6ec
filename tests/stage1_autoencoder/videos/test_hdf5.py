"""The official code's shards as a source: frames to the bit, and damaged shards."""

import itertools
import multiprocessing
import os
import pickle
import random
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from stage1_autoencoder.videos import BrokenVideoError, VideoError, open_source, open_splits
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.index import CACHE_NAME

h5py = pytest.importorskip("h5py")


def config(**settings) -> DatasetConfig:
    given = {"name": "mine", "source": "hdf5", "root": "{data}", "image_size": 32, "splits": {"val": 0, "test": 0}}
    return DatasetConfig(**given | settings)


def write_shard(path, videos, *, empty=False) -> None:
    """Write like the official converter: lzf, a scalar length per video, and an empty group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_group("videos")
        for number, video in enumerate(() if empty else videos):
            file[f"len/{number}"] = len(video)
            for position, frame in enumerate(video):
                file.create_dataset(f"{number}/{position}", data=frame, compression="lzf")


def noise(*lengths: int, seed: int = 0, side: int = 32) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (length, side, side, 3), np.uint8) for length in lengths]


@pytest.fixture
def official(fixtures, tmp_path):
    shutil.copytree(fixtures / "h5", tmp_path / "official")
    return tmp_path / "official"


def test_official_shards(official, fixtures):
    recorded = np.load(fixtures / "h5_dataset.npz")
    source = open_source(config(), official, "train")
    assert [(video.id, video.frames) for video in source.videos] == [
        ("shard_0001/0", 12),
        ("shard_0001/1", 9),
        ("shard_0002/0", 14),
    ]
    assert len(source.videos) == recorded["len"]
    for start in (0, 2):  # four frames, two apart, as the official data set gave them
        for index, sample in enumerate(recorded[f"sample_t{start}"]):
            frames = source.read(index, range(start, start + 8, 2))
            # Recorded in float32: ten of its roundings.
            atol = 10 * np.finfo(np.float32).eps
            np.testing.assert_allclose(frames.transpose(0, 3, 1, 2) / 127.5 - 1, sample, rtol=0, atol=atol)


def test_an_empty_last_shard(tmp_path):
    write_shard(tmp_path / "train/shard_0001.hdf5", noise(4))
    write_shard(tmp_path / "train/shard_0002.hdf5", [], empty=True)
    with h5py.File(tmp_path / "train/shard_0003.hdf5", "w"):
        pass
    with h5py.File(tmp_path / "train/shard_0004.hdf5", "w") as file:
        file.create_group("len")
    source = open_source(config(), tmp_path, "train")
    assert (len(source.videos), source.skipped) == (1, [])


def test_a_shard_beside_split_folders_is_named(tmp_path):
    write_shard(tmp_path / "train/shard_0001.hdf5", noise(4))
    write_shard(tmp_path / "shard_0009.hdf5", noise(4))
    (skipped,) = open_source(config(), tmp_path, "train").skipped
    assert skipped.id == "shard_0009.hdf5"
    assert "train" in skipped.reason


def test_a_shard_without_lengths(tmp_path):
    videos = noise(4, 11)
    write_shard(tmp_path / "train/shard_0001.hdf5", videos)
    with h5py.File(tmp_path / "train/shard_0001.hdf5", "r+") as file:
        del file["len"]
        file["labels"] = [1, 2]
    source = open_source(config(), tmp_path, "train")
    assert not source.skipped
    assert [video.frames for video in source.videos] == [4, 11]
    np.testing.assert_array_equal(source.read(1), videos[1])
    with h5py.File(tmp_path / "train/shard_0001.hdf5", "r+") as file:
        file["len"] = [4, 11]
    with pytest.raises(VideoError, match=r"'len'.*shard_0001\.hdf5"):
        open_source(config(), tmp_path, "train")


def test_videos_need_not_be_square(tmp_path):
    (video,) = noise(3)
    write_shard(tmp_path / "train/shard_0001.hdf5", [np.pad(video, ((0, 0), (0, 0), (5, 7), (0, 0)))])
    source = open_source(config(), tmp_path, "train")
    assert source.videos[0].size == (44, 32)
    np.testing.assert_array_equal(source.read(0)[:, :, :-1], video[:, :, 1:])  # the middle begins at column 6


def test_splits_of_several_shards(tmp_path):
    names = ["shard_2.hdf5", "shard_3.h5", "shard_10.hdf5"]  # in natural order, as are their videos
    videos = {f"{name.split('.')[0]}/{i}": video for name in names for i, video in enumerate(noise(*[3] * 11, 12))}
    for name in names:
        write_shard(tmp_path / name, noise(*[3] * 11, 12))
    whole = open_source(config(), tmp_path, "train")
    assert [video.id for video in whole.videos] == list(videos)
    for index, video in enumerate(videos.values()):
        np.testing.assert_array_equal(whole.read(index), video)
    rows = {video.id: index for index, video in enumerate(whole.videos)}
    sources = open_splits(config(splits={"val": 0.3, "test": 0.3}, frame_step=2), tmp_path)
    assert list(sources) == ["train", "val", "test"]
    assert sum(len(source.videos) for source in sources.values()) == len(videos)
    for source in sources.values():
        assert source.native_frames == sum(whole.videos[rows[video.id]].frames for video in source.videos)
        for index, video in enumerate(source.videos):
            assert video.fps == whole.videos[rows[video.id]].fps / 2
            np.testing.assert_array_equal(source.read(index), whole.read(rows[video.id])[::2])


def test_many_threads_and_processes(official):
    """Also while a shard is open here, as when workers of a data loader are started in the middle of reading."""
    source = pickle.loads(pickle.dumps(open_source(config(), official, "train")))
    expected = [source.read(index) for index in range(3)]
    with ThreadPoolExecutor(4) as pool:
        for number, frames in enumerate(pool.map(source.read, [0, 1, 2] * 8)):
            np.testing.assert_array_equal(frames, expected[number % 3])
    reading = source.iterate(0)
    next(reading)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.map(source.read, [0, 1, 2] * 4)
    for frames, wanted in zip(results, itertools.cycle(expected)):
        np.testing.assert_array_equal(frames, wanted)
    np.testing.assert_array_equal(list(reading), expected[0][1:])


def test_no_shard_stays_open(official):
    source = open_source(config(), official, "train")
    source.read(0)
    reading = source.iterate(1)
    next(reading)
    reading.close()
    with h5py.File(official / "train/shard_0001.hdf5", "r+") as file:  # h5py refuses what is open for reading
        file["len/0"][()] = 13
    with pytest.raises(BrokenVideoError, match=r"12 frames.*len/0.*13"):
        source.read(0)
    (official / "train/shard_0002.hdf5").unlink()
    with pytest.raises(BrokenVideoError, match=r"shard_0002/0: .*shard_0002\.hdf5 .*No such file"):
        source.read(2)


def test_the_index_is_stored_until_a_shard_changes(official):
    path = official / "train/shard_0001.hdf5"
    first = open_splits(config(), official, remember=False)["train"]
    assert not (official / CACHE_NAME).exists()
    open_splits(config(), official)
    before = path.stat()
    with h5py.File(path, "r+") as file:
        file["1/4"][0, 0] = 255 - file["1/4"][0, 0]  # the middle frame
    changed = path.stat()
    if changed.st_size == before.st_size:  # hidden from the index
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert open_splits(config(), official)["train"].fingerprint == first.fingerprint
    os.utime(path, ns=(changed.st_atime_ns, changed.st_mtime_ns + 10**9))
    again = open_splits(config(), official)["train"]
    assert [old == new for old, new in zip(first.videos, again.videos, strict=True)] == [True, False, True]


def delete(name):
    return lambda file: file.__delitem__(name)


def replace(name, value, gone=None):
    def change(file):
        del file[gone or name]
        file[name] = value

    return change


SEEN_BY_THE_INDEX = [
    (delete("1/3"), "5 frames.*len/1.* 6"),
    (delete("1"), "no group '1'"),
    (replace("1", 5), "no group '1'"),
    (replace("len/1", 9), "6 frames.*len/1.* 9"),
    (lambda file: (delete("1/3")(file), replace("len/1", 5)(file)), "frame 3"),
    (delete("len/1"), "no len/1"),
    (replace("len/1", "six"), "len/1.*integer"),
    (replace("len/1", [6, 6]), "len/1.*integer"),
    (replace("len/1/more", 6, "len/1"), "len/1.*integer"),
    (lambda file: [delete(f"1/{number}")(file) for number in range(6)], "no frames"),
    (replace("1/3", h5py.SoftLink("/nowhere")), "link instead of /1/3"),
    (replace("1/0", np.zeros((32, 32, 4), np.uint8)), r"frame 0 .*uint8 \[32, 32, 4\].*\[h, w, 3\]"),
    (replace("1/5", np.zeros((32, 16, 3), np.uint8)), "frame 5 .*16x32.*32x32"),
    (replace("1/3", np.zeros((32, 32, 3), np.int8)), "frame 3 .*int8.*uint8"),
    (replace("1/5", np.zeros((4, 4), np.uint8)), r"frame 5 .*\[4, 4\]"),
]
SEEN_BY_READING = [  # the index reads the frames 0, 3 and 5
    (replace("1/2", np.zeros((4, 6, 3), np.uint8)), "frame 2 .*6x4.*32x32"),
    (replace("1/2", np.zeros((32, 32, 3), np.int16)), "frame 2 .*int16.*uint8"),
    (lambda file: (delete("1/5")(file), replace("len/1", 5)(file)), "5 frames.*index.* 6"),
]


@pytest.mark.parametrize(("change", "reason"), SEEN_BY_THE_INDEX + SEEN_BY_READING)
def test_damaged_videos_are_skipped_or_break_when_read(tmp_path, change, reason):
    path = tmp_path / "train/shard_0001.hdf5"
    write_shard(path, noise(5, 6))
    source = open_source(config(), tmp_path, "train")
    with h5py.File(path, "r+") as file:
        change(file)
    expected = reason + r".*shard_0001\.hdf5.*copy or convert it again"
    assert len(source.read(0)) == 5
    with pytest.raises(BrokenVideoError, match=f"shard_0001/1: .*{expected}"):
        source.read(1)
    skipped = open_splits(config(), tmp_path, remember=False)["train"].skipped
    assert len(skipped) == ((change, reason) in SEEN_BY_THE_INDEX)
    assert all(video.id == "shard_0001/1" and re.search(expected, video.reason) for video in skipped)


@pytest.mark.parametrize("content", [b"", b"<html>Not found</html>", "half"])
def test_files_that_are_not_shards(tmp_path, content):
    write_shard(tmp_path / "train/shard_0001.hdf5", noise(5))
    whole = (tmp_path / "train/shard_0001.hdf5").read_bytes()
    (tmp_path / "train/shard_0002.hdf5").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    source = open_source(config(), tmp_path, "train")
    assert len(source.videos) == 1
    (skipped,) = source.skipped
    assert "cannot be read as HDF5" in skipped.reason
    assert "shard_0002.hdf5" in skipped.reason
    (tmp_path / "train/shard_0001.hdf5").unlink()
    with pytest.raises(VideoError, match=r"train: .*1 files.*shard_0002: "):
        open_splits(config(), tmp_path)


def test_one_damaged_frame_costs_one_video(tmp_path):
    path = tmp_path / "train/shard_0001.hdf5"
    videos = noise(5, 5, 5)
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        for number, video in enumerate(videos):
            file[f"len/{number}"] = len(video)
            for position, frame in enumerate(video):
                file.create_dataset(f"{number}/{position}", data=frame, chunks=frame.shape, fletcher32=True)
    source = open_source(config(), tmp_path, "train")
    whole = path.read_bytes()
    for position, skipped in ((1, []), (2, ["shard_0001/1"])):  # the middle one is read for the index
        at = whole.index(videos[1][position].tobytes())
        path.write_bytes(whole[: at + 99] + bytes([whole[at + 99] ^ 1]) + whole[at + 100 :])
        np.testing.assert_array_equal(source.read(2), videos[2])
        assert len(list(source.iterate(1, position + 1))) == 4 - position
        with pytest.raises(BrokenVideoError, match=r"shard_0001/1: .*copy or convert it again"):
            source.read(1)
        again = open_splits(config(), tmp_path, remember=False)["train"]
        assert [video.id for video in again.skipped] == skipped


def test_damage_anywhere_is_reported(official):
    """Bytes of the first shard are changed, mostly where its structure is, or its end is cut off."""
    sound = open_splits(config(), official, remember=False)["train"]
    second = sound.read(2)
    path = official / "train/shard_0001.hdf5"
    whole, draw = path.read_bytes(), random.Random(5)
    places = [0, *(at for mark in (b"TREE", b"SNOD", b"HEAP") if (at := whole.find(mark)) >= 0)]
    skipped = broken = 0
    for attempt in range(60):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 4, 30))):
            at = draw.choice((*places, draw.randrange(len(whole)))) + draw.randrange(200)
            content[min(at, len(whole) - 1)] = draw.randrange(256)
        path.write_bytes(content[: draw.randrange(len(whole))] if attempt % 5 == 0 else content)
        source = open_splits(config(), official, remember=False)["train"]
        np.testing.assert_array_equal(source.read(len(source.videos) - 1), second)
        skipped += bool(source.skipped)
        for index in range(2):
            try:
                sound.read(index)  # as its index was before the damage
            except BrokenVideoError:
                broken += 1
    assert skipped > 15
    assert broken > 15


def test_folders_without_shards(tmp_path, monkeypatch):
    with pytest.raises(VideoError, match=r"nowhere: .*put the shards of 'mine'"):
        open_splits(config(root="{data}/nowhere"), tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train/notes.txt").touch()
    with pytest.raises(VideoError, match=r"train: .*\.hdf5.* \.txt.*put the shards"):
        open_splits(config(), tmp_path)
    write_shard(tmp_path / "train/shard_0001.hdf5", [], empty=True)
    with pytest.raises(VideoError, match=r"train: .*1 files.*empty"):
        open_splits(config(), tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)  # as if it were not installed
    with pytest.raises(VideoError, match=r"hdf5.*pip install h5py"):
        open_splits(config(), tmp_path)
