"""A table of videos is the same sequence as the objects it was made of."""

import pickle

import numpy as np
import pytest

from stage1_autoencoder.videos.source import VideoInfo, VideoTable

VIDEOS = [
    VideoInfo("a/1", 12, 25.0, "f" * 64, (160, 120)),
    VideoInfo("b", 1, 29.97, "e" * 64 + " 3:9"),  # without a size
    VideoInfo("ü", 2**40, 0.5, "", (1, 70000)),
]


def test_a_table_is_the_sequence_of_its_videos():
    table = VideoTable(iter(VIDEOS))
    assert list(table) == VIDEOS
    assert table == VIDEOS
    assert table != VIDEOS[:2]
    assert table != [*VIDEOS[:2], VIDEOS[0]]
    assert table[-1] == VIDEOS[2]
    assert table[1:] == VIDEOS[1:]
    assert VIDEOS[1] in table
    with pytest.raises(IndexError):
        table[3]
    assert type(table[0].frames) is int  # goes into JSON
    assert table.frames.tolist() == [12, 1, 2**40]
    assert VideoTable.of(table) is table
    assert VideoTable.of(VIDEOS) == table
    assert pickle.loads(pickle.dumps(table)) == table
    assert not VideoTable()
    assert VideoTable().frames.sum() == 0
    selected = table.select(np.array([2, 0]))
    assert selected == [VIDEOS[2], VIDEOS[0]]
    assert (selected.ids, selected.fingerprints) == (["ü", "a/1"], ["", "f" * 64])
