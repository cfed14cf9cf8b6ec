"""Which clips the protocol takes, and how they are read."""

from collections import Counter

import numpy as np
import pytest
import torch

from pipelines.config import EvaluationConfig, parse_config
from pipelines.errors import UserError
from pipelines.prediction import clips as clips_module
from pipelines.prediction.clips import Window, choose_windows, load_clips, most_moving, open_clips
from pipelines.runtime.context import RunContext
from stage1_autoencoder.videos import open_source
from stage1_autoencoder.videos.shapes import ShapesSource
from stage1_autoencoder.videos.source import BrokenVideoError

LENGTHS = [20, 9, 10, 35, 3, 12]


def protocol(**options) -> EvaluationConfig:
    return EvaluationConfig(**{"context": 4, "horizon": 6, **options})


def test_first_takes_the_first_frames_of_each_video_that_is_long_enough():
    windows = choose_windows(LENGTHS, protocol(window="first"), 100)
    assert windows == [Window(0, 0), Window(2, 0), Window(3, 0), Window(5, 0)]
    # Fewer than there are lie evenly in the split.
    assert choose_windows(LENGTHS, protocol(window="first"), 2) == [Window(0, 0), Window(5, 0)]
    assert choose_windows([10] * 9, protocol(window="first"), 3) == [Window(0, 0), Window(4, 0), Window(8, 0)]


def test_random_windows_lie_in_their_videos_and_take_videos_in_turn():
    windows = choose_windows(LENGTHS, protocol(window="random"), 400)
    # Each has its turn before any comes again; video 2 has exactly one window, so its turn comes once.
    assert sorted(window.video for window in windows[:4]) == [0, 2, 3, 5]
    assert sorted(window.video for window in windows[4:7]) == [0, 3, 5]
    assert all(0 <= window.start <= LENGTHS[window.video] - 10 for window in windows)
    # Every legal window is drawn, and none twice.
    assert sorted(Counter(windows).values()) == [1] * 41
    assert set(windows) == {Window(v, s) for v in (0, 2, 3, 5) for s in range(LENGTHS[v] - 9)}


def test_random_windows_are_a_function_of_the_seed_and_their_number():
    few = choose_windows(LENGTHS, protocol(window="random"), 5)
    assert choose_windows(LENGTHS, protocol(window="random"), 50)[:5] == few
    assert choose_windows(LENGTHS, protocol(window="random", seed=1), 50)[:5] != few


def frames_that_move(changes: list[int]) -> list[np.ndarray]:
    """Grey frames that differ by so much from the one before."""
    return [np.full((4, 4, 3), value, np.uint8) for value in np.cumsum([0, *changes])]


def test_a_moving_clip_starts_where_the_given_frames_move_most():
    # Frames 3 to 5 move by 30 + 20; what moves more later is not given, or leaves too little to predict.
    frames = frames_that_move([1, 0, 2, 30, 20, 0, 0, 90, 0, 99])
    assert most_moving(frames, context=3, needed=6) == 3
    assert most_moving(iter(frames), context=3, needed=11) == 0
    assert most_moving(frames, context=3, needed=4) == 6  # of two equal ones the first
    assert most_moving(frames_that_move([0] * 9), context=2, needed=5) == 0
    assert most_moving(frames[::-1], context=2, needed=3) == 0  # a fall of 99 is a movement
    assert most_moving(frames, context=1, needed=2) == 0


@pytest.mark.parametrize("window", ["first", "random"])
def test_no_video_is_long_enough(window):
    assert choose_windows([3, 9], protocol(window=window), 5) == []
    assert choose_windows([], protocol(window=window), 5) == []


def config(tmp_path, **evaluation):
    return parse_config(
        {
            "paths": {"data": str(tmp_path)},
            "dataset": {"name": "toy", "source": "shapes", "splits": {"test": 4}, "shapes": {"frames": 12}},
            "evaluation": {"context": 2, "horizon": 5, **evaluation},
        },
        "test",
    )


@pytest.fixture
def run_context() -> RunContext:
    return RunContext(device=torch.device("cpu"))


def test_clips_are_the_frames_of_the_videos(tmp_path, run_context):
    settings = config(tmp_path)
    clips = load_clips(settings, run_context, 2)
    source = open_source(settings.dataset, tmp_path, "test")
    assert [clip.name for clip in clips] == ["test_00000", "test_00003"]
    assert [clip.key for clip in clips] == [0, 3]
    for number, clip in zip((0, 3), clips, strict=True):
        assert clip.frames.shape == (7, 3, 64, 64)
        pixels = ((clip.frames + 1) * 127.5).round().byte().movedim(1, -1).numpy()
        assert (pixels == source.read(number, range(7))).all()
    assert not run_context.skipped


def test_random_clips_are_named_by_their_start(tmp_path, run_context):
    clips = load_clips(config(tmp_path, window="random", seed=2), run_context, 4)
    starts = [int(clip.name.partition("@")[2] or 0) for clip in clips]
    assert any(starts)
    source = open_source(config(tmp_path).dataset, tmp_path, "test")
    for clip, start in zip(clips, starts, strict=True):
        number = int(clip.name.removeprefix("test_").partition("@")[0])
        assert clip.key == (start << 32) + number
        expected = source.read(number, [start])[0].astype(np.float32) / 127.5 - 1
        assert np.abs(clip.frames[0].movedim(0, -1).numpy() - expected).max() < 1e-6


def test_too_long_a_protocol_says_which_lengths_there_are(tmp_path, run_context):
    with pytest.raises(UserError, match=r"2 \+ 30 frames.*the 4 videos have 12 to 12 frames: lower evaluation.horizon"):
        load_clips(config(tmp_path, horizon=30), run_context, 3)


def test_short_videos_are_left_out_and_said(tmp_path, run_context, monkeypatch, capsys):
    class Ragged(ShapesSource):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            object.__setattr__(self.videos[1], "frames", 3)

    monkeypatch.setattr(clips_module, "open_source", lambda dataset, root, split: Ragged(dataset, split))
    clips = load_clips(config(tmp_path), run_context, 10)
    assert [clip.name for clip in clips] == ["test_00000", "test_00002", "test_00003"]
    assert "1 of 4 videos are shorter than the 7 frames" in capsys.readouterr().out


def break_videos(monkeypatch, broken: set[int]) -> None:
    read = ShapesSource.read

    def torn(self, index, positions=None):
        if index in broken:
            raise BrokenVideoError(self.videos[index].id, "torn")
        return read(self, index, positions)

    monkeypatch.setattr(ShapesSource, "read", torn)


def test_broken_videos_are_skipped_and_others_keep_their_key(tmp_path, run_context, monkeypatch):
    break_videos(monkeypatch, {1})
    clips = load_clips(config(tmp_path), run_context, 4)
    assert [(clip.name, clip.key) for clip in clips] == [("test_00000", 0), ("test_00002", 2), ("test_00003", 3)]
    assert run_context.skipped == {"test_00001": "torn"}


def test_only_broken_videos_are_an_error(tmp_path, run_context, monkeypatch):
    break_videos(monkeypatch, {0, 1, 2, 3})
    with pytest.raises(UserError, match="none of 4 videos can be decoded"):
        load_clips(config(tmp_path), run_context, 4)


def test_moving_clips_are_read_from_where_they_start(tmp_path, run_context, monkeypatch):
    still, jump = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 200, np.uint8)

    def iterate(self, index, start=0, stop=None):
        return iter(([still] * (3 + index // 3) + [jump] * 9)[:12][start:stop])

    monkeypatch.setattr(ShapesSource, "iterate", iterate)
    clips = load_clips(config(tmp_path, window="moving"), run_context, 2)
    assert [clip.name for clip in clips] == [
        "test_00000@2",
        "test_00003@3",
    ]  # the second given frame is the first bright one
    assert [clip.key >> 32 for clip in clips] == [2, 3]


def test_clips_are_read_when_they_are_asked_for(tmp_path, run_context, monkeypatch):
    read, seen = ShapesSource.read, []

    def noted(self, index, positions=None):
        seen.append(index)
        return read(self, index, positions)

    monkeypatch.setattr(ShapesSource, "read", noted)
    reader = open_clips(config(tmp_path), run_context, 4)
    assert (len(reader), seen) == (4, [])
    sizes = []
    for batch in reader.batches(3):
        sizes.append(len(batch))
        assert len(seen) == sum(sizes)
    assert sizes == [3, 1]
    whole = load_clips(config(tmp_path), run_context, 4)
    again = [clip for batch in reader.batches(3) for clip in batch]
    assert [(clip.name, clip.key) for clip in again] == [(clip.name, clip.key) for clip in whole]
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(again, whole, strict=True))


def test_clips_of_one_video_know_that_they_are(tmp_path, run_context):
    clips = load_clips(config(tmp_path, window="random"), run_context, 10)
    assert [clip.video for clip in clips] == [int(clip.name[5:10]) for clip in clips]
    assert len({clip.video for clip in clips}) == 4
