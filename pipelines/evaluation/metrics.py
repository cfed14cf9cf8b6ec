"""Image metrics, one number per frame: PSNR, SSIM, LPIPS."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from pipelines.config import RiverConfig
from pipelines.evaluation.networks import NO_VGG16, load_lpips
from pipelines.runtime.context import RunContext, computing_in
from stage1_autoencoder.lpips import SMALLEST_SIDE

# Pixels per call of a metric: LPIPS holds some kB for each.
PIXELS_AT_ONCE = 2**18


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, in dB, for signals in [-1, 1].

    Args:
        images: [n, 3, h, w] float; clamped to [-1, 1].
        truth: [n, 3, h, w] float in [-1, 1].
    Returns:
        [n]; at most 100 dB, which keeps means finite when an image has no error.
    """
    values = peak_signal_noise_ratio(
        images.clamp(-1, 1), truth, data_range=2.0, dim=(1, 2, 3), reduction="none", base=10.0
    )
    return torch.as_tensor(values).clamp(max=100.0)


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each image (11x11 Gaussian, sigma 1.5, mirrored edges), for signals in [-1, 1].

    Args, returns: as `psnr`; values in [-1, 1].
    """
    values = structural_similarity_index_measure(images.clamp(-1, 1), truth, data_range=2.0, reduction="none")
    return torch.atleast_1d(torch.as_tensor(values))


@dataclass(frozen=True)
class Metric:
    """A distance or similarity of images.

    Attributes:
        name: its key in results.
        function: (images, truth), both [n, 3, h, w] in [-1, 1] -> [n].
        higher_is_better: whether a higher number means closer to the truth.
    """

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    higher_is_better: bool


PSNR, SSIM = Metric("psnr", psnr, True), Metric("ssim", ssim, True)


def lpips_metric(network: Callable[[Tensor, Tensor], Tensor]) -> Metric:
    """LPIPS by a loaded network; images are clamped to [-1, 1] as for the others."""
    return Metric("lpips", lambda images, truth: network(images.clamp(-1, 1), truth), False)


def load_frame_metrics(config: RiverConfig, run_context: RunContext) -> tuple[list[Metric], str | None]:
    """PSNR, SSIM, and LPIPS if it can be measured; with the reason if it cannot.

    Raises:
        UserError, FetchError: see `load_lpips`.
    """
    if config.dataset.image_size < SMALLEST_SIDE:
        return [PSNR, SSIM], f"LPIPS needs images of {SMALLEST_SIDE} pixels a side, dataset.image_size is smaller"
    lpips = load_lpips(config.autoencoder.training.vgg_weights, run_context.device, download=run_context.download)
    if lpips is None:
        return [PSNR, SSIM], NO_VGG16
    return [PSNR, SSIM, lpips_metric(lpips)], None


def measure_frames(metric: Metric, videos: Tensor, truth: Tensor) -> Tensor:
    """A metric of every frame, in float32 on the device of the videos.

    Args:
        videos, truth: [b, n, 3, h, w] in [-1, 1].
    Returns:
        [b, n] float32, on the CPU.
    """
    images, targets = flatten(videos).float(), flatten(truth).float()
    size = max(1, PIXELS_AT_ONCE // (images.shape[2] * images.shape[3]))
    # SSIM subtracts nearly equal sums, for which TF32 is too coarse.
    with computing_in("fp32", images.device), torch.inference_mode():
        parts = [metric.function(*pair) for pair in zip(images.split(size), targets.split(size), strict=True)]
    return torch.cat(parts).view(videos.shape[:2]).cpu()


def choose_best(values: Tensor, higher_is_better: bool) -> Tensor:
    """Best-of-K as SVG and SRVP report it: of each clip the sample whose mean over the horizon is best.

    Args:
        values: [clips, samples, horizon] of one metric, by which the sample is chosen.
    Returns:
        [clips, horizon] of the chosen samples.
    """
    means = values.double().mean(2)
    chosen = means.argmax(1) if higher_is_better else means.argmin(1)
    return values[torch.arange(len(values)), chosen]


def flatten(videos: Tensor) -> Tensor:
    """[b, n, 3, h, w] to [b n, 3, h, w]."""
    return rearrange(videos, "b n c h w -> (b n) c h w")
