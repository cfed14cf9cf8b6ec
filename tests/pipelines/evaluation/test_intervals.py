"""Intervals: that videos are drawn whole, and that they cover what they promise."""

import math

import numpy as np
import pytest
import torch

from pipelines.evaluation.intervals import draw_counts, mean_interval, normal_interval

VIDEOS = [7, 7, 7, 2, 5, 5]


def test_clips_of_one_video_are_drawn_together():
    counts = draw_counts(VIDEOS, 500, seed=0)
    assert counts.shape == (500, 6)
    assert (counts[:, 0] == counts[:, 1]).all()
    assert (counts[:, 0] == counts[:, 2]).all()
    assert (counts[:, 4] == counts[:, 5]).all()
    # As many videos as there are, and each as often as any other.
    of_videos = counts[:, [0, 3, 4]]
    assert (of_videos.sum(1) == 3).all()
    assert of_videos.mean(0).tolist() == pytest.approx([1, 1, 1], abs=0.12)
    assert len(of_videos.unique(dim=0)) == 10  # all multisets of three


def test_draws_are_a_function_of_the_seed():
    assert torch.equal(draw_counts(VIDEOS, 20, 3), draw_counts(VIDEOS, 20, 3))
    assert not torch.equal(draw_counts(VIDEOS, 20, 3), draw_counts(VIDEOS, 20, 4))


def test_one_video_has_no_interval():
    with pytest.raises(ValueError, match="two or more, not 1"):
        draw_counts([4, 4, 4], 10, 0)


def test_the_interval_holds_the_percentiles_of_resampled_means():
    values = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))
    counts = draw_counts(VIDEOS, 300, 1)
    ends = mean_interval(values, counts)
    assert ends.shape == (2, 2, 3)
    # The definition, set by set: each clip as often as it was drawn.
    means = [values.double().repeat_interleave(row.long(), dim=0).mean(0).numpy() for row in counts]
    np.testing.assert_allclose(ends.numpy(), np.percentile(means, [2.5, 97.5], axis=0), rtol=1e-10)
    equal = mean_interval(torch.full((6,), 3.5), counts)
    assert equal.tolist() == pytest.approx([3.5, 3.5])


def test_intervals_cover_the_truth_and_those_over_clips_do_not():
    generator = np.random.default_rng(0)
    videos = np.repeat(np.arange(30), 6)
    covered = {"videos": 0, "clips": 0}
    for trial in range(300):
        values = generator.normal(size=30)[videos] + 0.5 * generator.normal(size=180)  # the truth is 0
        for over, groups in (("videos", videos), ("clips", np.arange(180))):
            low, high = mean_interval(torch.from_numpy(values), draw_counts(groups, 200, trial)).tolist()
            covered[over] += low <= 0 <= high
    assert 0.88 * 300 <= covered["videos"] <= 0.99 * 300
    assert covered["clips"] < 0.75 * 300


def test_normal_intervals():
    low, high = normal_interval(10.0, [9.0, 11.0, 13.0, 15.0])
    assert (low, high) == pytest.approx((10 - 1.96 * math.sqrt(20 / 3), 10 + 1.96 * math.sqrt(20 / 3)), abs=1e-3)
    assert normal_interval(1.0, [0.0, 10.0])[0] == 0  # no distance is negative
