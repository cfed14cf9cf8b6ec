"""Image metrics, one number a frame, and what to make of them over clips and samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from pipelines.runtime.context import computing_in


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


# Pixels that are measured at once: LPIPS keeps some kB of each.
PIXELS_AT_ONCE = 2**18


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, in dB, for signals in [-1, 1].

    Args:
        images: [n, 3, h, w] float; clamped to [-1, 1].
        truth: [n, 3, h, w] float in [-1, 1].
    Returns:
        [n]; an image without error has 100 dB, so that means over frames stay finite.
    """
    # One image at a time would be a Python loop; torchmetrics reduces over given dimensions only.
    values = peak_signal_noise_ratio(
        images.clamp(-1, 1), truth, data_range=2.0, dim=(1, 2, 3), reduction="none", base=10.0
    )
    return torch.as_tensor(values).clamp(max=100.0)


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each image (11x11 Gaussian, sigma 1.5, edges mirrored), for signals in [-1, 1].

    Args, returns: as `psnr`; values in [-1, 1].
    """
    values = structural_similarity_index_measure(images.clamp(-1, 1), truth, data_range=2.0, reduction="none")
    return torch.atleast_1d(torch.as_tensor(values))


@dataclass(frozen=True)
class Metric:
    """A number that tells how far an image is from its truth.

    Attributes:
        name: its key in results.
        function: (images, truth), both [n, 3, h, w] in [-1, 1] -> [n].
        higher_is_better: of two images, the one with the higher number is closer.
        unit: of the number.
    """

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    higher_is_better: bool
    unit: str = ""


PSNR, SSIM = Metric("psnr", psnr, True, "dB"), Metric("ssim", ssim, True)


def lpips_metric(network: Callable[[Tensor, Tensor], Tensor]) -> Metric:
    """LPIPS by a loaded network; images are clamped to [-1, 1] as for the others."""
    return Metric("lpips", lambda images, truth: network(images.clamp(-1, 1), truth), False)


def measure_frames(metric: Metric, videos: Tensor, truth: Tensor) -> Tensor:
    """A metric of every frame, in float32 on the device where the videos are.

    Args:
        videos, truth: [b, n, 3, h, w] in [-1, 1].
    Returns:
        [b, n] float32, on the CPU.
    """
    images, targets = (rearrange(frames, "b n c h w -> (b n) c h w").float() for frames in (videos, truth))
    size = max(1, PIXELS_AT_ONCE // (images.shape[2] * images.shape[3]))
    # SSIM takes differences of nearly equal sums, for which TF32 is too coarse.
    with computing_in("fp32", images.device), torch.inference_mode():
        parts = [metric.function(*pair) for pair in zip(images.split(size), targets.split(size), strict=True)]
    return torch.cat(parts).view(videos.shape[:2]).cpu()


def choose_best(values: Tensor, higher_is_better: bool) -> Tensor:
    """Best-of-K as SVG and SRVP report it: of each clip the sample whose mean over the horizon is best.

    Args:
        values: [clips, samples, horizon] of one metric, by which the sample is chosen.
    Returns:
        [clips, horizon], of the chosen samples.
    """
    means = values.double().mean(2)
    chosen = means.argmax(1) if higher_is_better else means.argmin(1)
    return values[torch.arange(len(values)), chosen]


def flatten(videos: torch.Tensor) -> torch.Tensor:
    """[b, n, 3, h, w] to [b n, 3, h, w]."""
    return rearrange(videos, "b n c h w -> (b n) c h w")
