"""The table of videos: every video of every split once, whatever its name is made of; all of it or nothing."""

import csv

import pytest

from pipelines.data.survey import COLUMNS, write_video_list
from stage1_autoencoder.videos.source import VideoInfo


class Videos(list):
    """A source, as far as the list looks at it."""

    @property
    def videos(self):
        return iter(self)


VIDEOS = [
    VideoInfo("a/b", 12, 25.0, "f" * 64, (160, 120)),
    VideoInfo('tab\there, "quoted"\nü', 3, 29.97003, "e 3:9", None),
]


def test_all_videos_of_all_splits(tmp_path):
    path = tmp_path / "runs" / "mine" / "videos.tsv"
    assert write_video_list(path, {"train": Videos(VIDEOS), "test": Videos(VIDEOS[:1])}) == 3
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, dialect="excel-tab"))
    assert rows == [
        list(COLUMNS),
        ["train", "a/b", "12", "25", "160", "120", "f" * 64],
        ["train", 'tab\there, "quoted"\nü', "3", "29.97", "", "", "e 3:9"],
        ["test", "a/b", "12", "25", "160", "120", "f" * 64],
    ]
    assert [file.name for file in path.parent.iterdir()] == ["videos.tsv"]


def test_a_list_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    path = tmp_path / "videos.tsv"
    write_video_list(path, {"train": Videos(VIDEOS[:1])})
    before = path.read_bytes()

    class Torn:
        @property
        def videos(self):
            yield VIDEOS[0]
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_video_list(path, {"train": Torn()})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["videos.tsv"]
