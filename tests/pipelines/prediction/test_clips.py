"""Which clips the protocol takes, how they are read, and the end of a user's video."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.config import EvaluationConfig, RiverConfig, parse_config
from pipelines.errors import UserError
from pipelines.prediction.clips import Clip, ClipReader, Window, choose_windows, most_moving, open_clips, read_video
from pipelines.runtime.context import RunContext
from stage1_autoencoder.autoencoder import image_to_unit
from stage1_autoencoder.videos import open_source
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.source import BrokenVideoError, VideoError, VideoInfo, VideoSource, VideoTable

LENGTHS = [20, 9, 10, 35, 3, 12]


def choose(lengths: list[int], evaluation: EvaluationConfig, wanted: int, ids: Sequence[str] = ()) -> list[Window]:
    """Clips of videos of these lengths."""
    names = ids or [f"v{number}" for number in range(len(lengths))]
    videos = (VideoInfo(name, length, 10.0, "") for name, length in zip(names, lengths, strict=True))
    return choose_windows(VideoTable(videos), evaluation, wanted)


def protocol(**options) -> EvaluationConfig:
    return EvaluationConfig(**{"context": 4, "horizon": 6, **options})


@pytest.mark.parametrize(
    ("lengths", "wanted", "videos"),
    [(LENGTHS, 100, [0, 2, 3, 5]), (LENGTHS, 2, [0, 5]), ([10] * 9, 3, [0, 4, 8]), ([3, 9], 5, []), ([], 5, [])],
)
def test_first_takes_the_first_frames_of_videos_spread_over_the_split(lengths, wanted, videos):
    windows = choose(lengths, protocol(window="first"), wanted)
    assert windows == [Window(video, 0) for video in videos]


def test_random_takes_every_window_once_and_videos_in_turn():
    windows = choose(LENGTHS, protocol(window="random"), 400)
    # Video 2 has exactly one window, so its turn comes once.
    assert sorted(window.video for window in windows[:4]) == [0, 2, 3, 5]
    assert sorted(window.video for window in windows[4:7]) == [0, 3, 5]
    assert sorted(Counter(windows).values()) == [1] * 41
    assert set(windows) == {Window(v, s) for v in (0, 2, 3, 5) for s in range(LENGTHS[v] - 9)}
    assert choose([3, 9], protocol(window="random"), 5) == []


def test_random_windows_are_a_function_of_the_seed_and_their_number():
    few = choose(LENGTHS, protocol(window="random"), 5)
    assert choose(LENGTHS, protocol(window="random"), 50)[:5] == few
    assert choose(LENGTHS, protocol(window="random", seed=1), 50)[:5] != few


ACTIONS = ("boxing", "handclapping", "handwaving", "jogging", "running", "walking")


def test_srvps_draw_is_that_of_numpys_old_generator():
    # Of all 120 test videos, whose length tells the person. Worked out by a Mersenne twister of its own, seed 42.
    names = [(a, p, t) for p in range(21, 26) for a in ACTIONS for t in range(1, 5)]
    ids = [f"person{p}_{a}_d{t}" for a, p, t in names]
    windows = choose([300 + p for _, p, _ in names], protocol(window="srvp", seed=42, context=10, horizon=30), 5, ids)
    assert [(*names[window.video], window.start) for window in windows] == [
        ("jogging", 25, 3, 106), ("running", 25, 3, 121), ("handwaving", 23, 3, 87), ("running", 24, 4, 151),
        ("handwaving", 25, 2, 191),
    ]  # fmt: skip
    short = choose([11] * 120, protocol(window="srvp"), 50, ids)
    assert {window.start for window in short} == {0, 1}  # the last start of 11 - 10, too
    with pytest.raises(UserError, match=r"person25_jogging_d3.* 0 frames"):
        choose([300] * 119, protocol(window="srvp", seed=42), 5, [name for name in ids if "25_jogging_d3" not in name])
    with pytest.raises(UserError, match=r"v0.*dataset\.sequences"):
        choose(LENGTHS, protocol(window="srvp"), 5)


def test_mcvd_spreads_256_clips_over_120_videos_and_never_takes_the_last_start():
    windows = choose([12] * 120, protocol(window="mcvd"), 256)
    # 119 / 255 = 0.4667: 0, 0.47, 0.93, 1.4, 1.87, 2.33 and, at the end, 118.07, 118.53, 119.
    assert [window.video for window in windows[:6]] == [0, 0, 1, 1, 2, 2]
    assert [window.video for window in windows[-3:]] == [118, 119, 119]
    assert Counter(Counter(window.video for window in windows).values()) == {2: 104, 3: 16}
    assert {window.start for window in windows} == {0, 1}  # 12 - 10, which starts below
    assert {window.start for window in choose([10], protocol(window="mcvd"), 3)} == {0}
    openings = choose([12] * 120, protocol(window="extdm"), 256)
    assert [(w.video, w.start) for w in openings] == [(w.video, 0) for w in windows]
    # Equal clips have random draws of their own.
    assert Counter(window.repeat for window in openings) == {0: 120, 1: 120, 2: 16}


def test_stdiff_cuts_the_middle_of_each_video_into_clips():
    windows = choose([20, 9, 33], protocol(window="stdiff"), 100)
    assert windows == [Window(0, 0), Window(0, 10), Window(2, 1), Window(2, 11), Window(2, 21)]
    assert choose([20, 9, 33], protocol(window="stdiff"), 2) == [Window(0, 0), Window(2, 21)]


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
    assert all(clip.recording == source.recording(clip.video) for clip in clips)
    assert len({clip.recording for clip in clips}) == 4  # each drawn video is a recording


@pytest.mark.parametrize("window", ["first", "random"])
def test_shapes_are_simulated_for_as_long_as_the_protocol_needs(tmp_path, run_context, window):
    settings = config(tmp_path, horizon=30, window=window)
    stepped = settings.model_copy(update={"dataset": settings.dataset.model_copy(update={"frame_step": 3})})
    for those in (settings, stepped):
        source = open_source(those.dataset, tmp_path, "test")
        clips = load_clips(those, run_context, 10)
        assert sorted(clip.key for clip in clips) == [0, 1, 2, 3]  # of frame 0 on
        for clip in clips:
            assert clip.frames.shape == (32, 3, 64, 64)
            stored = image_to_unit(torch.from_numpy(source.read(clip.video)))
            assert torch.equal(clip.frames[: len(stored)], stored)
            assert (clip.frames[1:] != clip.frames[:-1]).flatten(1).any(1).all()


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
    long = settings.model_copy(update={"evaluation": settings.evaluation.model_copy(update={"horizon": 30})})
    with pytest.raises(UserError, match=r"2 \+ 30 frames.*3 videos have 3 to 9 frames.*evaluation.horizon"):
        load_clips(long, run_context, 3)


class GrayVideos(VideoSource):
    """Videos of gray frames; None: a frame that can't be decoded. `decoded` has (video, frame) of each decoded one."""

    def __init__(self, *videos: list[int | None]) -> None:
        self.dataset, self.skipped = DatasetConfig(name="gray", source="videos", image_size=4), []
        self.videos = [VideoInfo(f"v{n}", len(video), 10.0, "") for n, video in enumerate(videos)]
        self.levels, self.decoded = videos, []

    def iterate(self, index: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        for number in range(*self.check_range(index, start, stop)):
            level = self.levels[index][number]
            if level is None:
                raise BrokenVideoError(self.videos[index].id, "torn")
            self.decoded.append((index, number))
            yield np.full((4, 4, 3), level, np.uint8)


def read_clips(source: GrayVideos, run_context: RunContext, **evaluation) -> ClipReader:
    settings = EvaluationConfig(**{"context": 2, "horizon": 1} | evaluation)
    windows = choose_windows(VideoTable(source.videos), settings, 10)
    return ClipReader(source, windows, settings, run_context)


def test_broken_videos_are_skipped_and_others_keep_their_key(run_context):
    source = GrayVideos([0, 0, 0], [0, None, 0], [0, 0, 0])
    assert [(clip.name, clip.key) for clip in read_clips(source, run_context)] == [("v0", 0), ("v2", 2)]
    assert run_context.skipped == {"v1": "torn"}


def test_only_broken_videos_are_an_error(run_context):
    with pytest.raises(UserError, match="none of 2 videos"):
        list(read_clips(GrayVideos([None] * 3, [0, 0, None]), run_context))


def test_moving_clips_are_read_from_where_they_start(run_context):
    source = GrayVideos([0, 0, 0, 200, 200, 200], [9, 0, 0, 0, 0, 99])
    clips = list(read_clips(source, run_context, window="moving"))
    assert [clip.name for clip in clips] == ["v0@2", "v1"]
    assert [clip.frames[1, 0, 0, 0].item() for clip in clips] == pytest.approx([200 / 127.5 - 1, -1])


def test_equal_clips_differ_in_name_and_key(run_context):
    source = GrayVideos([0, 0, 0, 0], [9, 9, 9])
    clips = list(read_clips(source, run_context, window="extdm", videos=4))
    assert len({clip.key for clip in clips}) == len({clip.name for clip in clips}) == len(clips) > 2
    assert {(clip.video, clip.start) for clip in clips} == {(0, 0), (1, 0)}
    moved = Clip("v", 3 << 56 | 7 << 32 | 5, clips[0].recording, 10.0, clips[0].frames)
    assert (moved.video, moved.start) == (5, 7)


def test_clips_are_read_when_they_are_asked_for(run_context):
    source = GrayVideos(*[[number] * 3 for number in range(4)])
    reader = read_clips(source, run_context)
    assert (len(reader), source.decoded) == (4, [])
    assert [clip.video for clip in reader.read([3, 1])] == [3, 1]
    assert len(source.decoded) == 2 * 3
    for number, clip in enumerate(reader):
        assert clip.video == number
        assert len(source.decoded) == 2 * 3 + 3 * (number + 1)


def test_a_users_video_is_read_whole_and_must_hold_the_context(tmp_path):
    write_frames(tmp_path / "clip", 5)
    video = read_video(config(tmp_path, context=5), tmp_path / "clip")
    assert (video.length, video.frames.shape) == (5, (5, 64, 64, 3))
    assert video.frames[:, 0, 0, 0].tolist() == [0, 20, 40, 60, 80]
    with pytest.raises(UserError, match=r"clip: 5 frames.*evaluation\.context=5"):
        read_video(config(tmp_path, context=6), tmp_path / "clip")
    with pytest.raises(VideoError, match=r"none\.mp4"):
        read_video(config(tmp_path), tmp_path / "none.mp4")
