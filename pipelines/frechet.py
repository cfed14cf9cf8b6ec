"""The Fréchet distance of two sets of features, each taken for a sample of a Gaussian (Heusel et al. 2017)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance of a set, the latter by a root of it.

    Attributes:
        mean: [d] float64.
        root: [r, d] float64, r <= d, with `root.T @ root` the covariance, also where that is singular.
    """

    mean: Tensor
    root: Tensor


def fit_gaussian(features: Tensor, counts: Tensor | None = None) -> Gaussian:
    """Mean and covariance (divided by n - 1, as the original FVD does) of a set of features.

    Args:
        features: [n, d] float, n >= 2; computed with in float64.
        counts: [n] >= 0, how often each row stands in the set; None: once.
    Raises:
        ValueError: fewer than two rows, counted as often as they stand, or values that are not finite.
    """
    features = features.double()
    counts = torch.ones(len(features)).to(features) if counts is None else counts.to(features)
    total = counts.sum()
    if features.ndim != 2 or total < 2:
        raise ValueError(f"a covariance needs [n, d] features of two clips or more, not {list(features.shape)}")
    if not torch.isfinite(features).all():
        raise ValueError("features that are not finite")
    present = counts > 0
    features, counts = features[present], counts[present]
    mean = counts @ features / total
    root = (features - mean) * (counts / (total - 1)).sqrt()[:, None]
    if len(root) > root.shape[1]:
        root = torch.linalg.qr(root, mode="r")[1]
    return Gaussian(mean, root)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), which is 0 for equal Gaussians and symmetric.

    With S1 = A^T A and S2 = B^T B the eigenvalues of S1 S2 are those of (A B^T)(A B^T)^T and zeros, so the trace of its
    root is the sum of A B^T's singular values: no root of a matrix is taken, and singular covariances need no help.
    """
    root_trace = torch.linalg.svdvals(first.root @ second.root.T).sum()
    spread = first.root.square().sum() + second.root.square().sum() - 2 * root_trace
    return max(0.0, float((first.mean - second.mean).square().sum() + spread))
