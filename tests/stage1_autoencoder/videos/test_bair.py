"""BAIR's TFRecords as a source: every frame to the bit, splits, and damaged files."""

import shutil
import tracemalloc

import numpy as np
import pytest

from stage1_autoencoder.videos import BrokenVideoError, VideoError, open_source, open_splits
from stage1_autoencoder.videos.bair import BairSource
from stage1_autoencoder.videos.config import DatasetConfig
from tests import small_data_sets

TRAIN, TEST, FRAMES, IN_A_FILE = 22, 3, 5, 2


def config(**settings) -> DatasetConfig:
    return DatasetConfig(**{"name": "bair_64", "source": "bair", "root": "{data}", "image_size": 64} | settings)


def noise(count: int, seed: int, frames: int = FRAMES, side: int = 64) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, frames, side, side, 3), np.uint8))


def write(folder, videos) -> None:
    folder.mkdir(parents=True)
    for first in range(0, len(videos), IN_A_FILE):
        part = videos[first : first + IN_A_FILE]
        records = b"".join(small_data_sets.record(small_data_sets.bair_example(video)) for video in part)
        (folder / f"traj_{first}_to_{first + len(part) - 1}.tfrecords").write_bytes(records)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("bair")
    write(root / "softmotion30_44k" / "train", noise(TRAIN, 1))
    write(root / "softmotion30_44k" / "test", noise(TEST, 2))
    return root


@pytest.fixture
def data(written, tmp_path):
    return shutil.copytree(written, tmp_path / "data")


def test_every_frame_of_every_video(written):
    sources = open_splits(config(splits={"val": 0}), written)
    assert {split: len(source.videos) for split, source in sources.items()} == {"train": TRAIN, "test": TEST}
    for split, seed in (("train", 1), ("test", 2)):
        source = sources[split]
        for index, video in enumerate(noise(len(source.videos), seed)):
            np.testing.assert_array_equal(source.read(index), video)
    # Natural order of files, and the order of examples in each.
    ids = [video.id for video in sources["train"].videos]
    assert ids[:3] == ["traj_0_to_1/0", "traj_0_to_1/1", "traj_2_to_3/0"]
    assert ids[-1] == "traj_20_to_21/1"
    assert sources["train"].videos[0].size == (64, 64)
    assert sources["train"].native_frames == TRAIN * FRAMES
    assert not sources["train"].skipped


def test_frames_are_in_order_whatever_the_order_of_the_features(tmp_path):
    """The entries of a protobuf map have none, and writers differ."""
    video = noise(1, 6, frames=12)[0]
    names = [f"{number}/image_aux1/encoded" for number in range(12)]
    entries = {name: frame.tobytes() for name, frame in zip(names, video, strict=True)}
    for folder, order in (("train", sorted(names)), ("test", reversed(names))):
        (tmp_path / folder).mkdir()
        example = small_data_sets.example({name: entries[name] for name in order})
        (tmp_path / folder / "traj_0_to_0.tfrecords").write_bytes(small_data_sets.record(example))
    for source in open_splits(config(splits={"val": 0}), tmp_path).values():
        np.testing.assert_array_equal(source.read(0), video)


def test_validation_videos_are_held_out_of_train(written):
    sources = open_splits(config(splits={"val": 0.2}), written)
    held_out = {video.id for video in sources["val"].videos}
    assert (len(held_out), len(sources["train"].videos)) == (4, 18)
    assert not held_out & {video.id for video in sources["train"].videos}
    assert sources["val"].native_frames == 4 * FRAMES
    whole = open_splits(config(splits={"val": 0}), written)["train"]
    rows = {video.id: index for index, video in enumerate(whole.videos)}
    for index, video in enumerate(sources["val"].videos):
        np.testing.assert_array_equal(sources["val"].read(index), whole.read(rows[video.id]))
    inside = open_splits(config(), written / "softmotion30_44k")  # its folders directly in the root
    assert inside["test"].videos == open_splits(config(), written)["test"].videos
    assert len(inside["val"].videos) == 1  # by default few, but one


def test_ranges_steps_and_sizes(written):
    source = open_source(config(splits={"val": 0}, frame_step=2), written, "train")
    assert source.native_frames == TRAIN * FRAMES
    video = noise(1, 1)[0]
    assert (source.videos[0].frames, source.videos[0].fps) == (3, 5.0)
    np.testing.assert_array_equal(list(source.iterate(0)), video[::2])
    np.testing.assert_array_equal(list(source.iterate(0, 1, 3)), video[2::2])
    np.testing.assert_array_equal(source.read(0, [2, 0, 2]), video[[4, 0, 4]])
    assert list(source.iterate(0, 2, 2)) == []
    small = open_source(config(splits={"val": 0}, image_size=32), written, "train").read(0, [1])
    area = video[1].reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(small[0] - area).max() <= 1
    wide = open_source(config(splits={"val": 0}, image_size=[32, 48], fit="pad"), written, "train").read(0, [1])
    np.testing.assert_array_equal(wide[0], np.pad(small[0], ((0, 0), (8, 8), (0, 0))))


def test_fingerprints_are_of_the_content(data):
    before = open_source(config(), data, "test")
    shutil.copytree(data, data.parent / "copy", copy_function=shutil.copyfile)
    assert open_source(config(), data.parent / "copy", "test").fingerprint == before.fingerprint
    file = data / "softmotion30_44k/test/traj_2_to_2.tfrecords"
    video = noise(3, 2)[2]
    video[3, 5, 5, 1] ^= 1
    file.write_bytes(small_data_sets.record(small_data_sets.bair_example(video)))
    after = open_source(config(), data, "test")
    changed = [old != new for old, new in zip(before.videos, after.videos, strict=True)]
    assert changed == [False, False, True]


def test_damaged_examples_break_when_they_are_read(data):
    file = data / "softmotion30_44k/test/traj_0_to_1.tfrecords"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    source = open_source(config(), data, "test")
    assert len(source.read(0)) == FRAMES
    with pytest.raises(BrokenVideoError, match=r"traj_0_to_1/1: .*damaged.*traj_0_to_1\.tfrecords.*download it again"):
        source.read(1)
    file.unlink()
    with pytest.raises(BrokenVideoError, match=r"traj_0_to_1/0: .*traj_0_to_1\.tfrecords .*No such file"):
        source.read(0)


KEY = "{}/image_aux1/encoded"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<html>Not found</html>", "TFRecord"),
        ({"0/image_main/encoded": b"x"}, KEY.format(0)),
        ({KEY.format(1): bytes(12)}, "frame 0"),
        (dict.fromkeys((KEY.format(0), KEY.format(10**15)), b"rgb"), "frame 1"),
        ({KEY.format(0): bytes(13)}, "13 bytes"),
        (small_data_sets.record(b"no example"), "tf.train.Example"),
        (None, "No such file"),
    ],
)
def test_unusable_files_are_skipped(data, content, reason):
    path = data / "softmotion30_44k/test/traj_9_to_9.tfrecords"
    if content is None:
        path.symlink_to(data / "a disk that is not there")
    else:
        given = isinstance(content, dict)
        path.write_bytes(small_data_sets.record(small_data_sets.example(content)) if given else content)
    source = open_source(config(), data, "test")
    assert len(source.videos) == TEST
    (skipped,) = source.skipped
    assert skipped.id == "traj_9_to_9"
    assert all(part in skipped.reason for part in (reason, path.name, "download it again"))


def test_of_a_file_that_is_cut_off_the_whole_examples_are_used(data):
    file = data / "softmotion30_44k/test/traj_0_to_1.tfrecords"
    file.write_bytes(file.read_bytes()[:-10])
    source = open_source(config(), data, "test")
    assert [video.id for video in source.videos] == ["traj_0_to_1/0", "traj_2_to_2/0"]
    assert "record 1" in source.skipped[0].reason
    (data / "softmotion30_44k/test/traj_2_to_2.tfrecords").unlink()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(VideoError, match=r"test: .*1 files.*traj_0_to_1: .*record 0.*river data"):
        open_splits(config(), data)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (noise(1, 5, frames=4)[0], r"4 frames.* 5 .*traj_0_to_1\.tfrecords"),
        (noise(1, 5, side=32)[0], "frame 0 .*3072 bytes.*64x64x3"),
    ],
)
def test_examples_unlike_the_first_of_their_file(data, video, message):
    file = data / "softmotion30_44k/test/traj_0_to_1.tfrecords"
    with file.open("ab") as opened:
        opened.write(small_data_sets.record(small_data_sets.bair_example(video)))
    source = open_source(config(), data, "test")
    assert source.videos[2].id == "traj_0_to_1/2"
    with pytest.raises(BrokenVideoError, match=message):
        source.read(2)


def test_missing_folders_and_files(data):
    with pytest.raises(VideoError, match=r"nowhere: .*river data --config bair_64"):
        open_splits(config(root="{data}/nowhere"), data)
    for file in (data / "softmotion30_44k/test").iterdir():
        file.rename(file.with_suffix(".txt"))
    with pytest.raises(VideoError, match=r"test: .*\.tfrecords.* \.txt.*river data"):
        open_splits(config(), data)
    shutil.rmtree(data / "softmotion30_44k/test")
    with pytest.raises(VideoError, match=r"softmotion30_44k/test: .*river data"):
        open_splits(config(), data)


def test_the_index_of_many_videos_takes_little_memory(tmp_path):
    videos = noise(1, 1, frames=2, side=2) * 3000
    record = small_data_sets.record(small_data_sets.bair_example(videos[0]))
    (tmp_path / "traj_0_to_2999.tfrecords").write_bytes(record * len(videos))
    tracemalloc.start()
    source = BairSource(config(), tmp_path, ["traj_0_to_2999.tfrecords"])
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source.videos) == len(videos)
    assert held / len(videos) < 400  # bytes; BAIR has 43 264 videos
