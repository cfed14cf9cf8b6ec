"""The official code's shards as a source: frames to the bit, and shards that are not what they should be."""

import builtins
import itertools
import multiprocessing
import pickle
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from stage1_autoencoder.videos import BrokenVideoError, VideoError, hdf5, open_source, open_splits
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.index_cache import CACHE_NAME

h5py = pytest.importorskip("h5py")


def config(**settings) -> DatasetConfig:
    given = {"name": "mine", "source": "hdf5", "root": "{data}", "image_size": 32, "splits": {"val": 0, "test": 0}}
    return DatasetConfig(**given | settings)


def write_shard(path, videos, *, empty=False) -> None:
    """As the official converter does: lzf, a scalar length a video, and a group that nothing is in."""
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
            np.testing.assert_allclose(frames.transpose(0, 3, 1, 2) / 127.5 - 1, sample, atol=1e-6)


def test_natural_order_of_shards_videos_and_frames(tmp_path):
    shards = {"shard_2.hdf5": noise(*[3] * 11, seed=1), "shard_10.h5": noise(12, seed=2)}
    for name, videos in shards.items():
        write_shard(tmp_path / "train" / name, videos)
    source = open_source(config(), tmp_path, "train")
    assert [video.id for video in source.videos] == [*(f"shard_2/{i}" for i in range(11)), "shard_10/0"]
    for index, video in enumerate([*shards["shard_2.hdf5"], *shards["shard_10.h5"]]):
        np.testing.assert_array_equal(source.read(index), video)


def test_an_empty_last_shard(tmp_path):
    write_shard(tmp_path / "train/shard_0001.hdf5", noise(4))
    write_shard(tmp_path / "train/shard_0002.hdf5", [], empty=True)
    with h5py.File(tmp_path / "train/shard_0003.hdf5", "w"):
        pass
    with h5py.File(tmp_path / "train/shard_0004.hdf5", "w") as file:
        file.create_group("len")
    source = open_source(config(), tmp_path, "train")
    assert (len(source.videos), source.skipped) == (1, [])


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
    with pytest.raises(VideoError, match=r"shard_0001\.hdf5 has a 'len' that is no group of lengths"):
        open_source(config(), tmp_path, "train")


def test_videos_need_not_be_square(tmp_path):
    (video,) = noise(3)
    write_shard(tmp_path / "train/shard_0001.hdf5", [np.pad(video, ((0, 0), (0, 0), (5, 7), (0, 0)))])
    source = open_source(config(), tmp_path, "train")
    assert source.videos[0].size == (44, 32)
    np.testing.assert_array_equal(source.read(0)[:, :, :-1], video[:, :, 1:])  # the middle begins at column 6


def test_splits(tmp_path):
    for split, count in (("train", 10), ("validation", 2), ("test", 1)):
        write_shard(tmp_path / split / "shard_0001.hdf5", noise(*[3] * count))
    counts = {split: len(source.videos) for split, source in open_splits(config(splits={}), tmp_path).items()}
    assert counts == {"train": 10, "val": 2, "test": 1}
    inside = tmp_path / "train"  # shards directly in the root
    counts = {split: len(source.videos) for split, source in open_splits(config(splits={}), inside).items()}
    assert counts == {"train": 8, "val": 1, "test": 1}
    shutil.rmtree(tmp_path / "validation")
    shutil.rmtree(tmp_path / "test")
    sources = open_splits(config(splits={"val": 0.2, "test": 0.1}), tmp_path)
    assert {split: len(source.videos) for split, source in sources.items()} == {"train": 7, "val": 2, "test": 1}
    whole = open_source(config(), tmp_path, "train")
    rows = {video.id: index for index, video in enumerate(whole.videos)}
    for source in sources.values():
        assert source.native_frames == 3 * len(source.videos)
        for index, video in enumerate(source.videos):
            np.testing.assert_array_equal(source.read(index), whole.read(rows[video.id]))


def test_splits_of_several_shards(tmp_path):
    for number in range(6):
        write_shard(tmp_path / f"shard_{number:04d}.hdf5", noise(number + 1, number + 2, seed=number))
    whole = open_source(config(), tmp_path, "train")
    rows = {video.id: index for index, video in enumerate(whole.videos)}
    sources = open_splits(config(splits={"val": 0.3, "test": 0.3}, frame_step=2), tmp_path)
    assert [len(source.videos) for source in sources.values()] == [4, 4, 4]
    for source in sources.values():
        assert source.native_frames == sum(whole.videos[rows[video.id]].frames for video in source.videos)
        for index, video in enumerate(source.videos):
            np.testing.assert_array_equal(source.read(index), whole.read(rows[video.id])[::2])


def test_splits_that_cannot_be_chosen():
    with pytest.raises(ValueError, match=r"splits\.val: '3-4' is not a fraction in \[0, 1\) \(source: hdf5\)"):
        config(splits={"val": "3-4"})
    with pytest.raises(ValueError, match="leave nothing to train on"):
        config(splits={"val": 0.5, "test": 0.5})


def test_ranges_and_steps(tmp_path):
    (video,) = noise(9)
    write_shard(tmp_path / "train/shard_0001.hdf5", [video])
    source = open_source(config(frame_step=4), tmp_path, "train")
    assert (source.videos[0].frames, source.videos[0].fps, source.native_frames) == (3, 2.5, 9)
    np.testing.assert_array_equal(source.read(0), video[::4])
    np.testing.assert_array_equal(list(source.iterate(0, 1, 2)), video[4:5])
    assert list(source.iterate(0, 1, 1)) == []
    with pytest.raises(IndexError):
        next(source.iterate(0, 0, 4))


def test_many_readers(official):
    source = pickle.loads(pickle.dumps(open_source(config(), official, "train")))
    expected = [source.read(index) for index in range(3)]
    with ThreadPoolExecutor(4) as pool:
        for number, frames in enumerate(pool.map(source.read, [0, 1, 2] * 8)):
            np.testing.assert_array_equal(frames, expected[number % 3])


def test_many_processes(official):
    """Also while a shard is open here, as when workers of a data loader are started in the middle of reading."""
    source = open_source(config(), official, "train")
    expected = [source.read(index) for index in range(3)]
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
    with pytest.raises(BrokenVideoError, match="has 12 frames, but len/0 says 13"):
        source.read(0)


def test_what_is_known_is_not_read_again(official, monkeypatch):
    examined = []
    examine = hdf5._examine
    monkeypatch.setattr(hdf5, "_examine", lambda shard, name: examined.append(name) or examine(shard, name))
    first = open_splits(config(), official, remember=False)["train"]
    assert not (official / CACHE_NAME).exists()
    open_splits(config(), official)
    examined.clear()
    again = open_splits(config(), official)["train"]
    assert examined == []
    assert again.fingerprint == first.fingerprint
    with h5py.File(official / "train/shard_0001.hdf5", "r+") as file:
        file["1/4"][0, 0] = 255 - file["1/4"][0, 0]  # the middle frame
    changed = open_splits(config(), official)["train"]
    assert examined == ["0", "1"]
    assert [old == new for old, new in zip(first.videos, changed.videos, strict=True)] == [True, False, True]


def broken(path, change) -> None:
    write_shard(path, noise(5, 6))
    with h5py.File(path, "r+") as file:
        change(file)


def delete(name):
    return lambda file: file.__delitem__(name)


def replace(name, value, gone=None):
    def change(file):
        del file[gone or name]
        file[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (delete("1/3"), "has 5 frames, but len/1 says 6 (in shard_0001.hdf5)"),
        (delete("1"), "has a length, but no group '1' of frames (in shard_0001.hdf5)"),
        (replace("len/1", 9), "has 6 frames, but len/1 says 9 (in shard_0001.hdf5)"),
        (
            lambda file: (delete("1/3")(file), replace("len/1", 5)(file)),
            "lacks frame 3 (in shard_0001.hdf5)",
        ),
        (delete("len/1"), "has frames, but no len/1 (in shard_0001.hdf5)"),
        (replace("len/1", "six"), "len/1 is no whole number (in shard_0001.hdf5)"),
        (replace("len/1", [6, 6]), "len/1 is no whole number (in shard_0001.hdf5)"),
        (replace("len/1/more", 6, "len/1"), "len/1 is no whole number (in shard_0001.hdf5)"),
        (replace("1", 5), "has a length, but no group '1' of frames (in shard_0001.hdf5)"),
        (lambda file: [delete(f"1/{number}")(file) for number in range(6)], "has no frames (in shard_0001.hdf5)"),
        (
            replace("1/0", np.zeros((32, 32, 4), np.uint8)),
            "frame 0 is uint8 [32, 32, 4], and uint8 [h, w, 3] is wanted",
        ),
        (replace("1/3", h5py.SoftLink("/nowhere")), "cannot be read as HDF5: Unable to synchronously open object"),
        (replace("1/5", np.zeros((32, 16, 3), np.uint8)), "frame 5 is 16x32, the first one 32x32; frames of one video"),
        (replace("1/3", np.zeros((32, 32, 3), np.int8)), "frame 3 is int8 [32, 32, 3], and uint8 [h, w, 3] is wanted"),
        (
            replace("1/0", np.zeros((4, 4, 3), np.float32)),
            "frame 0 is float32 [4, 4, 3], and uint8 [h, w, 3] is wanted",
        ),
        (replace("1/5", np.zeros((4, 4), np.uint8)), "frame 5 is uint8 [4, 4], and uint8 [h, w, 3] is wanted"),
    ],
)
def test_videos_that_cannot_be_used_are_skipped(tmp_path, change, reason):
    broken(tmp_path / "train/shard_0001.hdf5", change)
    source = open_source(config(), tmp_path, "train")
    assert [video.id for video in source.videos] == ["shard_0001/0"]
    (skipped,) = source.skipped
    assert skipped.id == "shard_0001/1"
    assert skipped.reason.startswith(reason)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            replace("1/2", np.zeros((4, 6, 3), np.uint8)),
            "frame 2 is 6x4, the first one 32x32; frames of one video must",
        ),
        (replace("1/2", np.zeros((32, 32, 3), np.int16)), r"frame 2 is int16 \[32, 32, 3\]"),
        (delete("1/2"), "has 5 frames, but len/1 says 6"),
        (lambda file: [change(file) for change in (delete("1/5"), replace("len/1", 5))], "has 5 frames, but its index"),
    ],
)
def test_frames_that_break_when_they_are_read(tmp_path, change, message):
    path = tmp_path / "train/shard_0001.hdf5"
    write_shard(path, noise(5, 6))
    source = open_source(config(), tmp_path, "train")
    with h5py.File(path, "r+") as file:
        change(file)
    assert len(source.read(0)) == 5
    with pytest.raises(BrokenVideoError, match=f"shard_0001/1: {message}"):
        source.read(1)


@pytest.mark.parametrize("content", [b"", b"<html>Not found</html>", "half"])
def test_shards_that_are_none(tmp_path, content):
    write_shard(tmp_path / "train/shard_0001.hdf5", noise(5))
    whole = (tmp_path / "train/shard_0001.hdf5").read_bytes()
    (tmp_path / "train/shard_0002.hdf5").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    source = open_source(config(), tmp_path, "train")
    assert len(source.videos) == 1
    (skipped,) = source.skipped
    assert skipped.reason.startswith("shard_0002.hdf5 cannot be read as HDF5")
    (tmp_path / "train/shard_0001.hdf5").unlink()
    with pytest.raises(VideoError, match=r"train: no video in its 1 shards can be used: shard_0002: shard_0002\.hdf5"):
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
        with pytest.raises(BrokenVideoError, match=r"shard_0001/1: cannot be read as HDF5: .*; copy or convert it"):
            source.read(1)
        again = open_splits(config(), tmp_path, remember=False)["train"]
        assert [video.id for video in again.skipped] == skipped


def test_damage_anywhere_is_said(official):
    """Bytes of the first shard are changed, mostly where its structure is, or its end is cut off."""
    sound = open_splits(config(), official, remember=False)["train"]
    second = sound.read(2)
    path = official / "train/shard_0001.hdf5"
    whole, draw = path.read_bytes(), random.Random(5)
    places = [0, *(at for mark in (b"TREE", b"SNOD", b"HEAP") if (at := whole.find(mark)) >= 0)]
    skipped = broken = 0
    for attempt in range(80):
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
    assert skipped > 20
    assert broken > 20


def test_two_shards_of_one_name(tmp_path):
    for name in ("shard_0001.hdf5", "SHARD_0001.H5"):
        write_shard(tmp_path / "train" / name, noise(3))
    with pytest.raises(
        VideoError, match=r"SHARD_0001\.H5 and .*shard_0001\.hdf5 would both be 'shard_0001': rename one"
    ):
        open_splits(config(), tmp_path)


def test_a_shard_that_is_gone(official):
    source = open_source(config(), official, "train")
    (official / "train/shard_0002.hdf5").unlink()
    with pytest.raises(
        BrokenVideoError, match=r"shard_0002/0: cannot be read as HDF5: No such file .*shard_0002\.hdf5"
    ):
        source.read(2)


def test_folders_without_shards(tmp_path):
    with pytest.raises(VideoError, match="nowhere: there is no such folder; put the shards of 'mine' there"):
        open_splits(config(root="{data}/nowhere"), tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train/notes.txt").touch()
    with pytest.raises(VideoError, match=r"train: no shards in it, only \.txt; expected shard_0001\.hdf5"):
        open_splits(config(), tmp_path)
    write_shard(tmp_path / "train/shard_0001.hdf5", [], empty=True)
    with pytest.raises(VideoError, match="can be used: all empty"):
        open_splits(config(), tmp_path)


def test_without_h5py(official, monkeypatch):
    usual = builtins.__import__

    def without(name, *arguments, **options):
        if name == "h5py":
            raise ImportError(name)
        return usual(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(VideoError, match=r"needs h5py: pip install h5py \(or 'river-two-stage\[h5\]'\)"):
        open_splits(config(), official)
