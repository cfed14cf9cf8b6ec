"""Finding videos, naming them, and remembering their counts."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from stage1_autoencoder.videos import index, index_cache
from stage1_autoencoder.videos.index import Indexed, digest, find_videos, index_videos
from stage1_autoencoder.videos.index_cache import CACHE_NAME
from stage1_autoencoder.videos.source import VideoError


@pytest.fixture
def probed(monkeypatch) -> list[str]:
    """Names of the videos that were really counted."""
    names: list[str] = []

    def spy(probe):
        def call(path, name):
            names.append(name)
            return probe(path, name)

        return call

    monkeypatch.setattr(index, "probe_video", spy(index.probe_video))
    monkeypatch.setattr(index, "probe_folder", spy(index.probe_folder))
    return names


def indexed(root: Path, paths: list[Path]) -> dict[Path, Indexed]:
    entries = index_videos(root, [path.relative_to(root).as_posix() for path in paths])
    return dict(zip(paths, entries, strict=True))


def remembered(root: Path) -> dict[bytes, int]:
    """Frames of the videos that the index keeps, by name."""
    with contextlib.closing(sqlite3.connect(root / CACHE_NAME)) as database:
        return dict(database.execute("SELECT name, frames FROM video"))


def test_finds_files_and_frame_folders_in_natural_order(tmp_path, make_frames):
    for name in ("clip10.mp4", "clip2.AVI", "deep/er/clip1.mkv", ".hidden/a.mp4", ".b.mp4", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    make_frames("frames3")
    make_frames("deep/frames")
    (tmp_path / "cover.png").touch()
    (tmp_path / "deep/er/thumbnail.jpg").touch()
    found = find_videos(tmp_path)
    assert found.ids == ["clip2", "clip10", "deep/er/clip1", "deep/frames", "frames3"]
    assert found.names == ["clip2.AVI", "clip10.mp4", "deep/er/clip1.mkv", "deep/frames", "frames3"]
    assert found.passed_over == {".txt": 1, ".png": 1, ".jpg": 1}
    assert not found.unreadable


def test_equal_ids_keep_their_extensions(tmp_path, make_frames):
    for name in ("a.mp4", "a.avi", "b.mp4"):
        (tmp_path / name).touch()
    make_frames("b")
    assert find_videos(tmp_path).ids == ["a.avi", "a.mp4", "b", "b.mp4"]
    (tmp_path / "a.mp4.avi").touch()
    with pytest.raises(VideoError, match=r"would both be video 'a\.mp4': rename one"):
        find_videos(tmp_path)


def test_links_in_a_circle_end(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.mp4").touch()
    (tmp_path / "sub/up").symlink_to(tmp_path, target_is_directory=True)
    assert find_videos(tmp_path).ids == ["sub/a"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "the folder is empty; expected .avi"),
        (["a.tfrecord", "b.txt", "README"], r"no videos in it, only \.tfrecord, \.txt, README; expected"),
        (["1.png"], "pictures lie directly in it; move the frames of each video into a folder of its own"),
    ],
)
def test_a_folder_without_videos_says_what_it_has(tmp_path, names, message):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(VideoError, match=message) as caught:
        find_videos(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_counts_are_remembered_until_a_file_changes(tmp_path, make_video, make_frames, probed):
    paths = [make_video("a.avi", 3), make_video("b.avi", 4), make_frames("c", 5)]
    counts = [entry.probe.frames for entry in indexed(tmp_path, paths).values()]
    assert counts == [3, 4, 5]
    assert sorted(probed) == ["a.avi", "b.avi", "c"]
    probed.clear()
    assert [entry.probe.frames for entry in indexed(tmp_path, paths).values()] == counts
    assert probed == []
    make_video("b.avi", 6)
    make_frames("c", 7)
    assert [entry.probe.frames for entry in indexed(tmp_path, paths).values()] == [3, 6, 7]
    assert sorted(probed) == ["b.avi", "c"]
    os.utime(paths[0], ns=(1, 1))
    probed.clear()
    indexed(tmp_path, paths)
    assert probed == ["a.avi"]


@pytest.mark.parametrize("content", [b"", b"{}", b"SQLite format 3\0 and more", "of version 99"])
def test_a_cache_that_is_not_ours_is_replaced(tmp_path, make_video, content):
    path = make_video("a.avi", 3)
    if content == "of version 99":
        with contextlib.closing(sqlite3.connect(tmp_path / CACHE_NAME)) as database:
            database.execute("PRAGMA user_version = 99")
            database.execute("CREATE TABLE video (frames TEXT)")
    else:
        (tmp_path / CACHE_NAME).write_bytes(content)
    assert indexed(tmp_path, [path])[path].probe.frames == 3
    assert remembered(tmp_path) == {b"a.avi": 3}


def test_what_is_remembered_may_be_nonsense(tmp_path, make_video, probed):
    paths = [make_video("a.avi", 3), make_video("b.avi", 4)]
    indexed(tmp_path, paths)
    with contextlib.closing(sqlite3.connect(tmp_path / CACHE_NAME)) as database:
        database.execute("UPDATE video SET keyframes = 'no JSON' WHERE name = ?", (b"a.avi",))
        database.commit()
    assert [entry.probe.frames for entry in indexed(tmp_path, paths).values()] == [3, 4]


def test_an_index_that_is_stopped_is_gone_on_from(tmp_path, make_video, probed, monkeypatch):
    paths = [make_video(f"{number}.avi", 2) for number in range(6)]
    monkeypatch.setattr(index, "_AHEAD", 2)
    monkeypatch.setattr(index_cache, "_SECONDS", 0.0)
    entries = index_videos(tmp_path, [path.name for path in paths])
    for _ in range(3):
        next(entries)
    kept = remembered(tmp_path)  # while the other still runs
    assert kept.keys() >= {b"0.avi", b"1.avi"}
    with pytest.raises(KeyboardInterrupt):
        entries.throw(KeyboardInterrupt())
    probed.clear()
    indexed(tmp_path, paths)
    assert set(probed) <= {path.name for path in paths[2:]}


def test_videos_that_are_gone_are_forgotten_some_time(tmp_path, make_video):
    paths = [make_video(f"{number}.avi", 2) for number in range(5)]
    indexed(tmp_path, paths)
    indexed(tmp_path, paths[:3])
    assert len(remembered(tmp_path)) == 5
    indexed(tmp_path, paths[:2])
    assert remembered(tmp_path) == {b"0.avi": 2, b"1.avi": 2}


def test_two_processes_index_one_folder(tmp_path, make_video):
    names = [make_video(f"{number}.avi", 2).name for number in range(20)]
    code = "import sys; from pathlib import Path; from stage1_autoencoder.videos.index import index_videos; "
    code += "print([entry.probe.frames for entry in index_videos(Path(sys.argv[1]), sys.argv[2:])])"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), *names], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in processes] == [str([2] * 20)] * 2
    assert len(remembered(tmp_path)) == 20


def test_nothing_is_written_on_request(tmp_path, make_video, probed):
    path = make_video("a.avi", 3)
    assert [entry.probe.frames for entry in index_videos(tmp_path, ["a.avi"], remember=False)] == [3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.avi"]
    indexed(tmp_path, [path])
    probed.clear()
    assert [entry.probe.frames for entry in index_videos(tmp_path, ["a.avi"], remember=False)] == [3]
    assert probed == []  # what others have written is read


def test_the_index_of_an_earlier_version_goes(tmp_path, make_video):
    (tmp_path / ".river_index.json").write_text("{}")
    indexed(tmp_path, [make_video("a.avi", 3)])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [CACHE_NAME, "a.avi"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Clip.mp4", "clip.avi"], r"Clip\.mp4 and .*clip\.avi differ only by upper and lower case.*: rename one"),
        (["a/b.mp4", "A/b.mp4"], r"[aA]/b\.mp4 and .*[aA]/b\.mp4 differ only by upper and lower case"),
        (["a.mp4", "a.avi", "A.mov"], None),
    ],
)
def test_names_that_differ_only_by_case(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    if message is None:  # two of them keep their extensions, and then all differ
        assert sorted(find_videos(tmp_path).ids) == ["A", "a.avi", "a.mp4"]
        return
    with pytest.raises(VideoError, match=message):
        find_videos(tmp_path)


def test_folders_that_cannot_be_looked_into(tmp_path, monkeypatch):
    scandir = os.scandir

    def guarded(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(VideoError, match=r"closed: cannot be looked into \(Permission denied\)"):
        find_videos(tmp_path)
    (tmp_path / "a.mp4").touch()
    found = find_videos(tmp_path)
    assert found.ids == ["a"]
    assert [(video.id, video.reason) for video in found.unreadable] == [
        ("closed", "cannot be looked into (Permission denied)")
    ]


def test_files_without_extension_are_not_listed_without_end(tmp_path):
    for number in range(250):
        (tmp_path / f"file{number}").touch()
    (tmp_path / "a.mp4").touch()
    passed_over = find_videos(tmp_path).passed_over
    assert sum(passed_over.values()) == 250
    assert len(passed_over) == 101


def digests(root: Path) -> dict[str, str]:
    found = find_videos(root)
    entries = index_videos(root, found.names)
    return {video_id: entry.digest for video_id, entry in zip(found.ids, entries, strict=True)}


def test_digests_are_of_the_content_alone(tmp_path, make_video, make_frames, probed):
    make_video("data/a.avi", 3)
    make_video("data/b.mp4", 4)
    make_frames("data/c", 5)
    first = digests(tmp_path / "data")
    assert len(set(first.values())) == 3
    assert all(len(value) == 64 for value in first.values())
    shutil.copytree(tmp_path / "data", tmp_path / "copy", copy_function=shutil.copyfile)  # with new times
    (tmp_path / "copy/b.mp4").rename(tmp_path / "copy/moved.mp4")
    os.utime(tmp_path / "copy/a.avi", ns=(1, 1))
    probed.clear()
    copied = digests(tmp_path / "copy")
    assert probed, "the copy's index must not be believed"
    assert copied == {"a": first["a"], "moved": first["b"], "c": first["c"]}
    assert digests(tmp_path / "data") == first


def test_digests_of_files_change_with_any_byte(tmp_path, make_video):
    path = make_video("a.avi", 3)
    content = path.read_bytes()
    seen = {digest(path)}
    for at in (0, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        seen.add(digest(path))
    assert len(seen) == 4
    path.write_bytes(content)
    assert digest(path) in seen


def test_a_replaced_file_has_another_digest_and_is_read_once(tmp_path, make_video, monkeypatch):
    read: list[str] = []
    monkeypatch.setattr(index, "digest", lambda path: read.append(path.name) or digest(path))
    make_video("a.avi", 3)
    make_video("b.avi", 3)
    first = digests(tmp_path)
    assert digests(tmp_path) == first
    assert sorted(read) == ["a.avi", "b.avi"]
    make_video("a.avi", 4)
    second = digests(tmp_path)
    assert (second["a"] != first["a"], second["b"] == first["b"]) == (True, True)
    assert sorted(read) == ["a.avi", "a.avi", "b.avi"]


def test_digests_of_frame_folders(make_frames):
    folder = make_frames("v", 7)
    seen = [digest(folder)]
    (folder / "notes.txt").write_text("not a frame")
    assert digest(folder) == seen[0]
    for name in ("0.png", "3.png", "6.png"):  # first, middle and last: a byte is enough
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
        seen.append(digest(folder))
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes() + b"x")  # others: by size,
    seen.append(digest(folder))
    (folder / "2.png").rename(folder / "2b.png")  # name,
    seen.append(digest(folder))
    (folder / "5.png").unlink()  # and number
    seen.append(digest(folder))
    assert len(set(seen)) == len(seen)


def test_does_without_a_cache_where_it_cannot_be_written(tmp_path, make_video):
    path = make_video("a.avi", 3)
    (tmp_path / CACHE_NAME).mkdir()
    for _ in range(2):
        assert indexed(tmp_path, [path])[path].probe.frames == 3
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [CACHE_NAME, "a.avi"]


def test_unusable_videos_have_a_reason_and_are_looked_at_again(tmp_path, make_video, probed):
    good, bad = make_video("a.avi", 3), tmp_path / "b.mp4"
    bad.write_text("text")
    for _ in range(2):
        entries = indexed(tmp_path, [good, bad])
        assert entries[good].reason is None
        assert entries[bad].probe is None
        assert entries[bad].reason.startswith("cannot be opened as a video")
    assert probed.count("b.mp4") == 2
    assert probed.count("a.avi") == 1
    bad.write_bytes(make_video("c.mp4", 3).read_bytes())
    assert indexed(tmp_path, [good, bad])[bad].digest == digest(bad)
    gone = tmp_path / "gone.avi"
    assert "No such file" in indexed(tmp_path, [gone])[gone].reason


def test_no_progress_where_nobody_looks(tmp_path, make_video, capfd):
    indexed(tmp_path, [make_video("a.avi", 3)])
    assert capfd.readouterr() == ("", "")
