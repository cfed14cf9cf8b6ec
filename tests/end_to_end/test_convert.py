"""The command line of `convert`: a user's videos as folders of pictures, and back."""

from types import ModuleType

import numpy as np
from PIL import Image

from stage1_autoencoder.videos import open_splits
from stage1_autoencoder.videos.config import DatasetConfig


def test_own_videos_there_and_back(place, story: ModuleType) -> None:
    """Files and folders of frames, in folders; every second frame of them; one that is broken."""
    place = place.with_sets("dataset.source=videos", "dataset.splits={}", "dataset.frame_step=2")
    names = ("train/a.mp4", "train/deep/b.gif", "train/deep/c", "val/d.avi", "test/e", "test/x2.mp4", "test/x10.mp4")
    story.write_videos(place.data, names)
    (place.data / "train" / "bad.avi").write_bytes(b"no video")
    out = place.folder / "frames"
    outcome = place.run("convert", "--out", str(out))
    assert outcome.code == 3
    assert "bad: cannot be opened" in outcome.err
    original = open_splits(
        DatasetConfig(name="t", source="videos", root=str(place.data), image_size=32, frame_step=2), "", remember=False
    )
    back = open_splits(DatasetConfig(name="back", source="videos", root=str(out), image_size=32), "", remember=False)
    assert {split: [video.id for video in source.videos] for split, source in back.items()} == {
        split: [video.id for video in source.videos] for split, source in original.items()
    }
    for split, source in original.items():
        for index in range(len(source.videos)):
            np.testing.assert_array_equal(back[split].read(index), source.read(index))


def test_a_part_as_jpg(place) -> None:
    place = place.with_sets("dataset.splits={train: 3, val: 1, test: 2}")
    out = place.folder / "frames"
    jpg = ("convert", "--out", str(out), "--format", "jpg", "--split", "test")
    place.run(*jpg, "--videos", "1").ok()
    assert [path.name for path in out.iterdir() if path.name[0] != "."] == ["test"]
    (video,) = (out / "test").iterdir()
    with Image.open(video / "00003.jpg") as picture:
        assert picture.size == (32, 32)
    place.run(*jpg).ok()  # the other video beside it
    assert len(list((out / "test").iterdir())) == 2
    place.run(*jpg, "--quality", "300").refused(2, "--quality 300")
    place.run(*jpg, "--quality", "30").refused(2, str(out), "--overwrite")
    assert place.run(*jpg, "--quality", "30", "--overwrite", "--quiet").ok().out == ""
