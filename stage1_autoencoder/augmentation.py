"""Random changes of training images, so that an autoencoder of few videos does not learn their light by heart."""

import torch
from torch import Tensor


def augment(images: Tensor, *, jitter: float, flip: bool, generator: torch.Generator) -> Tensor:
    """Mirror images and change their brightness and contrast, each image by draws of its own.

    Brightness multiplies pixels in [0, 1] by U[1 - jitter, 1 + jitter]; contrast does the same to their distance from
    the image's mean. Pixels that leave the range are clamped.

    Args:
        images: [b, 3, h, w] in [-1, 1].
        jitter: in [0, 1); 0: none.
        flip: mirror half of the images left to right.
        generator: where the draws come from, on the images' device.
    Returns:
        [b, 3, h, w] in [-1, 1].
    """
    shape = (3, len(images), 1, 1, 1)
    brightness, contrast, mirror = torch.rand(shape, generator=generator, device=images.device)
    if flip:
        images = torch.where(mirror < 0.5, images.flip(-1), images)
    if jitter:
        pixels = (images + 1) / 2 * (1 + jitter * (2 * brightness - 1))
        mean = pixels.mean((1, 2, 3), keepdim=True)
        pixels = mean + (pixels - mean) * (1 + jitter * (2 * contrast - 1))
        images = pixels.clamp(0, 1) * 2 - 1
    return images
