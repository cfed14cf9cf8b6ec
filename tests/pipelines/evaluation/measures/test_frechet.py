"""The Fréchet distance against closed forms and scipy's root of a matrix, and distances of sets of clips."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from pipelines.config import EvaluationConfig
from pipelines.evaluation.measures.feature_cache import FeatureCache
from pipelines.evaluation.measures.frechet import (
    LatentDistances,
    Segments,
    VideoDistances,
    fit_gaussian,
    frechet_distance,
    latent_features,
)
from pipelines.evaluation.measures.intervals import draw_counts
from pipelines.evaluation.measures.measure import ClipBatch, Measure, Records
from pipelines.runtime.results import MetricValues


def draw(n: int, d: int, seed: int) -> Tensor:
    """Correlated features whose mean is not 0."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + torch.arange(d) / d


def distance(first: Tensor, second: Tensor) -> float:
    return frechet_distance(fit_gaussian(first), fit_gaussian(second))


def textbook(first: Tensor, second: Tensor, ridge: float = 0.0) -> float:
    """With numpy's covariance and scipy's root."""
    means = [x.numpy().mean(0) for x in (first, second)]
    covariances = [np.cov(x.numpy(), rowvar=False) + ridge * np.eye(x.shape[1]) for x in (first, second)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root))


def test_diagonal_covariances_have_a_closed_form():
    # Rows +-a e_i have mean 0 and the diagonal covariance 2 a_i^2 / (n - 1).
    def axes(lengths: list[float], shift: float) -> Tensor:
        rows = torch.diag(torch.tensor(lengths, dtype=torch.float64))
        return torch.cat([rows, -rows]) + shift

    first, second = [1.0, 2.0, 0.5], [3.0, 1.0, 0.0]
    expected = 3 * 0.7**2 + sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) * 2 / 5
    assert distance(axes(first, 0.0), axes(second, 0.7)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "m", "d"), [(50, 50, 5), (200, 31, 12), (40, 60, 39)])
def test_equals_the_textbook(n, m, d):
    first, second = draw(n, d, 0), 0.7 * draw(m, d, 1) + 0.3
    assert distance(first, second) == pytest.approx(textbook(first, second), rel=1e-8)


def test_covariances_may_be_singular():
    # Of fewer clips than features; a little of the identity, which scipy needs here, changes the textbook's little.
    first, second = draw(8, 20, 0), draw(6, 20, 1)
    assert distance(first, second) == pytest.approx(textbook(first, second, ridge=1e-11), rel=1e-4)
    same = torch.ones(5, 20)
    assert distance(same, same + 2) == pytest.approx(20 * 4)


@pytest.mark.parametrize(("n", "d"), [(100, 10), (7, 30)])
def test_equal_sets_have_no_distance(n, d):
    features = draw(n, d, 0)
    assert 0 <= distance(features, features) < 1e-9
    assert distance(features, features.flip(0)) < 1e-9


def test_what_does_not_change_it():
    first, second = draw(60, 8, 0), draw(50, 8, 1)
    expected = distance(first, second)
    assert distance(second, first) == pytest.approx(expected, rel=1e-10)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2)).double())[0]
    assert distance(first @ rotation + 5, second @ rotation + 5) == pytest.approx(expected, rel=1e-9)


def test_counts_are_repetitions():
    features, other = draw(12, 4, 0), draw(9, 4, 1)
    counts = torch.tensor([2, 0, 1, 3, 1, 1, 0, 2, 1, 0, 1, 0])
    repeated = features.repeat_interleave(counts, dim=0)
    weighted = frechet_distance(fit_gaussian(features, counts), fit_gaussian(other))
    assert weighted == pytest.approx(distance(repeated, other), rel=1e-10)


def test_statistics_of_single_precision_features_are_in_double():
    features = (draw(100, 5, 0) + 1e3).float()
    ours = fit_gaussian(features)
    covariance = (ours.root.T @ ours.root).numpy()
    np.testing.assert_allclose(covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-9)


@pytest.mark.parametrize(
    ("features", "counts", "message"),
    [
        (torch.zeros(1, 5), None, r"\[1, 5\]"),
        (torch.zeros(4, 5), torch.tensor([0, 1, 0, 0]), "two clips"),
        (torch.tensor([[1.0], [math.nan]]), None, "not finite"),
    ],
)
def test_too_few_and_broken_features_are_refused(features, counts, message):
    with pytest.raises(ValueError, match=message):
        fit_gaussian(features, counts)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"context": 1, "horizon": 15}, Segments(1, 15, 16, 1)),
        ({"context": 10, "horizon": 30}, Segments(10, 30, 16, 2)),
        ({"context": 10, "horizon": 30, "fvd_frames": None}, Segments(10, 30, 40, 1)),
        ({"context": 10, "horizon": 30, "fvd_context": False, "fvd_frames": 10}, Segments(0, 30, 10, 3)),
        ({"context": 2, "horizon": 10}, Segments(2, 10, 12, 1)),
    ],
)
def test_which_frames_the_network_sees(settings, expected):
    segments = Segments.choose(EvaluationConfig(**settings))
    assert segments == expected
    given = torch.arange(settings["context"]).float().view(1, -1, 1, 1, 1).expand(2, -1, 3, 2, 2)
    following = 100 + torch.arange(settings["horizon"]).float().view(1, -1, 1, 1, 1).expand(2, -1, 3, 2, 2)
    cut = segments.cut(given, following)
    assert cut.shape == (2, segments.count, segments.frames, 3, 2, 2)
    seen = cut[0, :, :, 0, 0, 0].flatten().tolist()
    whole = [*range(settings["context"] - segments.context, settings["context"])] if segments.context else []
    whole += [100 + i for i in range(settings["horizon"])]
    assert seen == whole[len(whole) - len(seen) :]  # the end of the clip, in order


@pytest.mark.parametrize("settings", [{"context": 2, "horizon": 6}, {"context": 5, "horizon": 6, "fvd_context": False}])
def test_clips_too_short_for_the_i3d_have_a_reason(settings):
    with pytest.raises(ValueError, match=r"10 frames.*evaluation\.horizon") as raised:
        Segments.choose(EvaluationConfig(**settings))
    assert ("fvd_context: false" in str(raised.value)) == ("fvd_context" in settings)


def test_features_are_means_of_places_and_of_changes():
    latents = torch.zeros(1, 4, 1, 4, 4)
    latents[0, 2, 0, :2, 2:] = 3.0  # the upper right of the first predicted frame
    features = latent_features(latents, 2)
    assert features.shape == (1, 2, 8)
    assert features[0, 0].tolist() == [0, 3, 0, 0, 0, 3, 0, 0]
    assert features[0, 1].tolist() == [0, 0, 0, 0, 0, 3, 0, 0]


class Means:
    """A video network whose features are the means of the frames, and of their squares, of one channel."""

    sha256 = "0"

    def features(self, videos: Tensor) -> Tensor:
        assert videos.abs().max() <= 1
        return torch.cat([videos[:, :, 0].mean((2, 3)), videos[:, :, 1].square().mean((2, 3))], 1)


def clips(seed: int, n: int = 40, frames: int = 12, noise: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, frames, 3, 2, 2, generator=generator) * noise).clamp(-1, 1)


# What is shown of clips of 2 given and 10 predicted frames: real ones, autoencoded ones, and futures.
REAL, AUTOENCODED, COPIES, *SAMPLES = (clips(number, noise=0.1 + 0.1 * number) for number in range(5))


def batch_of(real: Tensor, autoencoded: Tensor, copies: Tensor, *samples: Tensor, context: int = 2) -> ClipBatch:
    """Clips [n, frames, 3, h, w]; of futures, the frames after the given ones count."""
    futures = {
        "prediction": torch.stack(samples, 1)[:, :, context:],
        "copy_last": copies[:, None, context:],
        "reconstruction": autoencoded[:, None, context:],
    }
    return ClipBatch([], real[:, :context], real[:, context:], autoencoded, futures, {})


def records_of(measure: Measure, videos: list[Tensor]) -> Records:
    """Of batches of 16 clips."""
    parts = [measure.measure(batch_of(*batch)) for batch in zip(*(x.split(16) for x in videos), strict=True)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def measured(segments: Segments, videos: list[Tensor], counts: Tensor | None) -> MetricValues:
    distances = VideoDistances(Means(), segments, FeatureCache(Path("no folder/features.sqlite")))
    return distances.results(records_of(distances, videos), counts)["fvd"]


def between(first: Tensor, second: Tensor) -> float:
    return distance(Means().features(first), Means().features(second))


@pytest.mark.parametrize("segments", [Segments(2, 10, 12, 1), Segments(0, 10, 10, 1)])
def test_distances_of_all_subjects_from_both_sets(segments):
    found = measured(segments, [REAL, AUTOENCODED, COPIES, *SAMPLES], draw_counts(range(40), 50, 0))

    def shown(given: Tensor, following: Tensor) -> Tensor:
        return torch.cat([given[:, :2], following[:, 2:]], 1)[:, -segments.frames :]

    last = AUTOENCODED[:, 1:2].expand_as(AUTOENCODED)
    for given, copies, values in ((REAL, COPIES, found), (AUTOENCODED, last, found.autoencoded)):
        truth = shown(given, given)
        assert values.copy_last == pytest.approx(between(shown(given, copies), truth))
        # One set per sample number, and the mean over these.
        each = [between(shown(given, sample), truth) for sample in SAMPLES]
        assert values.prediction == pytest.approx(np.mean(each))
        for subject, (low, high) in values.interval.items():
            assert low < getattr(values, subject) < high
    assert found.reconstruction == pytest.approx(between(shown(AUTOENCODED, AUTOENCODED), shown(REAL, REAL)))
    assert found.autoencoded.reconstruction is None
    assert found.interval.keys() == {"prediction", "copy_last", "reconstruction"}
    assert measured(segments, [REAL, AUTOENCODED, COPIES, *SAMPLES], None).interval is None


def test_pooled_samples_and_the_first_alone():
    # One feature of 2 clips, 2 samples each. Variances are of n - 1.
    truth, samples = torch.tensor([0.0, 2.0]), torch.tensor([[0.0, 4.0], [2.0, 6.0]])
    records = {f"{against} {subject}": values.reshape(2, -1, 1, 1).double() for against in ("real", "autoencoded")
               for subject, values in (("truth", truth), ("prediction", samples), ("copy_last", truth))}  # fmt: skip
    parts = Means(), Segments(2, 10, 12, 1), FeatureCache(Path("no folder/features.sqlite"))
    measure = VideoDistances(*parts, ("fvd_pooled", "fvd_first_sample"))
    found = measure.results(records, None)
    # {0, 2} and {4, 6} against {0, 2}: 0, and (5 - 1)^2. All four: mean 3, variance 20 / 3.
    assert found["fvd"].prediction == pytest.approx((0 + 16) / 2)
    assert found["fvd_first_sample"].prediction == pytest.approx(0)
    assert found["fvd_pooled"].prediction == pytest.approx((3 - 1) ** 2 + (math.sqrt(20 / 3) - math.sqrt(2)) ** 2)
    assert found["fvd_pooled"].copy_last == pytest.approx(0)
    assert VideoDistances(*parts).results(records, None).keys() == {"fvd"}


def test_a_resample_draws_clips_with_all_their_segments():
    real, autoencoded, copies, sample = (clips(number, 20, 22) for number in range(4))
    counts = draw_counts([*range(10), *range(10)], 30, 0)
    found = measured(Segments(2, 20, 11, 2), [real, autoencoded, copies, sample], counts)
    copies = torch.cat([real[:, :2], copies[:, 2:]], 1)
    values = []
    for row in counts:
        chosen = torch.arange(20).repeat_interleave(row.long())
        values.append(between(copies[chosen].reshape(-1, 11, 3, 2, 2), real[chosen].reshape(-1, 11, 3, 2, 2)))
    expected = between(copies.reshape(-1, 11, 3, 2, 2), real.reshape(-1, 11, 3, 2, 2))
    assert found.copy_last == pytest.approx(expected)
    half = 1.959964 * np.std(values, ddof=1)
    low, high = found.interval["copy_last"]
    assert high - expected == pytest.approx(half, rel=1e-6)
    assert low == pytest.approx(max(0, expected - half), rel=1e-6)


def test_distances_of_latents_and_their_intervals():
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(20, 5, 4, 4, 4, generator=generator) for _ in range(3)]
    distances, counts = LatentDistances(), draw_counts(range(20), 30, 0)
    parts = []
    for part in (slice(12), slice(12, 20)):
        of_subjects = {"truth": latents[0][part, None], "prediction": torch.stack(latents[1:], 1)[part]}
        parts.append(
            distances.measure(ClipBatch([], torch.zeros(1, 2), torch.empty(0), torch.empty(0), {}, of_subjects))
        )
    records = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    found = distances.results(records, counts)["latent_frechet"]

    def measure(chosen: Tensor) -> float:
        features = [latent_features(x[chosen], 2).flatten(0, 1) for x in latents]
        return (distance(features[1], features[0]) + distance(features[2], features[0])) / 2

    assert found.prediction == pytest.approx(measure(torch.arange(20)))
    values = [measure(torch.arange(20).repeat_interleave(row.long())) for row in counts]
    assert found.interval["prediction"][1] - found.prediction == pytest.approx(1.959964 * np.std(values, ddof=1))
    assert found.copy_last is found.reconstruction is found.autoencoded is None


def test_few_clips_are_measured_with_a_warning_and_one_is_refused(capsys):
    whole, videos = Segments(2, 10, 12, 1), [REAL, AUTOENCODED, COPIES, *SAMPLES]
    assert measured(whole, [x[:20] for x in videos], None).prediction > 0
    warning = capsys.readouterr().err
    assert "20 clips" in warning
    assert "24 features" in warning
    measured(whole, videos, None)
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="two clips or more"):
        measured(whole, [x[:1] for x in videos], None)
