"""Which clips the protocol takes, how they are read, and the end of a user's video."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.config import EvaluationConfig, RiverConfig, parse_config
from pipelines.errors import UserError
from pipelines.prediction.clips import Clip, Window, choose_windows, most_moving, open_clips, read_video
from pipelines.runtime.context import RunContext
from stage1_autoencoder.videos import open_source
from stage1_autoencoder.videos.shapes import ShapesSource
from stage1_autoencoder.videos.source import BrokenVideoError, VideoError

LENGTHS = [20, 9, 10, 35, 3, 12]


def protocol(**options) -> EvaluationConfig:
    return EvaluationConfig(**{"context": 4, "horizon": 6, **options})


@pytest.mark.parametrize(
    ("lengths", "wanted", "videos"),
    [(LENGTHS, 100, [0, 2, 3, 5]), (LENGTHS, 2, [0, 5]), ([10] * 9, 3, [0, 4, 8]), ([3, 9], 5, []), ([], 5, [])],
)
def test_first_takes_the_first_frames_of_videos_spread_over_the_split(lengths, wanted, videos):
    windows = choose_windows(lengths, protocol(window="first"), wanted)
    assert windows == [Window(video, 0) for video in videos]


def test_random_takes_every_window_once_and_videos_in_turn():
    windows = choose_windows(LENGTHS, protocol(window="random"), 400)
    # Video 2 has exactly one window, so its turn comes once.
    assert sorted(window.video for window in windows[:4]) == [0, 2, 3, 5]
    assert sorted(window.video for window in windows[4:7]) == [0, 3, 5]
    assert sorted(Counter(windows).values()) == [1] * 41
    assert set(windows) == {Window(v, s) for v in (0, 2, 3, 5) for s in range(LENGTHS[v] - 9)}
    assert choose_windows([3, 9], protocol(window="random"), 5) == []


def test_random_windows_are_a_function_of_the_seed_and_their_number():
    few = choose_windows(LENGTHS, protocol(window="random"), 5)
    assert choose_windows(LENGTHS, protocol(window="random"), 50)[:5] == few
    assert choose_windows(LENGTHS, protocol(window="random", seed=1), 50)[:5] != few


def frames_that_move(changes: list[int]) -> list[np.ndarray]:
    """Gray frames that differ from the one before by these values."""
    return [np.full((4, 4, 3), value, np.uint8) for value in np.cumsum([0, *changes])]


def test_a_moving_clip_starts_where_the_given_frames_move_most():
    # Frames 3 to 5 move by 30 + 20; larger changes later are not given, or leave too little to predict.
    frames = frames_that_move([1, 0, 2, 30, 20, 0, 0, 90, 0, 99])
    assert most_moving(frames, context=3, needed=6) == 3
    assert most_moving(iter(frames), context=3, needed=11) == 0
    assert most_moving(frames, context=3, needed=4) == 6  # the first of two equal ones
    assert most_moving(frames_that_move([0] * 9), context=2, needed=5) == 0
    assert most_moving(frames[::-1], context=2, needed=3) == 0  # a fall of 99 is a movement
    assert most_moving(frames, context=1, needed=2) == 0


def config(tmp_path, **evaluation) -> RiverConfig:
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


def load_clips(config: RiverConfig, run_context: RunContext, wanted: int) -> list[Clip]:
    return list(open_clips(config, run_context, wanted))


def test_clips_are_the_frames_of_the_videos(tmp_path, run_context):
    settings = config(tmp_path)
    clips = load_clips(settings, run_context, 2)
    source = open_source(settings.dataset, tmp_path, "test")
    assert [(clip.name, clip.key) for clip in clips] == [("test_00000", 0), ("test_00003", 3)]
    for number, clip in zip((0, 3), clips, strict=True):
        assert clip.frames.shape == (7, 3, 64, 64)
        pixels = ((clip.frames + 1) * 127.5).round().byte().movedim(1, -1).numpy()
        assert (pixels == source.read(number, range(7))).all()
    assert not run_context.skipped


def test_random_clips_have_their_start_in_name_and_key(tmp_path, run_context):
    clips = load_clips(config(tmp_path, window="random", seed=2), run_context, 10)
    source = open_source(config(tmp_path).dataset, tmp_path, "test")
    starts = [int(clip.name.partition("@")[2] or 0) for clip in clips]
    assert any(starts)
    for clip, start in zip(clips, starts, strict=True):
        number = int(clip.name.removeprefix("test_").partition("@")[0])
        assert (clip.key, clip.video) == ((start << 32) + number, number)
        expected = source.read(number, [start])[0].astype(np.float32) / 127.5 - 1
        assert np.abs(clip.frames[0].movedim(0, -1).numpy() - expected).max() < 1e-6
    assert len({clip.video for clip in clips}) == 4


def test_too_long_a_protocol_tells_the_lengths_of_the_videos(tmp_path, run_context):
    with pytest.raises(UserError, match=r"2 \+ 30 frames.*4 videos have 12 to 12 frames.*evaluation.horizon"):
        load_clips(config(tmp_path, horizon=30), run_context, 3)


def write_frames(folder: Path, count: int) -> None:
    """A video as a folder of frames."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (40, 32), (20 * number, 0, 0)).save(folder / f"{number:03d}.png")


def test_short_videos_are_left_out_with_a_message(tmp_path, run_context, capsys):
    for video, frames in (("train/a", 8), ("test/b", 8), ("test/c", 3), ("test/d", 9)):
        write_frames(tmp_path / "toy" / video, frames)
    settings = parse_config(
        {
            "paths": {"data": str(tmp_path)},
            "dataset": {"name": "toy", "source": "videos", "image_size": 32},
            "evaluation": {"context": 2, "horizon": 5},
        },
        "test",
    )
    assert [clip.name for clip in load_clips(settings, run_context, 10)] == ["b", "d"]
    assert "1 of 3 videos" in capsys.readouterr().out


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
    with pytest.raises(UserError, match="none of 4 videos"):
        load_clips(config(tmp_path), run_context, 4)


def test_moving_clips_are_read_from_where_they_start(tmp_path, run_context, monkeypatch):
    still, jump = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 200, np.uint8)

    def iterate(self, index, start=0, stop=None):
        return iter(([still] * (3 + index // 3) + [jump] * 9)[:12][start:stop])

    monkeypatch.setattr(ShapesSource, "iterate", iterate)
    clips = load_clips(config(tmp_path, window="moving"), run_context, 2)
    # The second given frame is the first bright one.
    assert [clip.name for clip in clips] == ["test_00000@2", "test_00003@3"]


def test_clips_are_read_when_they_are_asked_for(tmp_path, run_context, monkeypatch):
    read, seen = ShapesSource.read, []

    def noted(self, index, positions=None):
        seen.append(index)
        return read(self, index, positions)

    monkeypatch.setattr(ShapesSource, "read", noted)
    reader = open_clips(config(tmp_path), run_context, 4)
    assert (len(reader), seen) == (4, [])
    batches = []
    for batch in reader.batches(3):
        batches.append(batch)
        assert len(seen) == sum(map(len, batches))
    assert [len(batch) for batch in batches] == [3, 1]
    whole = load_clips(config(tmp_path), run_context, 4)
    for ours, clip in zip(itertools.chain(*batches), whole, strict=True):
        assert (ours.name, ours.key) == (clip.name, clip.key)
        assert torch.equal(ours.frames, clip.frames)


def test_a_users_video_is_read_whole_and_must_hold_the_context(tmp_path):
    write_frames(tmp_path / "clip", 5)
    video = read_video(config(tmp_path, context=5), tmp_path / "clip")
    assert (video.length, video.frames.shape) == (5, (5, 64, 64, 3))
    assert video.frames[:, 0, 0, 0].tolist() == [0, 20, 40, 60, 80]
    with pytest.raises(UserError, match=r"clip: 5 frames.*evaluation\.context=5"):
        read_video(config(tmp_path, context=6), tmp_path / "clip")
    with pytest.raises(VideoError, match=r"none\.mp4"):
        read_video(config(tmp_path), tmp_path / "none.mp4")
