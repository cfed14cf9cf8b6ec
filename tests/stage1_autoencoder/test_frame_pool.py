"""The pool of decoded frames for training the autoencoder."""

from collections import Counter
from contextlib import closing

import numpy as np
import pytest

from stage1_autoencoder.frame_pool import FRAMES_PER_PART, REPEATS, FramePool
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.source import BrokenVideoError, VideoError, VideoInfo, VideoSource

SIDE = 4


class Numbered(VideoSource):
    """Videos whose pixels encode (video, frame); records what is decoded."""

    def __init__(self, lengths, broken=()):
        self.dataset = DatasetConfig(name="numbered", source="videos", image_size=SIDE)
        self.videos = [VideoInfo(f"v{i}", length, 10.0, str(i)) for i, length in enumerate(lengths)]
        self.skipped = []
        self.broken = set(broken)
        self.decoded: list[int] = []
        self.taken = self.reads = 0  # frames that were asked for, and how often

    def read(self, index, positions=None):
        self.taken += len(positions)
        self.reads += 1
        return super().read(index, positions)

    def iterate(self, index, start=0, stop=None):
        start, stop = self.check_range(index, start, stop)
        if index in self.broken:
            raise BrokenVideoError(self.videos[index].id, "torn")
        for frame in range(start, stop):
            self.decoded.append(index)
            yield np.full((SIDE, SIDE, 3), (index, frame % 256, frame // 256), np.uint8)


def make_pool(source, *, batch_size=4, steps=50, frames=40, seed=0, on_broken=None) -> FramePool:
    def refuse(error):
        raise error

    memory = frames * 2 * 3 * SIDE**2  # bytes for two rounds
    return FramePool(
        source, batch_size=batch_size, steps=steps, memory=memory, seed=seed, on_broken=on_broken or refuse
    )


def seen(batch: np.ndarray) -> list[tuple[int, int]]:
    return [(int(f[0, 0, 0]), int(f[0, 0, 1]) + 256 * int(f[0, 0, 2])) for f in batch]


class Restarting(Numbered):
    """With a keyframe every 100 frames."""

    def restarts(self, index):
        return np.arange(100, self.videos[index].frames, 100)


def test_a_long_video_is_decoded_in_parts_to_the_same_batches():
    length = 5 * FRAMES_PER_PART
    whole, parts = Numbered([length, 30]), Restarting([length, 30])
    with closing(make_pool(whole, frames=2000)) as one, closing(make_pool(parts, frames=2000)) as several:
        for step in (0, 7):
            assert (one.batch(step) == several.batch(step)).all()
    assert parts.reads > whole.reads >= 1


LENGTHS = [30, 3, 50, 17, 1, 44, 60, 25]


@pytest.mark.parametrize("frames", [40, 1000])
def test_a_batch_is_a_function_of_seed_and_step(frames):
    with closing(make_pool(Numbered(LENGTHS), frames=frames)) as pool:
        whole = [pool.batch(step) for step in range(50)]
        assert (pool.batch(3, slice(1, 3)) == whole[3][1:3]).all()
    assert {(batch.shape, batch.dtype.name) for batch in whole} == {((4, SIDE, SIDE, 3), "uint8")}
    assert all(frame < LENGTHS[video] for batch in whole for video, frame in seen(batch))
    assert frames == 1000 or pool.last_round >= 1
    with closing(make_pool(Numbered(LENGTHS), frames=frames)) as resumed:
        for step in (41, 42, 43, 49):
            assert (resumed.batch(step) == whole[step]).all()


def test_rounds_and_batches_depend_on_the_seed():
    batches, rounds = [], []
    for seed in (0, 1):
        with closing(make_pool(Numbered([4] * 5), frames=1000, seed=seed)) as pool:  # one round of all frames
            batches.append(seen(pool.batch(0)))
        with closing(make_pool(Numbered([30] * 100), seed=seed, steps=40)) as pool:
            rounds.append({video for step in range(40) for video, _ in seen(pool.batch(step))})
    assert batches[0] != batches[1]
    assert rounds[0] != rounds[1]


def test_a_batch_is_described_by_its_frames():
    with closing(make_pool(Numbered(LENGTHS), batch_size=6)) as pool:
        for step in (2, 30):
            names = [f"v{video} frame {frame}" for video, frame in seen(pool.batch(step))]
            assert pool.describe(step) == f"a batch of {', '.join(names[:4])} and 2 more"
            assert pool.describe(step, most=6) == f"a batch of {', '.join(names)}"


def test_rounds_bring_other_frames():
    with closing(make_pool(Numbered(LENGTHS), steps=400)) as pool:
        rounds = [{f for step in range(r * 40, r * 40 + 40) for f in seen(pool.batch(step))} for r in range(4)]
    assert pool.steps_per_round == 40 * REPEATS // 4
    assert all(len(frames) <= 40 for frames in rounds)
    assert len(set().union(*rounds)) > 80


def test_all_frames_can_occur_about_equally_often():
    lengths = [2, 40, 9, 23, 30, 16]
    with closing(make_pool(Numbered(lengths), steps=6000, frames=30)) as pool:
        counts = Counter(frame for step in range(6000) for frame in seen(pool.batch(step)))
    everything = {(video, frame) for video, length in enumerate(lengths) for frame in range(length)}
    assert set(counts) == everything
    expected = 6000 * 4 / len(everything)
    # Shares are rounded up, so the frames of a very short video (here of 2) come more often; others hardly do.
    per_video = [sum(counts[video, f] for f in range(length)) / length for video, length in enumerate(lengths)]
    assert min(per_video) > 0.8 * expected
    assert max(per_video[1:]) < 1.25 * expected
    assert per_video[0] < 2 * expected


@pytest.mark.parametrize("lengths", [LENGTHS, [10] * 100 + [5000], [5000], [1] * 300])
def test_rounds_stay_within_the_memory(lengths):
    for seed in range(12):
        source = Numbered(lengths)
        with closing(make_pool(source, steps=40, frames=40, seed=seed)) as pool:  # one round
            pool.batch(0)
        assert 0 < source.taken <= 40


def test_everything_is_decoded_once_when_it_fits():
    source = Numbered([5, 9, 2])
    with closing(make_pool(source, steps=100, frames=8)) as pool:  # 16 frames are two rounds' memory
        frames = {frame for step in range(100) for frame in seen(pool.batch(step))}
    assert len(frames) == 16
    assert Counter(source.decoded) == {0: 5, 1: 9, 2: 2}


def test_a_short_training_does_not_decode_everything():
    source = Numbered([20] * 200)
    with closing(make_pool(source, steps=5, frames=10_000)) as pool:
        for step in range(5):
            pool.batch(step)
    assert len(set(source.decoded)) <= 3  # 20 frames, of at least 16 of a video


def test_broken_videos_are_reported_and_their_place_taken_by_others():
    reported = []
    source = Numbered([20] * 6, broken=[1, 4])
    with closing(make_pool(source, steps=60, frames=1000, on_broken=reported.append)) as pool:
        frames = {frame for step in range(60) for frame in seen(pool.batch(step))}
    assert {error.video_id for error in reported} == {"v1", "v4"}
    assert {video for video, _ in frames} == {0, 2, 3, 5}


def test_errors_stop_the_training():
    with closing(make_pool(Numbered([20] * 3, broken=[1]), frames=1000)) as pool:
        with pytest.raises(BrokenVideoError, match="v1: torn"):  # raised by the callback
            pool.batch(0)
    with closing(make_pool(Numbered([20] * 3, broken=[0, 1, 2]), frames=1000, on_broken=lambda error: None)) as pool:
        with pytest.raises(VideoError, match="3 training videos"):
            pool.batch(0)
    with pytest.raises(ValueError, match="at least one video"):
        make_pool(Numbered([]))
