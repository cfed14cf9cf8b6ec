"""Image metrics, one number a frame."""

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


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
