"""Indexing videos: counts and digests, and that they are stored until a file changes."""

import contextlib
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import pytest

from stage1_autoencoder.videos.display import Display
from stage1_autoencoder.videos.index import CACHE_NAME, Indexed, digest, index_videos


def indexed(root: Path, paths: list[Path]) -> dict[str, Indexed]:
    """Results by file name."""
    entries = index_videos(root, [path.relative_to(root).as_posix() for path in paths])
    return dict(zip((path.name for path in paths), entries, strict=True))


def counts(root: Path, paths: list[Path]) -> list[int | None]:
    """Frames per video; None where it cannot be used."""
    return [entry.probe and entry.probe.frames for entry in indexed(root, paths).values()]


def stored(root: Path) -> dict[bytes, int]:
    """Frames of the videos in the index file, by name."""
    with contextlib.closing(sqlite3.connect(root / CACHE_NAME)) as database:
        return dict(database.execute("SELECT name, frames FROM video"))


def damage(*paths: Path) -> None:
    """Make videos unusable in a way that the index does not notice: size and time stay."""
    for path in paths:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in files:
            before = file.stat()
            file.write_bytes(bytes(before.st_size))
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_index_has_the_permissions_of_the_umask(tmp_path, make_video):
    before = os.umask(0o002)  # SQLite's own would be 644: colleagues could not write
    try:
        counts(tmp_path, [make_video("a.avi", 3)])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / CACHE_NAME).stat().st_mode) == 0o664


def test_results_are_stored_until_a_file_changes(tmp_path, make_video, make_frames, capfd):
    paths = [make_video("a.avi", 3), make_video("b.avi", 4), make_frames("c", 5)]
    first = indexed(tmp_path, paths)
    assert [entry.probe.frames for entry in first.values()] == [3, 4, 5]
    damage(*paths)
    assert indexed(tmp_path, paths) == first  # without reading them
    make_video("b.avi", 6)
    make_frames("c", 7)
    assert counts(tmp_path, paths) == [3, 6, 7]
    damage(*paths)
    for changed in (paths[0], paths[2] / "0.png"):  # another time alone
        os.utime(changed, ns=(1, time.time_ns() + 10**9))
    assert counts(tmp_path, paths) == [None, 6, None]
    assert capfd.readouterr() == ("", "")  # no progress bar without a terminal


@pytest.mark.parametrize("change", ["order", "times", "older"])
def test_changes_that_neither_total_size_nor_newest_time_reveal(tmp_path, make_frames, change):
    folder = make_frames("c", 4)
    for number in range(4):
        os.utime(folder / f"{number}.png", ns=(10**18, 10**18 + number))
    (before,) = indexed(tmp_path, [folder]).values()
    if change == "order":
        for old, new in (("0", "x"), ("2", "0"), ("x", "2")):
            (folder / f"{old}.png").rename(folder / f"{new}.png")
    else:
        frame = folder / "0.png"
        content = bytearray(frame.read_bytes())
        content[-1] ^= 1
        frame.write_bytes(content)
        os.utime(frame, ns=(10**18, 10**18 + (1 if change == "times" else -1)))
    (after,) = indexed(tmp_path, [folder]).values()
    assert after.digest == digest(folder) != before.digest


@pytest.mark.parametrize("content", [b"", b"{}", b"SQLite format 3\0 and more", "of version 99"])
def test_a_foreign_index_file_is_replaced(tmp_path, make_video, content):
    path = make_video("a.avi", 3)
    if content == "of version 99":
        with contextlib.closing(sqlite3.connect(tmp_path / CACHE_NAME)) as database:
            database.execute("PRAGMA user_version = 99")
            database.execute("CREATE TABLE video (frames TEXT)")
    else:
        (tmp_path / CACHE_NAME).write_bytes(content)
    assert counts(tmp_path, [path]) == [3]
    assert stored(tmp_path) == {b"a.avi": 3}


def test_damaged_entries_are_ignored(tmp_path, make_video):
    paths = [make_video("a.avi", 3), make_video("b.avi", 4)]
    indexed(tmp_path, paths)
    with contextlib.closing(sqlite3.connect(tmp_path / CACHE_NAME)) as database:
        database.execute("UPDATE video SET keyframes = 'no JSON' WHERE name = ?", (b"a.avi",))
        database.commit()
    assert counts(tmp_path, paths) == [3, 4]


def test_an_interrupted_index_is_resumed(tmp_path, make_video, monkeypatch):
    paths = [make_video(f"{number}.avi", 2) for number in range(6)]
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))  # ten seconds pass at each look
    entries = index_videos(tmp_path, [path.name for path in paths])
    for _ in range(3):
        next(entries)
    assert stored(tmp_path).keys() >= {b"0.avi", b"1.avi"}  # while the other still runs
    with pytest.raises(KeyboardInterrupt):
        entries.throw(KeyboardInterrupt())
    damage(*paths)
    assert counts(tmp_path, paths)[:3] == [2, 2, 2]


def test_missing_videos_are_deleted_when_they_are_many(tmp_path, make_video):
    paths = [make_video(f"{number}.avi", 2) for number in range(5)]
    for some, left in ((paths, 5), (paths[:3], 5), (paths[:2], 2)):
        indexed(tmp_path, some)
        assert len(stored(tmp_path)) == left


def test_two_processes_index_one_folder(tmp_path, make_video):
    names = [make_video(f"{number}.avi", 2).name for number in range(20)]
    code = "import sys; from pathlib import Path; from stage1_autoencoder.videos.index import index_videos; "
    code += "print([entry.probe.frames for entry in index_videos(Path(sys.argv[1]), sys.argv[2:])])"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), *names], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in processes] == [str([2] * 20)] * 2
    assert len(stored(tmp_path)) == 20


def test_nothing_is_written_on_request(tmp_path, make_video):
    path = make_video("a.avi", 3)
    assert [entry.probe.frames for entry in index_videos(tmp_path, ["a.avi"], remember=False)] == [3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.avi"]
    indexed(tmp_path, [path])
    damage(path)
    assert [entry.probe.frames for entry in index_videos(tmp_path, ["a.avi"], remember=False)] == [3]  # as stored


def test_an_index_that_cannot_be_written_is_done_without(tmp_path, make_video):
    path = make_video("a.avi", 3)
    (tmp_path / CACHE_NAME).mkdir()
    for _ in range(2):
        assert counts(tmp_path, [path]) == [3]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [CACHE_NAME, "a.avi"]


def test_how_a_video_is_shown_is_stored(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        stream.set_display_rotation(90)
        container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode())
    first = indexed(tmp_path, [path])
    assert first["a.mp4"].probe.display == Display(orientation=8, aspect=Fraction(4, 3))
    damage(path)
    assert indexed(tmp_path, [path]) == first


def test_unusable_videos_have_a_reason_and_are_probed_again(tmp_path, make_video):
    good, bad = make_video("a.avi", 3), tmp_path / "b.mp4"
    bad.write_text("text")
    for _ in range(2):
        entries = indexed(tmp_path, [good, bad])
        assert entries["a.avi"].reason is None
        assert entries["b.mp4"].probe is None
        assert "cannot be opened" in entries["b.mp4"].reason
    bad.write_bytes(make_video("c.mp4", 3).read_bytes())
    assert indexed(tmp_path, [good, bad])["b.mp4"].digest == digest(bad)
    assert "No such file" in indexed(tmp_path, [tmp_path / "gone.avi"])["gone.avi"].reason


def test_digests_depend_on_the_content_alone(tmp_path, make_video, make_frames):
    paths = [make_video("data/a.avi", 3), make_video("data/b.mp4", 4), make_frames("data/c", 5)]
    first = indexed(tmp_path / "data", paths)
    assert len({entry.digest for entry in first.values()}) == 3
    assert all(len(entry.digest) == 64 for entry in first.values())
    copy = shutil.copytree(tmp_path / "data", tmp_path / "copy", copy_function=shutil.copyfile)  # with new times
    (copy / "b.mp4").rename(copy / "moved.mp4")
    copied = indexed(copy, [copy / "a.avi", copy / "moved.mp4", copy / "c"])
    assert list(copied.values()) == list(first.values())


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


VIDEOS = 10_000
BYTES_PER_VIDEO = 900  # a million of them, and the rest of the process, stay under 1 GB

CODE = """
import hashlib, os, resource, sys

from stage1_autoencoder.videos import index, open_splits
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.video_files import Probe

def walk(folder, onerror, followlinks):
    for number in range(int(sys.argv[2]) // 1000):
        yield f"{folder}/folder{number:04d}", [], [f"a_video_with_a_long_name_{i:04d}.mp4" for i in range(1000)]

def examine(path, name, stops):
    return index.Indexed(Probe(100, 25.0, 160, 120), hashlib.sha256(name.encode()).hexdigest())

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

os.walk, index.examine_video = walk, examine
index.stamp = lambda path: "1000 5"
before = peak()
dataset = DatasetConfig(name="many", source="videos", root=sys.argv[1])
sources = open_splits(dataset, "")
again = open_splits(dataset, "")["val"]  # from the index
assert sum(len(source.videos) for source in sources.values()) == int(sys.argv[2])
assert sum(video.frames for video in sources["test"].videos) == 100 * len(sources["test"].videos)
assert again.fingerprint == sources["val"].fingerprint
print(peak() - before)
"""


@pytest.mark.slow
def test_the_index_of_very_many_videos_takes_little_memory(tmp_path):
    """Of a simulated folder, of which no file exists."""
    done = subprocess.run([sys.executable, "-c", CODE, tmp_path, str(VIDEOS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Twice, since the sources of the first opening are still there.
    assert int(done.stdout) < 2 * BYTES_PER_VIDEO * VIDEOS
