"""Views of a video: the augmentations that are cached beside it.

`identity` is the video as it is, `hflip` its mirror image, and `jitter-1`, `jitter-2`, ... are colour jitters, each
constant over the video. A view is a pure function of its name and the video's id, on every machine, and what becomes of
a frame does not depend, to the bit, on the frames that are changed together with it.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stage1_autoencoder.augmentation import GREY_WEIGHTS, ColourFactors, change_colours

# The jitter with which RIVER was trained on CLEVRER: factors, and a share of the colour circle.
BRIGHTNESS = (0.9, 1.1)
CONTRAST = (0.9, 1.1)
SATURATION = (0.9, 1.1)
HUE = (-0.25, 0.25)


@dataclass(frozen=True)
class View:
    """What the name of a view says: mirrored or not, and the number of the colour jitter (0: none)."""

    flip: bool = False
    jitter: int = 0


@dataclass(frozen=True)
class ViewTransform:
    """What a view does to all frames of one video.

    Attributes:
        flip: mirror left to right.
        brightness, contrast, saturation: factors, at least 0; 1 changes nothing.
        hue: turns of the colour circle; 0 changes nothing, 1/3 makes green of red.
    """

    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0

    @property
    def is_identity(self) -> bool:
        """Whether frames stay as they are."""
        return not self.flip and not self.changes_colour

    @property
    def changes_colour(self) -> bool:
        """Whether anything but the flip is left to do."""
        return (self.brightness, self.contrast, self.saturation, self.hue) != (1.0, 1.0, 1.0, 0.0)


def parse_view(name: str) -> View:
    """Parse the name of a view: identity, hflip, or jitter-k with k = 1, 2, ...

    Raises:
        ValueError: none of these.
    """
    if name == "identity":
        return View()
    if name == "hflip":
        return View(flip=True)
    if match := re.fullmatch(r"jitter-([1-9][0-9]*)", name):
        return View(jitter=int(match[1]))
    raise ValueError(f"{name!r} is not a view: identity, hflip, or jitter-1, jitter-2, ... are")


def view_transform(view: str, video_id: str) -> ViewTransform:
    """Work out what a view does to a video. Jitters are drawn from sha256 of the view's name and the video's id.

    Raises:
        ValueError: no such view.
    """
    parsed = parse_view(view)
    if not parsed.jitter:
        return ViewTransform(flip=parsed.flip)
    # No view's name holds a zero byte, so no two pairs have one key. File names in odd encodings hold surrogates.
    digest = hashlib.sha256(f"{view}\0{video_id}".encode(errors="surrogatepass")).digest()
    # A fraction of 53 bits, which a float holds exactly, of each 8 of the 32 bytes.
    uniform = [(int.from_bytes(digest[at : at + 8], "big") >> 11) / 2**53 for at in range(0, 32, 8)]
    brightness, contrast, saturation, hue = (
        low + (high - low) * share
        for share, (low, high) in zip(uniform, (BRIGHTNESS, CONTRAST, SATURATION, HUE), strict=True)
    )
    return ViewTransform(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)


def views_description(views: Sequence[str]) -> dict[str, Any]:
    """Describe what is behind the views' names, for the store's attributes.

    Stores of equal names, descriptions, videos and autoencoder hold the same latents.

    Returns:
        JSON values; empty where no view is a jitter, because the other names say it all.
    Raises:
        ValueError: no such view.
    """
    if not any(parse_view(view).jitter for view in views):
        return {}
    return {
        "jitter": {
            "order": ["brightness", "contrast", "saturation", "hue"],
            "brightness": list(BRIGHTNESS),
            "contrast": list(CONTRAST),
            "saturation": list(SATURATION),
            "hue_turns": list(HUE),
            "grey_weights": list(GREY_WEIGHTS),
            "draws": "uniform, constant over a video: 4 x 64 bits of sha256(view, zero byte, video id)",
        }
    }


def apply_views(images: Tensor, transforms: Sequence[ViewTransform]) -> Tensor:
    """Apply one transform a frame: flip, brightness, contrast, saturation, hue, in this order.

    What the factors and the turn of the hue mean is said at `change_colours`.

    Args:
        images: [b, 3, h, w] float in [-1, 1].
        transforms: [b].
    Returns:
        [b, 3, h, w] in [-1, 1], of the images' dtype. Without a change of colour, pixels are the same to the bit.
    Raises:
        ValueError: another shape, or another number of transforms.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(transforms):
        raise ValueError(f"images of shape {list(images.shape)} for {len(transforms)} transforms: not [b, 3, h, w]")

    def column(values: list[bool] | list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=images.device).view(-1, 1, 1, 1)

    if any(transform.flip for transform in transforms):
        flip = column([transform.flip for transform in transforms], torch.bool)
        images = torch.where(flip, images.flip(-1), images)
    if not any(transform.changes_colour for transform in transforms):
        return images

    dtype = torch.promote_types(images.dtype, torch.float32)
    names = ("brightness", "contrast", "saturation", "hue")
    factors = ColourFactors(*(column([getattr(t, name) for t in transforms], dtype) for name in names))
    coloured = column([transform.changes_colour for transform in transforms], torch.bool)
    return torch.where(coloured, change_colours(images, factors), images)
