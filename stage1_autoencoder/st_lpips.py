"""ST-LPIPS (Ghildyal and Liu, "Shift-tolerant perceptual similarity metric", ECCV 2022) on an anti-aliased AlexNet.

All weights are those of the package stlpips_pytorch (BSD-2-Clause). Its code is not imported: it needs torchvision.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stage1_autoencoder.lpips import FeatureDistance

# Layers whose outputs are compared, the five ReLUs, and their channels.
ENDS, WIDTHS = (2, 6, 10, 12, 14), (64, 192, 384, 256, 256)


class STLPIPS(FeatureDistance):
    """Shift-tolerant LPIPS on AlexNet: 2.5 M parameters."""

    smallest_side = 21  # the last blur mirrors two pixels, and needs three
    channels_last = True  # max-pooling on a CPU takes an eighth of the time

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Load the weights.

        Args:
            weights: the content of the package's `alex_shift_tolerant.pth`.
        Raises:
            ValueError: missing, unexpected or misshapen tensors, by name.
        """
        with torch.device("meta"):  # all tensors are given
            features = shift_tolerant_alexnet()
        trunk, heads = {}, {}
        for name, tensor in weights.items():
            kind, _, rest = name.partition(".")
            if kind == "net":  # net.slice<k>.<layer>.<weight, bias or filt>
                trunk[f"features.{rest.partition('.')[2]}"] = tensor
            elif kind != "scaling_layer":
                heads[name] = tensor
        trunk = {name: tensor for name, tensor in trunk.items() if not name.endswith(".filt")}  # of Blur, a constant
        names = ("the convolutions of the shift-tolerant AlexNet", "the heads of ST-LPIPS")
        super().__init__(features, ENDS, trunk, heads, names)


class Blur(nn.Module):
    """Halve maps without aliasing: binomial weights 1 2 1 along both axes, every second pixel, two mirrored at borders.

    Zhang, "Making convolutional networks shift-invariant again", ICML 2019.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] to [b, c, (h + 1) // 2 + 1, (w + 1) // 2 + 1]; sides of 3 or more."""
        line = x.new_full((3,), 0.25)  # filled there: a copy of a list would block the host
        line[1] = 0.5
        weights = (line[:, None] * line).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), weights, stride=2, groups=x.shape[1])


def shift_tolerant_alexnet() -> nn.Sequential:
    """AlexNet's convolutions, numbered as in the public file: strides are blurs, the first of them before its ReLU."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, padding=2), Blur(), nn.ReLU(),
        nn.MaxPool2d(3, stride=1), Blur(), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(3, stride=1), Blur(), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip
