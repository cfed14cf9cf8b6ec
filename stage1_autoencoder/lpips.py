"""LPIPS, version 0.1 on VGG16 (Zhang et al. 2018): how different two images look, as a network's features tell.

The 7 kB of its linear heads are shipped (BSD-2-Clause, see weights/); the trunk is torchvision's file of VGG16.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

HEADS_FILE = Path(__file__).parent / "weights" / "lpips_vgg_heads.safetensors"
# Channels of VGG16's convolutions, a row for what lies between two poolings; each row's end is compared.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# What images in [-1, 1] are brought to: ImageNet's mean and deviation, as the public weights want them.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
SMALLEST_SIDE = 2 ** (len(STAGES) - 1)
_NORM_FLOOR = 1e-10


class LPIPS(nn.Module):
    """A distance of images with fixed weights: always in evaluation mode, and trained by nobody.

    Gradients flow to the images. Under autocast the convolutions run in its type, all else in float32.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, trunk: Mapping[str, Tensor], heads: Mapping[str, Tensor] | None = None) -> None:
        """Put weights together.

        Args:
            trunk: `features.<i>.weight` and `.bias` as torchvision's VGG16 names them; `classifier.*` is not looked at.
            heads: `lin<i>.model.1.weight` [1, c, 1, 1] of the five stages, as the public `vgg.pth` has them; None: the
                shipped ones, which are the same.
        Raises:
            ValueError: missing, unexpected or misshapen tensors, by name.
        """
        super().__init__()
        with torch.device("meta"):  # every tensor comes from outside
            self.features, self.ends = _vgg16()
        self.heads = nn.ParameterList(torch.empty(stage[-1]) for stage in STAGES)
        trunk = {name: tensor for name, tensor in trunk.items() if not name.startswith("classifier.")}
        heads = load_file(HEADS_FILE) if heads is None else heads
        names = [f"lin{i}.model.1.weight" for i in range(len(STAGES))]
        shapes = {f"features.{name}": tensor.shape for name, tensor in self.features.state_dict().items()}
        _check("the convolutions of VGG16", shapes, trunk)
        _check("the heads of LPIPS", {n: (1, s[-1], 1, 1) for n, s in zip(names, STAGES, strict=True)}, heads)
        state = {name: tensor.float() for name, tensor in trunk.items()}
        state |= {f"heads.{i}": heads[name].float().flatten() for i, name in enumerate(names)}
        # Copies, so that the caller's tensors stay the caller's.
        self.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in evaluation mode, whatever is asked of the module around."""
        return super().train(False)

    def forward(self, images: Tensor, truth: Tensor) -> Tensor:
        """The distance of each image from its truth.

        Args:
            images, truth: [b, 3, h, w] float in [-1, 1] (which is not looked at), sides of 16 pixels or more.
        Returns:
            [b] float32 (float64 in a float64 network), >= 0; 0 for equal images.
        Raises:
            ValueError: other shapes, integers, or images that are too small.
        """
        return self.per_layer(images, truth).sum(0)

    def per_layer(self, images: Tensor, truth: Tensor) -> Tensor:
        """What each of the five stages adds to the distance, [5, b]; arguments and errors as for `forward`."""
        _check_images(images, truth)
        ours = self._stages(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and truth.requires_grad):
            theirs = self._stages(truth)
        with torch.autocast(images.device.type, enabled=False):
            pairs = zip(ours, theirs, self.heads, strict=True)
            # The head is linear, so it may come after the mean over positions, where it costs nothing.
            return torch.stack([(_unit(a) - _unit(b)).square().mean((2, 3)) @ head for a, b, head in pairs])

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


def _vgg16() -> tuple[nn.Sequential, list[int]]:
    """VGG16 up to ReLU 5_3, numbered as torchvision does, and the numbers of the layers that are compared."""
    layers: list[nn.Module] = []
    ends, channels = [], 3
    for stage in STAGES:
        if layers:
            layers.append(nn.MaxPool2d(2))
        for width in stage:
            # Not in place: the outputs that are compared stay, and autograd of the others needs what they were.
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        ends.append(len(layers) - 1)
    return nn.Sequential(*layers), ends


def _unit(features: Tensor) -> Tensor:
    """Vectors over channels [b, c, h, w] at length 1, and at 0 where all are 0: in float32 at least.

    The public code takes the root of the sum of squares, whose gradient is NaN where that sum is 0: at 0, which a ReLU
    hides, and where small squares vanish, which nothing does. That of `vector_norm` is 0 there.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + _NORM_FLOOR)


def _check(what: str, shapes: Mapping[str, Sequence[int]], found: Mapping[str, Tensor]) -> None:
    troubles = {
        "missing": [name for name in shapes if name not in found],
        "unexpected": [name for name in found if name not in shapes],
        "of another shape": [
            f"{name} {list(found[name].shape)} in place of {list(shape)}"
            for name, shape in shapes.items()
            if name in found and tuple(found[name].shape) != tuple(shape)
        ],
    }
    told = [
        f"{trouble}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for trouble, names in troubles.items()
        if names
    ]
    if told:
        raise ValueError(f"not {what}; " + "; ".join(told))


def _check_images(images: Tensor, truth: Tensor) -> None:
    if images.shape != truth.shape or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"LPIPS compares images [b, 3, h, w] with as many of one size, not {list(images.shape)} with "
            f"{list(truth.shape)}"
        )
    if not (images.is_floating_point() and truth.is_floating_point()):
        raise ValueError(
            f"LPIPS compares floats in [-1, 1], not {images.dtype} with {truth.dtype}: for uint8 take x / 127.5 - 1"
        )
    if min(images.shape[2:]) < SMALLEST_SIDE:
        raise ValueError(
            f"LPIPS halves images {len(STAGES) - 1} times, and {images.shape[2]}x{images.shape[3]} pixels are too few: "
            f"both sides must be {SMALLEST_SIDE} or more"
        )
