"""Intervals of 95 % by a bootstrap over videos: clips of one video are not independent of each other."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LEVEL = 0.95
# 95 % of a normal distribution lie within this many standard deviations.
HALF_WIDTH = 1.959964


def draw_counts(videos: Sequence[int], resamples: int, seed: int) -> Tensor:
    """How often each clip is in each bootstrap resample: as often as its video was drawn.

    Args:
        videos: the video of each clip, n in all.
        resamples: number of resamples; each draws as many videos as there are, with replacement.
    Returns:
        [resamples, n] float64.
    Raises:
        ValueError: fewer than two videos, whose variance is unknown.
    """
    kinds, membership = np.unique(np.asarray(videos), return_inverse=True)
    if len(kinds) < 2:
        raise ValueError(f"a bootstrap over videos needs two or more, not {len(kinds)}")
    drawn = np.random.default_rng(seed).multinomial(len(kinds), np.full(len(kinds), 1 / len(kinds)), size=resamples)
    return torch.from_numpy(drawn[:, membership].astype(np.float64))


def mean_interval(values: Tensor, counts: Tensor) -> Tensor:
    """Percentile interval of the mean over clips.

    Args:
        values: [n, ...] of each clip.
        counts: [resamples, n] from `draw_counts`.
    Returns:
        [2, ...] float64: lower and upper end, between which 95 % of the resampled means lie.
    """
    means = torch.tensordot(counts, values.double(), dims=1)
    means = means / counts.sum(1).reshape(-1, *[1] * (values.ndim - 1))
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    return torch.quantile(means, ends, dim=0)


def half_width(resampled: Sequence[float]) -> float:
    """1.96 standard deviations: half of a 95 % interval of a normal distribution."""
    return HALF_WIDTH * float(np.std(np.asarray(resampled), ddof=1))


def normal_interval(value: float, resampled: Sequence[float]) -> tuple[float, float]:
    """The measured distance -+ 1.96 standard deviations of the resampled ones, not below 0.

    For distances between sets: a resample repeats clips, so its spread is smaller and resampled distances are too high;
    their percentiles would exclude the measured one.
    """
    half = half_width(resampled)
    return max(0.0, value - half), value + half
