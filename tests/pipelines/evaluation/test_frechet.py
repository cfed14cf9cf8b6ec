"""The Fréchet distance against closed forms, scipy's root of a matrix, and what must not change it."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from pipelines.evaluation.metrics import fit_gaussian, frechet_distance


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
