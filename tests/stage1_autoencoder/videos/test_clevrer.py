"""CLEVRER: splits by the numbers in the names, and folders that contain something else."""

import pytest

from stage1_autoencoder.videos import VideoError, open_splits
from stage1_autoencoder.videos.config import DatasetConfig
from tests.stage1_autoencoder.videos.conftest import ids

NUMBERS = (3, 12, 9999, 10000, 14999, 15000, 19999)


def config(**settings) -> DatasetConfig:
    return DatasetConfig(**{"name": "clevrer", "source": "clevrer", "root": "{data}", "image_size": 16} | settings)


@pytest.fixture
def data(tmp_path, make_video):
    for number in NUMBERS:
        # Folders whose order is not that of the numbers.
        make_video(f"somewhere/{9 - number % 10}-x/video_{number:05d}.mp4", 11, "libx264")
    return tmp_path


def test_official_splits_and_frame_step(data, read_numbers):
    sources = open_splits(config(frame_step=5), data)
    assert ids(sources) == {
        "train": ["video_00003", "video_00012", "video_09999"],
        "val": ["video_10000", "video_14999"],
        "test": ["video_15000", "video_19999"],
    }
    assert not any(source.skipped for source in sources.values())
    assert read_numbers(sources["test"].read(0)) == [0, 5, 10]
    assert sources["train"].native_frames == 33


def test_other_splits(data):
    assert ids(open_splits(config(splits={"train": "0-99", "test": 10000}), data)) == {
        "train": ["video_00003", "video_00012"],
        "test": ["video_10000"],
    }
    with pytest.raises(VideoError, match=r"splits\.train.*500-600.*river data"):
        open_splits(config(splits={"train": "500-600", "test": "3-9"}), data)


def test_other_names_and_broken_files_are_skipped_once(data, make_video):
    make_video("mine.mp4", 3)
    (data / "somewhere/video_00004.mp4").write_text("text")
    (data / "notes.txt").touch()
    sources = open_splits(config(), data)
    reasons = {video.id: video.reason for video in sources["train"].skipped}
    assert reasons.keys() == {"mine", "video_00004"}
    assert "video_00000.mp4" in reasons["mine"]
    assert [len(source.skipped) for source in sources.values()] == [2, 0, 0]
    assert [dict(source.passed_over) for source in sources.values()] == [{".txt": 1}, {}, {}]


def test_folders_that_contain_something_else(tmp_path, make_video):
    for root in ("{data}/nowhere", "{data}"):
        with pytest.raises(VideoError, match=r"river data --config clevrer .*--mirror <folder with video_train"):
            open_splits(config(root=root), tmp_path)
    for names, error in (
        (["a.mp4"], r"1 videos .*video_00000\.mp4.*river data"),
        (["x/video_3.mp4", "y/video_03.mp4"], "remove one"),
    ):
        for name in names:
            make_video(name, 3)
        with pytest.raises(VideoError, match=error):
            open_splits(config(), tmp_path)
