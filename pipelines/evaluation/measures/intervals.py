"""Means over clips, and intervals of 95 % by a bootstrap over recordings, since clips of one recording are alike."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipelines.runtime.results import MetricValues

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


@dataclass(frozen=True, eq=False)
class Tally:
    """A measure of each clip as a ratio, so that means are over what there was to measure.

    Attributes:
        total, count: [clips, ...] float64; the measure is total / count, and a count of 0 means that there is none.
    """

    total: Tensor
    count: Tensor

    @classmethod
    def of_values(cls, values: Tensor) -> "Tally":
        """Of numbers [clips, ...] that all count alike."""
        return cls(values.double(), torch.ones_like(values, dtype=torch.float64))

    def mean(self) -> Tensor:
        """[...] over all clips; NaN where there was nothing to measure."""
        return self.total.sum(0) / self.count.sum(0)

    def pooled(self) -> "Tally":
        """All frames as one: [clips, 1] of [clips, frames]."""
        return Tally(self.total.sum(1, keepdim=True), self.count.sum(1, keepdim=True))

    def resampled(self, counts: Tensor) -> Tensor:
        """Means [resamples, ...] over the clips of each resample, from `draw_counts`."""
        return torch.tensordot(counts, self.total, dims=1) / torch.tensordot(counts, self.count, dims=1)


def summarize(tallies: Mapping[str, Tally], counts: Tensor | None, pooled: bool = False) -> MetricValues:
    """A measure of all subjects: of each frame over all clips and samples, the mean of these, and intervals.

    Args:
        tallies: by subject [clips, horizon]. A frame in which no clip has anything to measure is NaN, and left out of
            the mean.
        counts: [resamples, clips] of the bootstrap; None: no intervals.
        pooled: instead of the mean of all frames, that of all that was measured, for what is rare in a frame.
    """
    curves = {subject: tally.mean() for subject, tally in tallies.items()}
    summed = {subject: tally.pooled() if pooled else tally for subject, tally in tallies.items()}
    intervals, frame_intervals, means = {}, {}, {}
    if counts is not None:
        for subject, tally in tallies.items():
            frame_intervals[subject] = percentile_interval(tally.resampled(counts)).T.tolist()
            means[subject] = summed[subject].resampled(counts).nanmean(1)
            intervals[subject] = tuple(percentile_interval(means[subject]).tolist())
    return MetricValues(
        **{subject: tally.mean().nanmean().item() for subject, tally in summed.items()},
        per_frame={subject: curve.tolist() for subject, curve in curves.items()},
        interval=intervals or None,
        per_frame_interval=frame_intervals or None,
        resampled={subject: mean.tolist() for subject, mean in means.items()} or None,
    )


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
