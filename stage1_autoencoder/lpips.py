"""LPIPS, version 0.1 on VGG16 (Zhang et al. 2018): a perceptual distance of images, from the features of a network.

The linear heads (7 kB, BSD-2-Clause) are in weights/; the trunk is torchvision's file of VGG16.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

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


class LPIPS(nn.Module):
    """A distance of images with fixed weights, always in evaluation mode.

    Gradients flow to the images. Under autocast the convolutions run in its dtype, all else in float32.
    """

    shift: Tensor
    scale: Tensor

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
        super().__init__()
        with torch.device("meta"):  # all tensors are given
            self.features, self.ends = vgg16(stages)
        self.heads = nn.ParameterList(torch.empty(stage[-1]) for stage in stages)
        trunk = {name: tensor for name, tensor in trunk.items() if not name.startswith("classifier.")}
        heads = load_file(HEADS_FILE) if heads is None else heads
        names = [f"lin{i}.model.1.weight" for i in range(len(stages))]
        shapes = {f"features.{name}": tensor.shape for name, tensor in self.features.state_dict().items()}
        _check("the convolutions of VGG16", shapes, trunk)
        _check("the heads of LPIPS", {n: (1, s[-1], 1, 1) for n, s in zip(names, stages, strict=True)}, heads)
        state = {name: tensor.float() for name, tensor in trunk.items()}
        state |= {f"heads.{i}": heads[name].float().flatten() for i, name in enumerate(names)}
        # Copies: the caller may change its tensors.
        self.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor, truth: Tensor) -> Tensor:
        """The distance of each image from its truth.

        Args:
            images, truth: [b, 3, h, w] float in [-1, 1] (not checked), sides of 16 pixels or more.
        Returns:
            [b] float32 (float64 in a float64 network), >= 0; 0 for equal images.
        Raises:
            ValueError: other shapes, integers, or images that are too small.
        """
        return self.per_layer(images, truth).sum(0)

    def per_layer(self, images: Tensor, truth: Tensor) -> Tensor:
        """The contributions of the five stages to the distance, [5, b]; arguments and errors as for `forward`."""
        _check_images(images, truth)
        ours = self._stages(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and truth.requires_grad):
            theirs = self._stages(truth)
        with torch.autocast(images.device.type, enabled=False):
            pairs = zip(ours, theirs, self.heads, strict=True)
            # The head is linear, so it may follow the mean over positions, where it is cheap.
            return torch.stack(
                [(normalize_channels(a) - normalize_channels(b)).square().mean((2, 3)) @ head for a, b, head in pairs]
            )

    def _stages(self, images: Tensor) -> list[Tensor]:
        """Outputs of ReLU 1_2, 2_2, 3_3, 4_3 and 5_3."""
        x = (images.to(torch.promote_types(images.dtype, self.shift.dtype)) - self.shift) / self.scale
        if x.is_cuda:
            x = x.contiguous(memory_format=torch.channels_last)
        found = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.ends:
                found.append(x)
        return found


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


def _check_images(images: Tensor, truth: Tensor) -> None:
    if images.shape != truth.shape or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"LPIPS compares two batches [b, 3, h, w] of equal shape, not {list(images.shape)} with {list(truth.shape)}"
        )
    if not (images.is_floating_point() and truth.is_floating_point()):
        raise ValueError(
            f"LPIPS compares floats in [-1, 1], not {images.dtype} with {truth.dtype}: convert uint8 with x / 127.5 - 1"
        )
    if min(images.shape[2:]) < SMALLEST_SIDE:
        raise ValueError(
            f"LPIPS halves images {len(STAGES) - 1} times; {images.shape[2]}x{images.shape[3]} pixels are too few: "
            f"both sides must be at least {SMALLEST_SIDE}"
        )
