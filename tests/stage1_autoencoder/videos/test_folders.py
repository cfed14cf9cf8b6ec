"""Folders of videos as sources: splits, reading, unusable videos, and fingerprints."""

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import shutil
import sqlite3
from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pytest

from stage1_autoencoder.videos import BrokenVideoError, VideoError, open_source, open_splits, open_video
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.index import CACHE_NAME, digest
from stage1_autoencoder.videos.preprocessing import preprocessing_description
from tests.stage1_autoencoder.videos.conftest import ids


def config(**settings) -> DatasetConfig:
    return DatasetConfig(**{"name": "mine", "source": "videos", "root": "{data}", "image_size": 16} | settings)


@pytest.fixture
def three_splits(tmp_path, make_video):
    for name in ("train/a.avi", "train/b2.avi", "train/b10.avi", "validation/a.avi", "test/c.avi"):
        make_video(name, 7)
    return tmp_path


def test_split_folders(three_splits, make_video):
    (three_splits / "train/text.mp4").write_text("text")
    whole = make_video("train/cut.avi", 12)
    whole.write_bytes(whole.read_bytes()[:-200])
    sources = open_splits(config(), three_splits)
    assert ids(sources) == {"train": ["a", "b2", "b10"], "val": ["a"], "test": ["c"]}
    assert [[video.id for video in source.skipped] for source in sources.values()] == [["cut", "text"], [], []]
    assert "cut off" in sources["train"].skipped[0].reason
    assert sources["train"].videos[0].size == (64, 48)
    copy = pickle.loads(pickle.dumps(sources["train"]))
    assert (copy.read(1) == sources["train"].read(1)).all()
    # Existing stores contain fingerprints of this document.
    document = {
        "videos": [asdict(video) for video in copy.videos],
        "preprocessing": preprocessing_description(copy.dataset),
    }
    assert copy.fingerprint == hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("kept", ["kept", "older version", "read only", "deleted"])
def test_a_folder_remembers_the_split_of_each_video(tmp_path, make_video, kept):
    """Also that of a video that fills a split; without the memory only those that fill one may move."""

    def split_of() -> dict[str, str]:
        found = ids(open_splits(config(), tmp_path))
        return {name: split for split, group in found.items() for name in group}

    if kept == "read only":
        (tmp_path / CACHE_NAME).mkdir()  # no file can have this name
    names = [f"v{number}" for number in range(30)]
    places = {name: int.from_bytes(hashlib.sha256(f"0{name}".encode()).digest()[:8], "big") / 2**64 for name in names}
    late, *rest = sorted(names, key=places.get)
    assert places[late] < 0.1  # it belongs into test, which one of `few` fills
    few = [name for name in rest if places[name] > 0.2][:4]
    make_video("first.avi", 2)
    for name in few:
        shutil.copy(tmp_path / "first.avi", tmp_path / f"{name}.avi")
    (tmp_path / "first.avi").unlink()
    before = split_of()
    assert [before[name] for name in few] == ["test", "val", "train", "train"]
    shutil.copy(tmp_path / f"{few[0]}.avi", tmp_path / f"{late}.avi")
    if kept == "older version":
        with contextlib.closing(sqlite3.connect(tmp_path / CACHE_NAME)) as database:
            database.execute("PRAGMA user_version = 3")
    elif kept == "deleted":
        (tmp_path / CACHE_NAME).unlink()
    after = split_of()
    assert after[late] == "test"
    remembered = kept in ("kept", "older version")
    assert (after[few[0]] == "test") == remembered
    stay = few if remembered else few[2:]
    assert [after[name] for name in stay] == [before[name] for name in stay]
    if remembered:
        (tmp_path / f"{late}.avi").unlink()
        (tmp_path / f"{few[0]}.avi").unlink()
        assert "test" not in split_of().values()  # those that are left were trained on, maybe


def test_a_missing_val_folder_is_taken_from_train_and_a_missing_test_only_on_request(three_splits):
    shutil.rmtree(three_splits / "validation")
    shutil.rmtree(three_splits / "test")
    sources = open_splits(config(), three_splits)
    assert {split: len(names) for split, names in ids(sources).items()} == {"train": 2, "val": 1}
    with pytest.raises(VideoError, match=r"test split of 'mine'.*train 2, val 1.*dataset\.splits\.test"):
        open_source(config(), three_splits, "test")
    sources = open_splits(config(splits={"test": 0.3, "val": 0.0}), three_splits)
    assert list(sources) == ["train", "test"]
    assert sorted(itertools.chain(*ids(sources).values())) == ["a", "b10", "b2"]


def test_fractions_where_there_are_no_split_folders(tmp_path, make_video, make_frames):
    for number in range(5):
        make_video(f"v{number}.avi", 2)
    make_frames("nested/frames", 3)
    sources = open_splits(config(), tmp_path)
    assert list(sources) == ["train", "val", "test"]
    everything = sorted(itertools.chain(*ids(sources).values()))
    assert everything == ["nested/frames", "v0", "v1", "v2", "v3", "v4"]
    assert ids(open_splits(config(splits={"val": 0.0, "test": 0.0}), tmp_path)).keys() == {"train"}
    with pytest.raises(VideoError, match=r"dataset\.splits: .*0\.5"):
        open_splits(config(splits={"train": 0.5, "val": 0.1, "test": 0.1}), tmp_path)
    (last,) = ids(open_splits(config(splits={"val": 0.49, "test": 0.5}), tmp_path))["train"]
    (tmp_path / f"{last}.avi").unlink()
    with pytest.raises(VideoError, match=r"5 videos.*0\.49.*add videos.*split_seed"):  # the others stay where they are
        open_splits(config(splits={"val": 0.49, "test": 0.5}), tmp_path)


def test_missing_folders_and_videos(tmp_path, make_video):
    with pytest.raises(VideoError, match=r"nowhere: .*'mine'.*dataset.root"):
        open_splits(config(root="{data}/nowhere"), tmp_path)
    with pytest.raises(VideoError, match=f"{tmp_path}/mine: "):  # the default: <data_root>/<name>
        open_splits(config(root=None), tmp_path)
    with pytest.raises(VideoError, match="empty"):
        open_splits(config(), tmp_path)
    make_video("test/a.avi")
    with pytest.raises(VideoError, match=r"test.* no folder train"):
        open_splits(config(), tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(VideoError, match=r"train: .*empty"):
        open_splits(config(), tmp_path)
    (tmp_path / "train/b.mp4").write_text("text")
    with pytest.raises(VideoError, match=r"train: .*1 videos.* b cannot be opened"):
        open_splits(config(), tmp_path)
    make_video("train/a.avi")
    make_video("val/a.avi")
    make_video("validation/a.avi")
    with pytest.raises(VideoError, match=r"both val and validation .*remove one"):
        open_splits(config(), tmp_path)


@pytest.mark.parametrize(("step", "kept"), [(1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6]), (4, [0, 4]), (9, [0])])
@pytest.mark.parametrize("kind", ["file", "frames"])
def test_frames_of_a_source(tmp_path, make_video, make_frames, read_numbers, step, kept, kind):
    make_video("a.avi", 7) if kind == "file" else make_frames("a", 7)
    source = open_source(config(frame_step=step), tmp_path, "train")
    assert source.videos[0].frames == len(kept)
    assert source.videos[0].fps == pytest.approx(10 / step)
    frames = list(source.iterate(0))
    assert all(frame.shape == (16, 16, 3) and frame.dtype == np.uint8 for frame in frames)
    assert read_numbers(frames) == kept
    assert read_numbers(list(source.iterate(0, 1))) == kept[1:]
    assert list(source.iterate(0, 1, 1)) == []
    everything = source.read(0)
    assert everything.shape == (len(kept), 16, 16, 3)
    assert (everything == np.stack(frames)).all()
    last = len(kept) - 1
    assert read_numbers(source.read(0, [last, 0, last])) == [kept[-1], kept[0], kept[-1]]
    assert source.read(0, []).shape == (0, 16, 16, 3)
    for positions in ([len(kept)], [-1], [0, 9]):
        with pytest.raises(IndexError, match=rf"of a, .* {len(kept)}"):
            source.read(0, positions)
    for start, stop in ((0, len(kept) + 1), (1, 0), (-1, 1)):
        with pytest.raises(IndexError, match=rf"of a, .* {len(kept)}"):
            next(source.iterate(0, start, stop))


NTSC = Fraction(30000, 1001)


@pytest.mark.parametrize(
    ("native", "fps", "step", "kept"),
    [
        (10, 10, 1, [*range(16)]),
        (30, 10, 1, [0, 3, 6, 9, 12, 15]),
        (30, 10, 2, [0, 6, 12]),
        (NTSC, 10, 1, [0, 2, 5, 8, 11, 14]),  # its frame 3 is shown a moment after the time of frame 1
        (NTSC, float(NTSC), 1, [*range(16)]),
        (25, 10, 1, [0, 2, 5, 7, 10, 12, 15]),
        (10, 12.5, 1, [0, 0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12, 13, 14, 15]),
        (5, 10, 1, [number // 2 for number in range(32)]),
        (10, 0.1, 1, [0]),
    ],
)
def test_videos_are_resampled_by_time(tmp_path, make_video, read_numbers, native, fps, step, kept):
    """The frame that is shown at 0, 1 / fps, 2 / fps ... seconds, whatever the rate of the file."""
    make_video("a.avi", 16, rate=native)
    settings = config(fps=fps, frame_step=step)
    source = open_source(settings, tmp_path, "train")
    (video,) = source.videos
    assert (video.frames, video.fps) == (len(kept), pytest.approx(fps / step))
    frames = list(source.iterate(0))
    assert read_numbers(frames) == kept
    assert len({frame.ctypes.data for frame in frames}) == len(frames)  # each an array of its own
    for start, stop in ((0, 1), (len(kept) // 2, len(kept)), (len(kept) - 1, len(kept))):
        assert read_numbers(list(source.iterate(0, start, stop))) == kept[start:stop]
    assert read_numbers(source.read(0, [len(kept) - 1, 0])) == [kept[-1], kept[0]]
    assert read_numbers(pickle.loads(pickle.dumps(source)).select(np.array([0])).read(0)) == kept
    assert read_numbers(open_video(settings, tmp_path / "a.avi").read(0)) == kept
    # The files are the same, the frames are not.
    plain = open_source(config(frame_step=step), tmp_path, "train")
    assert plain.videos[0].fingerprint == video.fingerprint
    assert plain.fingerprint != source.fingerprint
    assert "fps" not in preprocessing_description(plain.dataset)


@pytest.mark.parametrize("kind", ["shapes", "bair", "hdf5"])
def test_sources_of_one_rate_are_not_resampled(kind):
    with pytest.raises(ValueError, match=rf"(?s)fps: 5.*{kind}.*frame_step"):
        DatasetConfig(name="mine", source=kind, fps=5)


def test_reads_no_further_than_needed(tmp_path, make_frames):
    folder = make_frames("a", 6)
    source = open_source(config(), tmp_path, "train")
    (folder / "4.png").write_bytes(b"damaged")
    assert source.read(0, [3, 1]).shape == (2, 16, 16, 3)
    with pytest.raises(BrokenVideoError, match=r"a: 4\.png"):
        source.read(0)


def test_a_video_that_shrinks_after_indexing_is_broken(tmp_path, make_video):
    make_video("a.avi", 7)
    source = open_source(config(), tmp_path, "train")
    make_video("a.avi", 5)
    with pytest.raises(BrokenVideoError, match=r"a: .*5 frames.* 6") as caught:
        list(source.iterate(0))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.video_id, copy.reason, str(copy)) == ("a", caught.value.reason, str(caught.value))


def test_the_fingerprint_is_that_of_the_content_and_the_settings(three_splits, make_video, tmp_path):
    def train(root=three_splits, **settings):
        return open_source(config(**settings), root, "train")

    first = train()
    assert train().fingerprint == first.fingerprint
    assert len({first.fingerprint, train(image_size=32).fingerprint, train(frame_step=2).fingerprint}) == 3
    copy = tmp_path / "elsewhere"
    shutil.copytree(three_splits / "train", copy / "train", copy_function=shutil.copyfile)
    os.utime(copy / "train/a.avi", ns=(1, 1))
    second = train(copy, splits={"val": 0.0})
    assert (second.videos, second.fingerprint) == (first.videos, first.fingerprint)
    (copy / "train/a.avi").rename(copy / "train/z.avi")
    renamed = train(copy, splits={"val": 0.0})
    assert renamed.fingerprint != first.fingerprint, "another id is another split"
    assert {video.fingerprint for video in renamed.videos} == {video.fingerprint for video in first.videos}
    make_video("train/a.avi", 8)
    assert train().fingerprint != first.fingerprint


def test_one_video_from_anywhere(make_video, make_frames, read_numbers, tmp_path):
    source = open_video(config(frame_step=2), make_video("somewhere/clip.mp4", 7, "libx264"))
    assert [video.id for video in source.videos] == ["clip"]
    assert source.videos[0].fingerprint == digest(tmp_path / "somewhere/clip.mp4")
    assert read_numbers(source.read(0)) == [0, 2, 4, 6]
    assert read_numbers(open_video(config(), make_frames("frames", 3)).read(0)) == [0, 1, 2]
    with pytest.raises(VideoError, match=r"nothing\.mp4: "):
        open_video(config(), tmp_path / "nothing.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match=r"empty: .*\.png or \.jpg"):
        open_video(config(), tmp_path / "empty")
    (make_frames("odd", 3) / "1.png").unlink()
    (tmp_path / "odd/1.png").mkdir()
    with pytest.raises(BrokenVideoError, match=r"odd: .*Is a directory"):
        open_video(config(), tmp_path / "odd")
    (tmp_path / "text.mp4").write_text("text")
    with pytest.raises(BrokenVideoError, match=r"text\.mp4: "):
        open_video(config(), tmp_path / "text.mp4")


def test_colors_that_ffmpeg_cannot_convert_break_the_video(tmp_path, make_video):
    make_video("a.mkv", 3, "libx264", **{"x264-params": "colormatrix=YCgCo"})
    with pytest.raises(BrokenVideoError, match=r"a: .*converted.*not supported"):
        open_source(config(), tmp_path, "train").read(0)


def test_what_lies_beside_split_folders_is_named(three_splits, make_video, make_frames):
    make_video("clip.mp4", 3)
    make_video("more/deep/one.avi", 3)
    make_frames("frames", 3)
    (three_splits / "notes.txt").write_text("no video")
    (three_splits / "papers").mkdir()
    (three_splits / ".hidden.mp4").write_text("hidden")
    sources = open_splits(config(), three_splits)
    assert ids(sources) == {"train": ["a", "b2", "b10"], "val": ["a"], "test": ["c"]}
    assert [video.id for video in sources["train"].skipped] == ["clip.mp4", "frames", "more"]
    assert all("train" in video.reason and "validation" in video.reason for video in sources["train"].skipped)


def test_a_selection_reads_the_same_frames(tmp_path, encode_frames):
    """With the keyframes of its own files."""
    keyints = [200, 64, 200, 72, 200]
    for number in range(5):
        frames = [np.full((48, 64, 3), (40 * number + 3 * i) % 250, np.uint8) for i in range(90)]
        options = {"x264-params": f"keyint={keyints[number]}:scenecut=0:threads=1"}
        encode_frames(tmp_path / f"{number}.mp4", frames, "libx264", **options)
    source = open_splits(config(splits={"val": 0, "test": 0}), tmp_path)["train"]
    rows = np.array([3, 4, 1])
    selected = source.select(rows)
    assert list(selected.videos) == [source.videos[row] for row in rows]
    for new, old in enumerate(rows):
        assert selected.probe(new) == source.probe(old)
        assert [keyframe.position for keyframe in selected.probe(new).keyframes] == [keyints[old]] * (old % 2)
        assert (selected.read(new, [70, 3]) == source.read(old, [70, 3])).all()
