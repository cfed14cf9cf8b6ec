"""Intervals: that recordings are drawn whole, and that they cover what they promise."""

import math

import numpy as np
import pytest
import torch

from pipelines.evaluation.measures.intervals import Tally, draw_counts, normal_interval, percentile_interval, summarize
from stage1_autoencoder.videos.source import Recording

# Twelve clips of ten recordings: the first of three clips, and one of each other.
RECORDINGS = [Recording(f"{number}.avi", "21") for number in (7, 0, 7, 2, 7, 5, 1, 3, 4, 6, 8, 9)]


def test_clips_of_one_recording_are_drawn_together():
    counts = draw_counts(RECORDINGS, 2000, seed=0)
    assert counts.shape == (2000, 12)
    assert (counts[:, 0] == counts[:, 2]).all()
    assert (counts[:, 0] == counts[:, 4]).all()
    # As many recordings as there are, and each as often as any other.
    of_recordings = counts[:, [0, 1, 3, 5, 6, 7, 8, 9, 10, 11]]
    assert (of_recordings.sum(1) == 10).all()
    assert of_recordings.mean(0).tolist() == pytest.approx([1] * 10, abs=4 * math.sqrt(0.9 / 2000))
    assert of_recordings.var(0).tolist() == pytest.approx([0.9] * 10, abs=0.2)  # of a multinomial draw


def test_draws_are_a_function_of_the_seed():
    assert torch.equal(draw_counts(RECORDINGS, 20, 3), draw_counts(RECORDINGS, 20, 3))
    assert not torch.equal(draw_counts(RECORDINGS, 20, 3), draw_counts(RECORDINGS, 20, 4))


@pytest.mark.parametrize(
    ("resamples", "reason"), [(10, "10 recordings or more, and there are 9"), (0, "resamples is 0")]
)
def test_few_recordings_have_no_interval_however_many_clips_there_are(resamples, reason):
    with pytest.raises(ValueError, match=reason):
        draw_counts(9 * RECORDINGS[:-1], resamples, 0)


def test_the_interval_holds_the_percentiles_of_resampled_means():
    values = torch.randn(12, 2, 3, generator=torch.Generator().manual_seed(0))
    counts = draw_counts(RECORDINGS, 300, 1)
    ends = percentile_interval(Tally.of_values(values).resampled(counts))
    assert ends.shape == (2, 2, 3)
    # The definition, set by set: each clip as often as it was drawn.
    means = [values.double().repeat_interleave(row.long(), dim=0).mean(0).numpy() for row in counts]
    np.testing.assert_allclose(ends.numpy(), np.percentile(means, [2.5, 97.5], axis=0), rtol=1e-10)
    equal = Tally.of_values(torch.full((12,), 3.5)).resampled(counts)
    assert equal.tolist() == pytest.approx([3.5] * 300)


def test_ratios_are_of_sums_and_nothing_to_measure_is_left_out():
    total, count = torch.zeros(12, 3).double(), torch.zeros(12, 3).double()
    total[:2, 0], count[:2, 0] = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 7.0])  # 4 of 8; other clips have none
    total[:, 1], count[:, 1] = torch.arange(12.0), 2 * torch.arange(12.0)  # a half in each clip
    found = summarize({"prediction": Tally(total, count)}, draw_counts(RECORDINGS, 300, 1))
    assert found.per_frame["prediction"] == pytest.approx([0.5, 0.5, math.nan], nan_ok=True)
    assert found.prediction == pytest.approx(0.5)
    first, second, none = found.per_frame_interval["prediction"]
    assert first == pytest.approx((3 / 7, 1.0))  # resamples with one of both clips
    assert second == pytest.approx((0.5, 0.5))
    assert none == pytest.approx((math.nan, math.nan), nan_ok=True)
    counts = draw_counts(RECORDINGS, 300, 1)
    rare = summarize({"prediction": Tally(total * torch.tensor([1.0, 0.1, 1.0]), count)}, counts, pooled=True)
    assert rare.prediction == pytest.approx((4 + 0.1 * 66) / (8 + 132))
    assert rare.per_frame["prediction"] == pytest.approx([0.5, 0.05, math.nan], nan_ok=True)
    assert rare.interval["prediction"][0] < rare.prediction < rare.interval["prediction"][1] < 0.3


def test_intervals_cover_the_truth_and_those_over_clips_do_not():
    generator = np.random.default_rng(0)
    recordings = np.repeat(np.arange(30), 6)
    covered = {"recordings": 0, "clips": 0}
    for trial in range(300):
        values = generator.normal(size=30)[recordings] + 0.5 * generator.normal(size=180)  # the truth is 0
        for over, groups in (("recordings", recordings), ("clips", np.arange(180))):
            means = Tally.of_values(torch.from_numpy(values)).resampled(draw_counts(groups, 200, trial))
            low, high = percentile_interval(means).tolist()
            covered[over] += low <= 0 <= high
    assert 0.88 * 300 <= covered["recordings"] <= 0.99 * 300
    assert covered["clips"] < 0.75 * 300


def test_normal_intervals():
    low, high = normal_interval(10.0, [9.0, 11.0, 13.0, 15.0])
    assert (low, high) == pytest.approx((10 - 1.96 * math.sqrt(20 / 3), 10 + 1.96 * math.sqrt(20 / 3)), abs=1e-3)
    assert normal_interval(1.0, [0.0, 10.0])[0] == 0  # no distance is negative
