"""Views of a video: the augmentations whose latents are stored beside those of the video.

`identity` is the video itself, `hflip` its mirror image, and `jitter-1`, `jitter-2`, ... are color jitters, each
constant over the video. A view is a pure function of its name and the video's id, on every machine. The result for a
frame does not depend, bit for bit, on the other frames of its batch.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stage1_autoencoder.augmentation import GRAY_WEIGHTS, ColorFactors, adjust_colors

# The jitter of the official training on CLEVRER: factors, and a fraction of the color circle.
BRIGHTNESS = (0.9, 1.1)
CONTRAST = (0.9, 1.1)
SATURATION = (0.9, 1.1)
HUE = (-0.25, 0.25)


@dataclass(frozen=True)
class View:
    """A parsed name: mirrored or not, and the number of the color jitter (0: none)."""

    flip: bool = False
    jitter: int = 0


@dataclass(frozen=True)
class ViewTransform:
    """The transform of a view for all frames of one video.

    Attributes:
        flip: mirror left to right.
        brightness, contrast, saturation: factors, at least 0; 1 changes nothing.
        hue: turns of the color circle; 0 changes nothing, 1/3 turns red into green.
    """

    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0

    @property
    def changes_color(self) -> bool:
        """Whether the transform is more than a flip."""
        return (self.brightness, self.contrast, self.saturation, self.hue) != (1.0, 1.0, 1.0, 0.0)


def parse_view(name: str) -> View:
    """Parse the name of a view: identity, hflip, or jitter-k with k = 1, 2, ...

    Raises:
        ValueError: another name.
    """
    if name == "identity":
        return View()
    if name == "hflip":
        return View(flip=True)
    if match := re.fullmatch(r"jitter-([1-9][0-9]*)", name):
        return View(jitter=int(match[1]))
    raise ValueError(f"{name!r} is not a view: expected identity, hflip, or jitter-1, jitter-2, ...")


def view_transform(view: str, video_id: str) -> ViewTransform:
    """The transform of a view for a video. Jitters are drawn from sha256 of the view's name and the video's id.

    Raises:
        ValueError: no such view.
    """
    parsed = parse_view(view)
    if not parsed.jitter:
        return ViewTransform(flip=parsed.flip)
    # No view's name contains a zero byte, so keys are unique. File names in other encodings contain surrogates.
    digest = hashlib.sha256(f"{view}\0{video_id}".encode(errors="surrogatepass")).digest()
    # From each 8 of the 32 bytes, a fraction of 53 bits, which a float represents exactly.
    uniform = [(int.from_bytes(digest[at : at + 8], "big") >> 11) / 2**53 for at in range(0, 32, 8)]
    brightness, contrast, saturation, hue = (
        low + (high - low) * share
        for share, (low, high) in zip(uniform, (BRIGHTNESS, CONTRAST, SATURATION, HUE), strict=True)
    )
    return ViewTransform(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)


def views_description(views: Sequence[str]) -> dict[str, Any]:
    """Describe the definition of the views, for the store's attributes.

    Stores with equal views, descriptions, videos and autoencoders have equal latents.

    Returns:
        JSON values; empty without jitters, because the other names are unambiguous.
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
            "grey_weights": list(GRAY_WEIGHTS),
            "draws": "uniform, constant over a video: 4 x 64 bits of sha256(view, zero byte, video id)",
        }
    }


def apply_views(images: Tensor, transforms: Sequence[ViewTransform]) -> Tensor:
    """Apply one transform per frame: flip, brightness, contrast, saturation, hue, in this order; see `adjust_colors`.

    Args:
        images: [b, 3, h, w] float in [-1, 1].
        transforms: [b].
    Returns:
        [b, 3, h, w] in [-1, 1], in the images' dtype. Without a change of color, pixels are preserved exactly.
    Raises:
        ValueError: a wrong shape, or a wrong number of transforms.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(transforms):
        raise ValueError(
            f"images of shape {list(images.shape)} for {len(transforms)} transforms: expected [b, 3, h, w] for b"
        )

    def column(values: list[bool] | list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=images.device).view(-1, 1, 1, 1)

    if any(transform.flip for transform in transforms):
        flip = column([transform.flip for transform in transforms], torch.bool)
        images = torch.where(flip, images.flip(-1), images)
    if not any(transform.changes_color for transform in transforms):
        return images

    dtype = torch.promote_types(images.dtype, torch.float32)
    names = ("brightness", "contrast", "saturation", "hue")
    factors = ColorFactors(*(column([getattr(t, name) for t in transforms], dtype) for name in names))
    colored = column([transform.changes_color for transform in transforms], torch.bool)
    return torch.where(colored, adjust_colors(images, factors), images)
