"""LPIPS, version 0.1 on VGG16 (Zhang et al. 2018): a perceptual distance of images, from the features of a network.

The linear heads (7 kB, BSD-2-Clause) are in weights/; the trunk is torchvision's file of VGG16.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

HEADS_FILE = Path(__file__).parent / "weights" / "lpips_vgg_heads.safetensors"
# Channels of VGG16's convolutions, one row per stage between poolings; features are compared at the end of each row.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Normalization of images in [-1, 1] by ImageNet's mean and deviation, which the public weights expect.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
SMALLEST_SIDE = 2 ** (len(STAGES) - 1)
Stages = Sequence[Sequence[int]]
_NORM_FLOOR = 1e-10


class FeatureDistance(nn.Module):
    """A distance of images with fixed weights, always in evaluation mode: of the features after some layers of a trunk.

    Gradients flow to the images. Under autocast the convolutions run in its dtype, all else in float32.

    Attributes:
        smallest_side: of images, in pixels.
        channels_last: the layout of images on a CPU; on a GPU it always is.
        features: the trunk, [b, 3, h, w] normalized images in.
        ends: numbers of the layers whose outputs are compared.
    """

    smallest_side: ClassVar[int]
    channels_last: ClassVar[bool] = False
    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        features: nn.Sequential,
        ends: Sequence[int],
        trunk: Mapping[str, Tensor],
        heads: Mapping[str, Tensor],
        names: tuple[str, str],
    ) -> None:
        """Load the weights.

        Args:
            features: on the meta device.
            trunk: the tensors of `features`, their names beginning with `features.`.
            heads: `lin<i>.model.1.weight` [1, c, 1, 1] of each end: weights of the channels.
            names: of trunk and heads, for messages.
        Raises:
            ValueError: missing, unexpected or misshapen tensors, by name.
        """
        super().__init__()
        self.features, self.ends = features, ends
        convolutions = [[layer for layer in features[: end + 1] if isinstance(layer, nn.Conv2d)] for end in ends]
        widths = [layers[-1].out_channels for layers in convolutions]
        self.heads = nn.ParameterList(torch.empty(width, device="meta") for width in widths)
        shapes = {f"features.{name}": tensor.shape for name, tensor in features.state_dict().items()}
        _check(names[0], shapes, trunk)
        _check(names[1], {f"lin{i}.model.1.weight": (1, width, 1, 1) for i, width in enumerate(widths)}, heads)
        state = {name: tensor.float() for name, tensor in trunk.items()}
        state |= {f"heads.{i}": heads[f"lin{i}.model.1.weight"].float().flatten() for i in range(len(widths))}
        # Copies: the caller may change its tensors.
        self.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor, truth: Tensor) -> Tensor:
        """The distance of each image from its truth.

        Args:
            images, truth: [b, 3, h, w] float in [-1, 1] (not checked), sides of `smallest_side` pixels or more.
        Returns:
            [b] float32 (float64 in a float64 network), >= 0; 0 for equal images.
        Raises:
            ValueError: other shapes, integers, or images that are too small.
        """
        return self.per_layer(images, truth).sum(0)

    def per_layer(self, images: Tensor, truth: Tensor) -> Tensor:
        """The contributions of the ends to the distance, [5, b]; arguments and errors as for `forward`."""
        self._check_images(images, truth)
        ours = self.maps(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and truth.requires_grad):
            theirs = self.maps(truth)
        return self.compare(ours, theirs)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Features at each end: [b, c, y, x], of length 1 over channels, of images as for `forward`."""
        x = (images.to(torch.promote_types(images.dtype, self.shift.dtype)) - self.shift) / self.scale
        if x.is_cuda or self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        found = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.ends:
                with torch.autocast(x.device.type, enabled=False):
                    found.append(normalize_channels(x))
        return found

    def compare(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        """The contributions [5, b] of the ends to the distance, of `maps` of images and of their truth."""
        with torch.autocast(ours[0].device.type, enabled=False):
            pairs = zip(ours, theirs, self.heads, strict=True)
            # The head is linear, so it may follow the mean over positions, where it is cheap.
            return torch.stack([(a - b).square().mean((2, 3)) @ head for a, b, head in pairs])

    def _check_images(self, images: Tensor, truth: Tensor) -> None:
        if images.shape != truth.shape or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"LPIPS compares two batches [b, 3, h, w] of equal shape, not {list(images.shape)} with "
                f"{list(truth.shape)}"
            )
        if not (images.is_floating_point() and truth.is_floating_point()):
            raise ValueError(
                f"LPIPS compares floats in [-1, 1], not {images.dtype} with {truth.dtype}: convert uint8 with "
                "x / 127.5 - 1"
            )
        if min(images.shape[2:]) < self.smallest_side:
            raise ValueError(
                f"LPIPS halves images several times; {images.shape[2]}x{images.shape[3]} pixels are too few: both "
                f"sides must be at least {self.smallest_side}"
            )


class LPIPS(FeatureDistance):
    """LPIPS on VGG16; compared are the outputs of ReLU 1_2, 2_2, 3_3, 4_3 and 5_3."""

    smallest_side = SMALLEST_SIDE

    def __init__(
        self, trunk: Mapping[str, Tensor], heads: Mapping[str, Tensor] | None = None, stages: Stages = STAGES
    ) -> None:
        """Load the weights.

        Args:
            trunk: `features.<i>.weight` and `.bias` with the names of torchvision's VGG16; `classifier.*` is ignored.
            heads: `lin<i>.model.1.weight` [1, c, 1, 1] of the five stages, with the names of the public `vgg.pth`;
                None: the public ones, which are shipped.
            stages: channels, of VGG16 or of a smaller network of that kind.
        Raises:
            ValueError: missing, unexpected or misshapen tensors, by name.
        """
        with torch.device("meta"):  # all tensors are given
            features, ends = vgg16(stages)
        trunk = {name: tensor for name, tensor in trunk.items() if not name.startswith("classifier.")}
        heads = load_file(HEADS_FILE) if heads is None else heads
        names = ("the convolutions of VGG16", "the heads of LPIPS")
        super().__init__(features, ends, trunk, heads, names)


def vgg16(stages: Stages = STAGES) -> tuple[nn.Sequential, list[int]]:
    """VGG16 up to ReLU 5_3, numbered like torchvision's, and the numbers of the layers that are compared."""
    layers: list[nn.Module] = []
    ends, channels = [], 3
    for stage in stages:
        if layers:
            layers.append(nn.MaxPool2d(2))
        for width in stage:
            # Not in place: outputs are compared, or needed by autograd.
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        ends.append(len(layers) - 1)
    return nn.Sequential(*layers), ends


def normalize_channels(features: Tensor) -> Tensor:
    """Scale the vectors over channels of [b, c, h, w] to length 1 (zeros stay zeros), in float32 at least.

    The public code takes the root of the sum of squares, whose gradient is NaN if that sum is 0: for zeros, which a
    ReLU hides, and if small squares underflow, which nothing hides. The gradient of `vector_norm` is 0 there.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + _NORM_FLOOR)


def _check(what: str, shapes: Mapping[str, Sequence[int]], found: Mapping[str, Tensor]) -> None:
    problems = {
        "missing": [name for name in shapes if name not in found],
        "unexpected": [name for name in found if name not in shapes],
        "of a wrong shape": [
            f"{name} {list(found[name].shape)} instead of {list(shape)}"
            for name, shape in shapes.items()
            if name in found and tuple(found[name].shape) != tuple(shape)
        ],
    }
    parts = [
        f"{problem}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for problem, names in problems.items()
        if names
    ]
    if parts:
        raise ValueError(f"not {what}; " + "; ".join(parts))
