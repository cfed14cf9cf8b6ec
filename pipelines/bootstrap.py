"""Confidence intervals by the bootstrap over videos: clips of one video are drawn together, as they are alike."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LEVEL = 0.95


def draw_counts(videos: Sequence[int], resamples: int, seed: int) -> Tensor:
    """How often each clip stands in each of the bootstrap's sets: as often as its video was drawn.

    Args:
        videos: the video of each clip, n in all.
        resamples: sets; for each as many videos are drawn as there are, with replacement.
    Returns:
        [resamples, n] float64.
    Raises:
        ValueError: fewer than two videos, whose scatter nobody can know.
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
        [2, ...] float64: lower and upper end, between which 95 % of the sets' means lie.
    """
    means = torch.tensordot(counts, values.double(), dims=1)
    means = means / counts.sum(1).reshape(-1, *[1] * (values.ndim - 1))
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    return torch.quantile(means, ends, dim=0)


def normal_interval(value: float, resampled: Sequence[float]) -> list[float]:
    """The measured value -+ 1.96 standard deviations of the resampled ones, not below 0.

    For distances of sets: a set with repetitions has a smaller spread than the one it is drawn from, so resampled
    distances lie too high, and their percentiles would leave the measured one out.
    """
    half = 1.959964 * float(np.std(np.asarray(resampled), ddof=1))
    return [max(0.0, value - half), value + half]
