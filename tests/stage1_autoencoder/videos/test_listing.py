"""Finding and naming videos below a folder."""

import os
from pathlib import Path

import pytest
from PIL import Image

from stage1_autoencoder.videos.listing import find_named_videos, find_videos
from stage1_autoencoder.videos.source import SkippedVideo, VideoError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_files_and_frame_folders_in_natural_order(tmp_path, make_frames):
    touch(tmp_path, "clip10.mp4", "clip2.AVI", "deep/er/clip1.mkv", ".hidden/a.mp4", ".b.mp4", "notes.txt")
    make_frames("frames3")
    make_frames("deep/frames")
    touch(tmp_path, "cover.png", "deep/er/thumbnail.jpg")
    found = find_videos(tmp_path)
    assert found.ids == ["clip2", "clip10", "deep/er/clip1", "deep/frames", "frames3"]
    assert found.names == ["clip2.AVI", "clip10.mp4", "deep/er/clip1.mkv", "deep/frames", "frames3"]
    assert found.passed_over == {".txt": 1, ".png": 1, ".jpg": 1}
    assert not found.skipped


def test_of_webp_files_animations_are_videos_and_thumbnails_are_not(tmp_path):
    touch(tmp_path, "clip.mp4", "damaged.webp")
    still, other = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "red")
    still.save(tmp_path / "clip.webp")
    Image.new("RGBA", (8, 8), (0, 0, 0, 9)).save(tmp_path / "faded.webp")
    still.save(tmp_path / "moving.WEBP", save_all=True, append_images=[other])
    found = find_videos(tmp_path)
    assert found.names == ["clip.mp4", "damaged.webp", "moving.WEBP"]
    assert found.passed_over == {".webp": 2}


def test_every_kind_that_people_have_is_found(tmp_path):
    kinds = "mp4 m4v mov avi mkv webm gif ts mts m2ts mpg mpeg wmv flv ogv webp apng 3gp MP4"
    touch(tmp_path, *(f"{number}.{kind}" for number, kind in enumerate(kinds.split())))
    assert len(find_videos(tmp_path)) == len(kinds.split())


def test_equal_ids_keep_their_extensions(tmp_path, make_frames):
    touch(tmp_path, "a.mp4", "a.avi", "b.mp4")
    make_frames("b")
    assert find_videos(tmp_path).ids == ["a.avi", "a.mp4", "b", "b.mp4"]
    touch(tmp_path, "a.mp4.avi")
    with pytest.raises(VideoError, match=r"a\.mp4.*'a\.mp4'.*rename one"):
        find_videos(tmp_path)


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (["Clip.mp4", "clip.avi"], r"Clip\.mp4 and .*clip\.avi .*rename one"),
        (["a/b.mp4", "A/b.mp4"], r"[aA]/b\.mp4 and .*[aA]/b\.mp4 .*rename one"),
        (["a.mp4", "a.avi", "A.mov"], None),  # two of them keep their extensions, and then all differ
    ],
)
def test_names_that_differ_only_in_case(tmp_path, names, error):
    touch(tmp_path, *names)
    if error is None:
        assert sorted(find_videos(tmp_path).ids) == ["A", "a.avi", "a.mp4"]
    else:
        with pytest.raises(VideoError, match=error):
            find_videos(tmp_path)


def test_circular_links_end(tmp_path):
    touch(tmp_path, "sub/a.mp4")
    (tmp_path / "sub/up").symlink_to(tmp_path, target_is_directory=True)
    assert find_videos(tmp_path).ids == ["sub/a"]


@pytest.mark.parametrize(
    ("names", "error"),
    [
        ([], r"empty.*\.avi"),
        (["a.tfrecord", "b.txt", "README"], r"\.tfrecord, \.txt, README.*\.avi"),
        (["1.png"], "pictures.*a folder of its own"),
    ],
)
def test_a_folder_without_videos(tmp_path, names, error):
    touch(tmp_path, *names)
    with pytest.raises(VideoError, match=error) as caught:
        find_videos(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_folders_that_cannot_be_listed(tmp_path, monkeypatch):
    scandir = os.scandir

    def guarded(path):  # file modes do not stop root
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(VideoError, match=r"closed: .*Permission denied"):
        find_videos(tmp_path)
    touch(tmp_path, "a.mp4")
    found = find_videos(tmp_path)
    assert found.ids == ["a"]
    (skipped,) = found.skipped
    assert skipped.id == "closed"
    assert "Permission denied" in skipped.reason


def test_kinds_of_other_files_are_limited(tmp_path):
    touch(tmp_path, *(f"file{number}" for number in range(250)), "a.mp4")
    passed_over = find_videos(tmp_path).passed_over
    assert sum(passed_over.values()) == 250
    assert len(passed_over) == 101


def test_names_of_a_data_set(tmp_path):
    touch(tmp_path, "x/take_2.mp4", "y/take_1.mp4", "other.mp4")
    found = find_named_videos(tmp_path, lambda stem: stem if stem.startswith("take") else None, "take_1.mp4", "get it")
    assert (found.ids, found.names) == (["take_2", "take_1"], ["x/take_2.mp4", "y/take_1.mp4"])
    assert found.skipped == [SkippedVideo("other", "is not named like take_1.mp4")]
    with pytest.raises(VideoError, match=r"x/take_2\.mp4.*y/take_1\.mp4.*'?all"):
        find_named_videos(tmp_path, lambda stem: "all" if "_" in stem else None, "take_1.mp4", "get it")
    with pytest.raises(VideoError, match=r"3 videos.*take_1\.mp4.*get it"):
        find_named_videos(tmp_path, lambda stem: None, "take_1.mp4", "get it")
