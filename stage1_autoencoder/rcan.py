"""The refiner: an RCAN (Zhang et al. 2018) without up-sampling, of the previous frame and the decoded one.

Parameters have the names of the official code, so that `load_state_dict` accepts its weights.
"""

import torch
from torch import Tensor, nn

from stage1_autoencoder.config import RefinerModelConfig

PIXEL_CHANNELS = 3


class RCAN(nn.Module):
    """Previous frame and decoded frame -> a better frame. The output is direct: the input is not added to it."""

    def __init__(self, config: RefinerModelConfig) -> None:
        super().__init__()
        self.config = config
        features = config.features
        self.head = _convolution(2 * PIXEL_CHANNELS, features)
        groups = [_Group(config) for _ in range(config.groups)]
        self.body = nn.Sequential(*groups, _convolution(features, features))
        tail = _convolution(features, PIXEL_CHANNELS)
        # As in the official code: a list of layers with the tanh (`tail.0.weight`), else the layer itself.
        self.tail = nn.Sequential(tail, nn.Tanh()) if config.tanh else tail

    @property
    def parameter_count(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, previous: Tensor, decoded: Tensor) -> Tensor:
        """Refine a batch of frames.

        Args:
            previous: [b, 3, h, w] float, about [-1, 1]: the frame before, real or refined.
            decoded: [b, 3, h, w] float, about [-1, 1]: the output of the decoder, not clamped.
        Returns:
            [b, 3, h, w] float, not clamped; in (-1, 1) with `tanh`.
        Raises:
            ValueError: other shapes.
        """
        if previous.shape != decoded.shape or decoded.ndim != 4 or decoded.shape[1] != PIXEL_CHANNELS:
            raise ValueError(
                f"previous and decoded must both be [b, 3, h, w], not {list(previous.shape)} and {list(decoded.shape)}"
            )
        features = self.head(torch.cat([previous, decoded], 1))
        return self.tail(features + self.body(features))

    def boundary_parameters(self) -> list[nn.Parameter]:
        """First and last layer and the channel attention: an optimizer for hidden matrices skips them."""
        attention = [m for m in self.modules() if isinstance(m, _ChannelAttention)]
        return [parameter for part in (self.head, self.tail, *attention) for parameter in part.parameters()]

    @torch.no_grad()
    def start_as_copy(self) -> None:
        """Set the weights so that the output is `decoded` (through the tanh, if any), and all layers can still learn.

        The first three features carry the decoded frame around the body, whose last convolution starts at zero.
        """
        tail = self.tail[0] if self.config.tanh else self.tail
        for parameter in (*self.body[-1].parameters(), *tail.parameters()):
            parameter.zero_()
        for color in range(PIXEL_CHANNELS):
            self.head.weight[color] = 0
            self.head.bias[color] = 0
            self.head.weight[color, PIXEL_CHANNELS + color, 1, 1] = 1
            tail.weight[color, color, 1, 1] = 1


class _Group(nn.Module):
    """Blocks, a convolution, and a skip around them."""

    def __init__(self, config: RefinerModelConfig) -> None:
        super().__init__()
        blocks = [_Block(config) for _ in range(config.blocks)]
        self.body = nn.Sequential(*blocks, _convolution(config.features, config.features))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class _Block(nn.Module):
    """Convolution, ReLU, convolution, channel attention, and a skip around them."""

    def __init__(self, config: RefinerModelConfig) -> None:
        super().__init__()
        features = config.features
        self.body = nn.Sequential(
            _convolution(features, features),
            nn.ReLU(),
            _convolution(features, features),
            _ChannelAttention(features, features // config.reduction),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class _ChannelAttention(nn.Module):
    """Multiplies each channel by a weight in (0, 1), a function of the means of all channels."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.conv_du = nn.Sequential(nn.Conv2d(features, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, features, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv_du(x.mean((2, 3), keepdim=True)))


def _convolution(channels: int, features: int) -> nn.Conv2d:
    return nn.Conv2d(channels, features, 3, padding=1)
