"""The Fréchet distance against closed forms and scipy's root of a matrix, and distances of sets of clips."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from pipelines.config import EvaluationConfig
from pipelines.evaluation.frechet import Segments, VideoDistances, fit_gaussian, frechet_distance
from pipelines.evaluation.intervals import draw_counts


def draw(n: int, d: int, seed: int) -> Tensor:
    """Correlated features whose mean is not 0."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + torch.arange(d) / d


def distance(first: Tensor, second: Tensor) -> float:
    return frechet_distance(fit_gaussian(first), fit_gaussian(second))


def textbook(first: Tensor, second: Tensor) -> float:
    """With numpy's covariance and scipy's root."""
    means = [x.numpy().mean(0) for x in (first, second)]
    covariances = [np.cov(x.numpy(), rowvar=False) for x in (first, second)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root))


def test_of_one_dimension_it_has_a_closed_form():
    # Mean and deviation (n - 1) of +-1 are 0 and sqrt(2); those of 3 -+ 2 are 3 and sqrt(8).
    first, second = torch.tensor([[-1.0], [1.0]]), torch.tensor([[1.0], [5.0]])
    assert distance(first, second) == pytest.approx(9 + (math.sqrt(8) - math.sqrt(2)) ** 2, rel=1e-12)


def test_of_diagonal_covariances_it_has_a_closed_form():
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
    spread = [np.cov(x.numpy(), rowvar=False) + 1e-11 * np.eye(20) for x in (first, second)]
    root = sqrtm(spread[0] @ spread[1]).real
    shift = float((first.mean(0) - second.mean(0)).square().sum())
    assert distance(first, second) == pytest.approx(shift + np.trace(spread[0] + spread[1] - 2 * root), rel=1e-4)
    same = torch.ones(5, 20)
    assert distance(same, same + 2) == pytest.approx(20 * 4)


@pytest.mark.parametrize(("n", "d"), [(100, 10), (7, 30)])
def test_equal_sets_have_no_distance(n, d):
    features = draw(n, d, 0)
    assert distance(features, features) < 1e-9
    assert distance(features, features.flip(0)) < 1e-9
    assert distance(features, features) >= 0


def test_what_does_not_change_it():
    first, second = draw(60, 8, 0), draw(50, 8, 1)
    expected = distance(first, second)
    assert expected > 1
    assert distance(second, first) == pytest.approx(expected, rel=1e-10)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    assert distance(first[order], second) == pytest.approx(expected, rel=1e-10)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2)).double())[0]
    assert distance(first @ rotation + 5, second @ rotation + 5) == pytest.approx(expected, rel=1e-9)
    assert distance(3 * first, 3 * second) == pytest.approx(9 * expected, rel=1e-9)


def test_more_noise_is_further_away():
    features = draw(200, 6, 0)
    noise = torch.randn(200, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    distances = [distance(features, features + scale * noise) for scale in (0.0, 0.5, 1.0, 2.0, 4.0)]
    assert distances == sorted(distances)
    assert distances[1] > 100 * distances[0]


def test_counts_are_repetitions():
    features, other = draw(12, 4, 0), draw(9, 4, 1)
    counts = torch.tensor([2, 0, 1, 3, 1, 1, 0, 2, 1, 0, 1, 0])
    repeated = features.repeat_interleave(counts, dim=0)
    weighted = frechet_distance(fit_gaussian(features, counts), fit_gaussian(other))
    assert weighted == pytest.approx(distance(repeated, other), rel=1e-10)


def test_single_precision_features_are_reckoned_with_in_double():
    features = (draw(100, 5, 0) + 1e3).float()
    ours = fit_gaussian(features)
    covariance = (ours.root.T @ ours.root).numpy()
    np.testing.assert_allclose(covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-9)


def test_too_few_and_broken_features_are_refused():
    with pytest.raises(ValueError, match=r"two clips or more, not \[1, 5\]"):
        fit_gaussian(torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"two clips"):
        fit_gaussian(torch.zeros(4, 5), torch.tensor([0, 1, 0, 0]))
    with pytest.raises(ValueError, match="not finite"):
        fit_gaussian(torch.tensor([[1.0], [math.nan]]))


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


class Means:
    """A video network whose features are the means of the frames, and of their squares, of one channel."""

    def features(self, videos: Tensor) -> Tensor:
        assert videos.abs().max() <= 1
        return torch.cat([videos[:, :, 0].mean((2, 3)), videos[:, :, 1].square().mean((2, 3))], 1)


def clips(seed: int, n: int = 40, frames: int = 12, noise: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, frames, 3, 2, 2, generator=generator) * noise).clamp(-1, 1)


def collect(segments: Segments, subjects: dict[str, Tensor], context: int = 2) -> VideoDistances:
    distances = VideoDistances(Means(), segments)
    for name, videos in subjects.items():
        for part in videos.split(16):
            distances.add(name, part[:, :context], part[:, context:])
    return distances


def expected_distance(first: Tensor, second: Tensor) -> float:
    return distance(Means().features(first), Means().features(second))


WHOLE = Segments(context=2, horizon=10, frames=12, count=1)
SUBJECTS = {"real": clips(0), "autoencoded": clips(0) * 0.9, "copy_last": clips(1, noise=0.2),
            "copy_last_autoencoded": clips(1, noise=0.1), "prediction 0": clips(2), "prediction 1": clips(3),
            "prediction_autoencoded 0": clips(4), "prediction_autoencoded 1": clips(5)}  # fmt: skip


def test_distances_of_all_subjects_from_both_sets():
    distances = collect(WHOLE, SUBJECTS)
    found = distances.results(draw_counts(range(40), 50, 0), samples=2)
    real, autoencoded = SUBJECTS["real"], SUBJECTS["autoencoded"]
    assert found.copy_last == pytest.approx(expected_distance(SUBJECTS["copy_last"], real))
    assert found.reconstruction == pytest.approx(expected_distance(autoencoded, real))
    # One set per sample number, and the mean over these.
    each = [expected_distance(SUBJECTS[f"prediction {n}"], real) for n in (0, 1)]
    assert found.prediction == pytest.approx(np.mean(each))
    each = [expected_distance(SUBJECTS[f"prediction_autoencoded {n}"], autoencoded) for n in (0, 1)]
    assert found.autoencoded.prediction == pytest.approx(np.mean(each))
    copied = expected_distance(SUBJECTS["copy_last_autoencoded"], autoencoded)
    assert found.autoencoded.copy_last == pytest.approx(copied)
    assert found.autoencoded.reconstruction is None
    for values in (found, found.autoencoded):
        assert values.interval
        for subject, (low, high) in values.interval.items():
            assert low < getattr(values, subject) < high
    assert distances.results(None, samples=2).interval is None


def test_without_given_frames_a_prediction_is_compared_with_both():
    subjects = {name: videos for name, videos in SUBJECTS.items() if "prediction_autoencoded" not in name}
    found = collect(Segments(0, 10, 10, 1), subjects).results(None, samples=2)
    each = [expected_distance(SUBJECTS[f"prediction {n}"][:, 2:], SUBJECTS["autoencoded"][:, 2:]) for n in (0, 1)]
    assert found.autoencoded.prediction == pytest.approx(np.mean(each))


def test_a_resample_draws_clips_with_all_their_segments():
    subjects = {name: clips(number, 12, 22) for number, name in enumerate(SUBJECTS)}
    counts = draw_counts([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5], 30, 0)
    found = collect(Segments(2, 20, 11, 2), subjects).results(counts, samples=1)
    values = []
    for row in counts:
        chosen = torch.arange(12).repeat_interleave(row.long())
        drawn = [subjects[name][chosen].reshape(-1, 11, 3, 2, 2) for name in ("copy_last", "real")]
        values.append(expected_distance(*drawn))
    half = 1.959964 * np.std(values, ddof=1)
    expected = expected_distance(*(subjects[name].reshape(-1, 11, 3, 2, 2) for name in ("copy_last", "real")))
    assert found.copy_last == pytest.approx(expected)
    low, high = found.interval["copy_last"]
    assert high - expected == pytest.approx(half, rel=1e-6)
    assert low == pytest.approx(max(0, expected - half), rel=1e-6)


def test_few_clips_are_measured_with_a_warning_and_one_is_refused(capsys):
    few = {name: videos[:20] for name, videos in SUBJECTS.items()}
    assert collect(WHOLE, few).results(None, samples=1).prediction > 0
    warning = capsys.readouterr().err
    assert "20 clips" in warning
    assert "24 features" in warning
    collect(WHOLE, SUBJECTS).results(None, samples=1)
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="two clips or more"):
        collect(WHOLE, {name: videos[:1] for name, videos in SUBJECTS.items()}).results(None, samples=1)
