"""Intervals of 95 % by a bootstrap over recordings: clips of one recording are not independent of each other."""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

LEVEL = 0.95
# 95 % of a normal distribution lie within this many standard deviations.
HALF_WIDTH = 1.959964
# With fewer, a bootstrap's intervals are much too short.
MIN_RECORDINGS = 10


def draw_counts(recordings: Sequence[Hashable], resamples: int, seed: int) -> Tensor:
    """How often each clip is in each bootstrap resample: as often as its recording was drawn.

    Args:
        recordings: the recording of each clip, n in all.
        resamples: number of resamples; each draws as many recordings as there are, with replacement.
    Returns:
        [resamples, n] float64.
    Raises:
        ValueError: no resamples, or fewer than ten recordings.
    """
    number = {recording: index for index, recording in enumerate(dict.fromkeys(recordings))}
    count = len(number)
    if not resamples:
        raise ValueError("evaluation.resamples is 0")
    if count < MIN_RECORDINGS:
        raise ValueError(f"a bootstrap needs clips of {MIN_RECORDINGS} recordings or more, and there are {count}")
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return torch.from_numpy(drawn[:, [number[recording] for recording in recordings]].astype(np.float64))


def mean_interval(values: Tensor, counts: Tensor) -> Tensor:
    """Percentile interval of the mean over clips.

    Args:
        values: [n, ...] of each clip.
        counts: [resamples, n] from `draw_counts`.
    Returns:
        [2, ...] float64: lower and upper end, between which 95 % of the resampled means lie.
    """
    means = torch.tensordot(counts, values.double(), dims=1)
    return percentile_interval(means / counts.sum(1).reshape(-1, *[1] * (values.ndim - 1)))


def percentile_interval(resampled: Tensor) -> Tensor:
    """The ends [2, ...] float64 between which 95 % of the resampled numbers [resamples, ...] lie; NaN is left out."""
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    return torch.nanquantile(resampled.double(), ends, dim=0)


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
