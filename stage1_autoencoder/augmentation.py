"""Random changes of training images, so that an autoencoder of few videos does not learn their light by heart."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stage1_autoencoder.config import ColorJitterConfig

# ITU-R BT.601 luma of red, green and blue.
GREY_WEIGHTS = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class ColourFactors:
    """How far colours are changed, frame by frame.

    Attributes:
        brightness, contrast, saturation: [b, 1, 1, 1] factors, at least 0; 1 changes nothing.
        hue: [b, 1, 1, 1] turns of the colour circle; 0 changes nothing, 1/3 makes green of red.
    """

    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor


def change_colours(images: Tensor, factors: ColourFactors) -> Tensor:
    """Change brightness, contrast, saturation and hue of frames, in this order.

    Factors f blend the picture x in [0, 1] with another one y, to f x + (1 - f) y: brightness with black, contrast with
    the frame's mean grey, saturation with the grey picture. Hue turns the colour circle of HSV. The result of each step
    is clamped to [0, 1]. This is torchvision's `ColorJitter` with its order fixed, up to its grey weights' rounding.

    Args:
        images: [b, 3, h, w] float in [-1, 1].
        factors: of the b frames, in fp32 or wider.
    Returns:
        [b, 3, h, w] in [-1, 1], of the images' dtype; in between, pixels are fp32 or wider. Factors that change nothing
        leave pixels what they are only up to rounding.
    """
    pixels = (images.to(torch.promote_types(images.dtype, torch.float32)) + 1) / 2
    pixels = (factors.brightness * pixels).clamp(0, 1)
    pixels = (factors.contrast * pixels + (1 - factors.contrast) * _frame_mean(_grey(pixels))).clamp(0, 1)
    pixels = (factors.saturation * pixels + (1 - factors.saturation) * _grey(pixels)).clamp(0, 1)
    pixels = _turn_hue(pixels, factors.hue).clamp(0, 1)
    return (pixels * 2 - 1).to(images.dtype)


def _grey(pixels: Tensor) -> Tensor:
    """[b, 3, h, w] to [b, 1, h, w]."""
    red, green, blue = pixels.split(1, dim=1)
    return GREY_WEIGHTS[0] * red + GREY_WEIGHTS[1] * green + GREY_WEIGHTS[2] * blue


def _frame_mean(grey: Tensor) -> Tensor:
    """Mean of each frame [b, 1, h, w] in [0, 1], as [b, 1, 1, 1].

    The order in which floats are added changes with the batch, the threads and the device. Integers don't care.
    """
    fixed_point = (grey.double() * 2**32).round().long()
    total = fixed_point.sum((1, 2, 3), keepdim=True).double()
    return (total / (grey[0].numel() * 2**32)).to(grey.dtype)


def _turn_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of [b, 3, h, w] in [0, 1] at equal saturation and value.

    With the value V = max(R, G, B), the chroma C = V - min(R, G, B) and the hue H in sixths of a turn, a channel is
    V - C clamp(min(k, 4 - k), 0, 1) where k = (n + H) mod 6 and n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = pixels.split(1, dim=1)
    value = pixels.amax(1, keepdim=True)
    chroma = value - pixels.amin(1, keepdim=True)
    divisor = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    k = hue + 6 * turns + torch.tensor([5.0, 3.0, 1.0], dtype=pixels.dtype, device=pixels.device).view(1, 3, 1, 1)
    k = k - 6 * torch.floor(k / 6)
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def augment(
    images: Tensor,
    *,
    jitter: ColorJitterConfig,
    flip: bool,
    generator: torch.Generator,
    batch: int | None = None,
    rows: slice | None = None,
) -> Tensor:
    """Mirror images or clips and change their colours, each by draws of its own that hold for all frames of a clip.

    Brightness, contrast and saturation are multiplied by U[1 - j, 1 + j], the hue is turned by U[-j, j], as
    `change_colours` does it (contrast: towards each frame's own mean). The draws are made for the whole batch, so what
    becomes of a row does not depend on how rows are spread over processes, nor on which changes are asked for.

    Args:
        images: [b, 3, h, w], or clips [b, n, 3, h, w], float in [-1, 1].
        jitter: how far each of the four varies.
        flip: mirror half of the images left to right.
        generator: where the draws come from, on the images' device, in the same state in all processes.
        batch: rows of the whole batch; None: b.
        rows: those of the whole batch that `images` are; None: all.
    Returns:
        The images' shape and dtype, in [-1, 1]. Without jitter, pixels are the same to the bit.
    Raises:
        ValueError: another shape, or another number of images than of rows.
    """
    if images.ndim not in (4, 5) or images.shape[-3] != 3:
        raise ValueError(
            f"images of shape {list(images.shape)} can't be augmented: not [b, 3, h, w] or [b, n, 3, h, w]"
        )
    batch, rows = len(images) if batch is None else batch, slice(None) if rows is None else rows
    draws = torch.rand((5, batch), generator=generator, device=images.device)[:, rows]
    if draws.shape[1] != len(images):
        raise ValueError(
            f"{len(images)} images are not the rows {rows} of a batch of {batch}, which are {draws.shape[1]}"
        )

    if flip:
        mirror = (draws[0] < 0.5).view(-1, *[1] * (images.ndim - 1))
        images = torch.where(mirror, images.flip(-1), images)
    if jitter.changes_nothing:
        return images
    frames = images.flatten(0, -4)
    # One draw a clip, for each of its frames.
    brightness, contrast, saturation, hue = (
        (2 * draws[1:] - 1).repeat_interleave(len(frames) // max(1, len(images)), dim=1).view(4, -1, 1, 1, 1)
    )
    factors = ColourFactors(
        brightness=1 + jitter.brightness * brightness,
        contrast=1 + jitter.contrast * contrast,
        saturation=1 + jitter.saturation * saturation,
        hue=jitter.hue * hue,
    )
    return change_colours(frames, factors).view_as(images)
