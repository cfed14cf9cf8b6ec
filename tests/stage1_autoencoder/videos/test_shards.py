"""Listing the files of a folder that hold many videos each."""

import pytest

from stage1_autoencoder.videos import VideoError
from stage1_autoencoder.videos.shards import list_shards


def test_files_in_natural_order(tmp_path):
    for name in ("a10.h5", "a9.h5", "a2.HDF5", ".a1.h5", "a3.h5.part", "README", "b.txt", "c.txt"):
        (tmp_path / name).touch()
    shards = list_shards(tmp_path, {".h5", ".hdf5"})
    assert shards.names == ["a2.HDF5", "a9.h5", "a10.h5"]
    assert shards.passed_over == {".part": 1, "README": 1, ".txt": 2}


@pytest.mark.parametrize("other", ["a.hdf5", "A.h5"])
def test_two_files_of_one_name(tmp_path, other):
    (tmp_path / "a.h5").touch()
    (tmp_path / other).touch()
    with pytest.raises(VideoError, match=r"[aA]\.h.*and .*[aA]\.h.*rename one"):
        list_shards(tmp_path, {".h5", ".hdf5"})


def test_a_folder_that_cannot_be_listed(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(VideoError, match=r"file: .*Not a directory"):
        list_shards(tmp_path / "file", {".h5"})
