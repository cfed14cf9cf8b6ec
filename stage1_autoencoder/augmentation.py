"""Random changes of training images, so that an autoencoder of few videos does not learn their light by heart."""

import torch
from torch import Tensor

from stage1_autoencoder.colours import ColourFactors, change_colours
from stage1_autoencoder.config import ColorJitterConfig


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
