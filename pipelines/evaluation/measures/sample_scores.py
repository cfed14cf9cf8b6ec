"""Scores of samples: proper scores of every predicted frame, and whether the samples differ as much as they err."""

from collections.abc import Callable

import scoringrules
import torch
from einops import rearrange
from torch import Tensor

from pipelines.evaluation.measures.intervals import Tally, percentile_interval, summarize
from pipelines.evaluation.measures.measure import ClipBatch, Measure, Records
from pipelines.runtime.results import MetricValues

SCORES_DEFINITION = (
    "fair, so their mean does not depend on the number of samples; crps of each value of each pixel, energy_score of "
    "whole frames by root mean square distances, both in levels of 255; latent_energy_score alike, of final latents"
)


def crps(samples: Tensor, truth: Tensor) -> Tensor:
    """Fair continuous ranked probability score, mean over values: E|X - y| - E|X - X'| / 2 with X, X' two samples.

    Ferro, "Fair scores for ensemble forecasts", 2014. By sorted samples, without all pairs of them.

    Args:
        samples: [k, n] float.
        truth: [n] float.
    Returns:
        A scalar; of one sample the mean absolute error.
    """
    if len(samples) == 1:
        return (samples[0] - truth).abs().mean()
    ordered = rearrange(samples, "k n -> n k").contiguous().sort(dim=1).values
    # The estimator by probability weighted moments is the fair one; "fair" would compare all pairs of samples. The
    # library makes a tensor on the default device.
    with samples.device:
        scores = scoringrules.crps_ensemble(truth, ordered, estimator="pwm", sorted_ensemble=True, backend="torch")
    return scores.mean()


def energy_score(samples: Tensor, truth: Tensor) -> Tensor:
    """Fair energy score: E|X - y| - E|X - X'| / 2 with root mean square distances of whole vectors.

    Gneiting and Raftery, "Strictly proper scoring rules, prediction, and estimation", 2007. `scoringrules` computes the
    same from all k^2 differences of vectors.

    Args:
        samples: [k, n] float.
        truth: [n] float.
    Returns:
        A scalar, in units of the values; of one sample the root mean square error.
    """
    error = (samples - truth).norm(dim=1).mean()
    spread = torch.pdist(samples).mean() / 2 if len(samples) > 1 else 0.0
    return (error - spread) / len(truth) ** 0.5


def spread_and_error(samples: Tensor, truth: Tensor) -> Tensor:
    """[2]: variance of the samples (NaN of one), and squared error of their mean; means over values.

    Args:
        samples: [k, n] float.
        truth: [n] float.
    """
    mean = samples.mean(0)
    variance = (samples - mean).square().sum(0).mean() / (len(samples) - 1)
    return torch.stack([variance, (mean - truth).square().mean()])


def count_ranks(samples: Tensor, truth: Tensor) -> Tensor:
    """How many values have b samples below the truth and e equal to it, all rounded.

    Args:
        samples: [k, n] float.
        truth: [n] float.
    Returns:
        [(k + 1)^2] int64, at b (k + 1) + e.
    """
    samples, truth, bins = samples.round(), truth.round(), len(samples) + 1
    places = (samples < truth).sum(0) * bins + (samples == truth).sum(0)
    return torch.bincount(places, minlength=bins**2)


def rank_histogram(counts: Tensor) -> Tensor:
    """How often the truth has each rank among the samples; equal values are in a random order, in expectation.

    Values that are equal in the truth and all samples tell nothing and are left out: a still background would hide all
    others. Without them calibrated samples still have equal counts, since the truth could be exchanged with any sample.

    Args:
        counts: [clips, (k + 1)^2] of `count_ranks`.
    Returns:
        [clips, k + 1] float64.
    """
    bins = round(counts.shape[1] ** 0.5)
    below, equal = (x.flatten() for x in torch.meshgrid(torch.arange(bins), torch.arange(bins), indexing="ij"))
    weights = counts * (equal < bins - 1) / (equal + 1.0).double()  # in each of the bins `below` to `below + equal`
    steps = torch.zeros(len(counts), 2 * bins, dtype=torch.float64)
    steps.index_add_(1, below, weights).index_add_(1, below + equal + 1, -weights)
    return steps.cumsum(1)[:, :bins].clamp(min=0)


def score_frames(score: Callable[[Tensor, Tensor], Tensor], videos: Tensor, truth: Tensor) -> Tensor:
    """A score of the samples of every frame; one frame at a time, so that no clip depends on its batch.

    Args:
        score: (samples [k, n] float32, truth [n] float32) -> [...].
        videos: [b, k, t, ...].
        truth: [b, t, ...].
    Returns:
        [b, t, ...] on the CPU.
    """
    values = [
        score(samples.flatten(1), target.flatten())
        for clip, targets in zip(videos.float(), truth.float(), strict=True)
        for samples, target in zip(clip.unbind(1), targets, strict=True)
    ]
    return torch.stack(values).unflatten(0, truth.shape[:2]).cpu()


def score_pixels(score: Callable[[Tensor, Tensor], Tensor], videos: Tensor, truth: Tensor) -> Tensor:
    """`score_frames` of frames in [-1, 1] as levels in [0, 255]; clamped, not rounded."""

    def of_levels(samples: Tensor, target: Tensor) -> Tensor:
        return score(*((x.clamp(-1, 1) + 1) * 127.5 for x in (samples, target)))

    return score_frames(of_levels, videos, truth)


class PixelScore(Measure):
    """A score of every predicted frame, of all subjects. Records: subject -> [clips, horizon]."""

    def __init__(self, name: str, score: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.name, self.score = name, score

    def measure(self, batch: ClipBatch) -> Records:
        return {subject: score_pixels(self.score, x, batch.truth) for subject, x in batch.futures.items()}

    def results(self, records: Records, counts: Tensor | None) -> dict[str, MetricValues]:
        return {self.name: summarize({name: Tally.of_values(x) for name, x in records.items()}, counts)}


class LatentScore(PixelScore):
    """A score of the latents of every predicted frame. Records: subject -> [clips, horizon]."""

    needs_autoencoder = True

    def measure(self, batch: ClipBatch) -> Records:
        context = batch.given.shape[1]
        futures = {subject: latents[:, :, context:] for subject, latents in batch.latents.items()}
        truth = futures.pop("truth")[:, 0]
        return {subject: score_frames(self.score, x, truth) for subject, x in futures.items()}


class CalibrationMeasure(Measure):
    """Whether samples differ as much as they err, and how the truth ranks among them; of predictions.

    Records: `spread` [clips, horizon, 2] of `spread_and_error`, `ranks` [clips, samples + 1].
    """

    name = part = "calibration"

    def measure(self, batch: ClipBatch) -> Records:
        samples, truth = batch.futures["prediction"], batch.truth
        counts = score_pixels(count_ranks, samples, truth).sum(1)
        return {"spread": score_pixels(spread_and_error, samples, truth), "ranks": rank_histogram(counts)}

    def results(self, records: Records, counts: Tensor | None) -> dict[str, object]:
        """The fields of `results.Calibration`.

        Raises:
            ValueError: there is one sample per clip.
        """
        samples = records["ranks"].shape[1] - 1
        if samples == 1:
            raise ValueError("it needs several samples per clip (evaluation.samples)")
        variance, error = records["spread"].double().unbind(-1)
        # Fortin et al., "Why should ensemble spread match the RMSE of the ensemble mean?", 2014.
        ratio, ranks = RootTally((samples + 1) / samples * variance, error), records["ranks"]
        shares = Tally(ranks, ranks.sum(1, keepdim=True))
        intervals = None if counts is None else percentile_interval(shares.resampled(counts)).T.tolist()
        return {
            "samples": samples,
            "spread_skill": summarize({"prediction": ratio}, counts),
            "ranks": shares.mean().tolist(),
            "ranks_interval": intervals,
        }


class RootTally(Tally):
    """The square root of a ratio of means."""

    def mean(self) -> Tensor:
        return super().mean().sqrt()

    def resampled(self, counts: Tensor) -> Tensor:
        return super().resampled(counts).sqrt()


def sample_scores() -> list[Measure]:
    """Everything of this module that an evaluation measures."""
    scores = [PixelScore("crps", crps), PixelScore("energy_score", energy_score)]
    return [*scores, LatentScore("latent_energy_score", energy_score), CalibrationMeasure()]
