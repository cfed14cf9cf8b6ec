"""Image augmentation: adjusting colors, and random flips and color jitter of training images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stage1_autoencoder.config import ColorJitterConfig

# ITU-R BT.601 luma of red, green and blue.
GRAY_WEIGHTS = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class ColorFactors:
    """Color adjustments, per frame.

    Attributes:
        brightness, contrast, saturation: [b, 1, 1, 1] factors, at least 0; 1 changes nothing.
        hue: [b, 1, 1, 1] turns of the color circle; 0 changes nothing, 1/3 turns red into green.
    """

    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor


def adjust_colors(images: Tensor, factors: ColorFactors) -> Tensor:
    """Adjust brightness, contrast, saturation and hue of frames, in this order.

    A factor f blends the picture x in [0, 1] with another one y, f x + (1 - f) y: brightness with black, contrast with
    the frame's mean gray, saturation with the gray picture. Hue turns the color circle of HSV. The result of each step
    is clamped to [0, 1]. This is torchvision's `ColorJitter` with a fixed order, up to rounded gray weights.

    Args:
        images: [b, 3, h, w] float in [-1, 1].
        factors: of the b frames, in fp32 or wider.
    Returns:
        [b, 3, h, w] in [-1, 1], in the images' dtype; computed in fp32 or wider. Factors that change nothing preserve
        pixels up to rounding.
    """
    pixels = (images.to(torch.promote_types(images.dtype, torch.float32)) + 1) / 2
    pixels = (factors.brightness * pixels).clamp(0, 1)
    pixels = (factors.contrast * pixels + (1 - factors.contrast) * _frame_mean(_gray(pixels))).clamp(0, 1)
    pixels = (factors.saturation * pixels + (1 - factors.saturation) * _gray(pixels)).clamp(0, 1)
    pixels = _turn_hue(pixels, factors.hue).clamp(0, 1)
    return (pixels * 2 - 1).to(images.dtype)


def _gray(pixels: Tensor) -> Tensor:
    """[b, 3, h, w] to [b, 1, h, w]."""
    red, green, blue = pixels.split(1, dim=1)
    return GRAY_WEIGHTS[0] * red + GRAY_WEIGHTS[1] * green + GRAY_WEIGHTS[2] * blue


def _frame_mean(gray: Tensor) -> Tensor:
    """Mean of each frame [b, 1, h, w] in [0, 1], as [b, 1, 1, 1].

    Summed in integers: the order of a sum depends on the batch, the threads and the device, and changes floats.
    """
    fixed_point = (gray.double() * 2**32).round().long()
    total = fixed_point.sum((1, 2, 3), keepdim=True).double()
    return (total / (gray[0].numel() * 2**32)).to(gray.dtype)


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
    """Flip images or clips at random and jitter their colors; each row has its own draws, for all frames of a clip.

    Factors of brightness, contrast and saturation are U[1 - j, 1 + j], turns of the hue U[-j, j], see `adjust_colors`
    (contrast: relative to each frame's own mean). Draws are made for the whole batch, so the result of a row depends
    neither on how rows are distributed over processes, nor on which augmentations are enabled.

    Args:
        images: [b, 3, h, w], or clips [b, n, 3, h, w], float in [-1, 1].
        jitter: the range of each of the four.
        flip: mirror half of the images left to right.
        generator: on the images' device, in the same state in all processes.
        batch: number of rows of the whole batch; None: b.
        rows: the rows of the whole batch in `images`; None: all.
    Returns:
        the images' shape and dtype, in [-1, 1]. Without jitter, pixels are preserved exactly.
    Raises:
        ValueError: a wrong shape, or a wrong number of images.
    """
    if images.ndim not in (4, 5) or images.shape[-3] != 3:
        raise ValueError(
            f"cannot augment images of shape {list(images.shape)}: expected [b, 3, h, w] or [b, n, 3, h, w]"
        )
    batch, rows = len(images) if batch is None else batch, slice(None) if rows is None else rows
    draws = torch.rand((5, batch), generator=generator, device=images.device)[:, rows]
    if draws.shape[1] != len(images):
        raise ValueError(f"{len(images)} images given, but rows {rows} of a batch of {batch} are {draws.shape[1]}")

    if flip:
        mirror = (draws[0] < 0.5).view(-1, *[1] * (images.ndim - 1))
        images = torch.where(mirror, images.flip(-1), images)
    if jitter.changes_nothing:
        return images
    frames = images.flatten(0, -4)
    # One draw per clip, repeated for its frames.
    brightness, contrast, saturation, hue = (
        (2 * draws[1:] - 1).repeat_interleave(len(frames) // max(1, len(images)), dim=1).view(4, -1, 1, 1, 1)
    )
    factors = ColorFactors(
        brightness=1 + jitter.brightness * brightness,
        contrast=1 + jitter.contrast * contrast,
        saturation=1 + jitter.saturation * saturation,
        hue=jitter.hue * hue,
    )
    return adjust_colors(frames, factors).view_as(images)
