"""A small decoder that imitates an autoencoder's own, as TAESD (Bohan 2023) imitates that of Stable Diffusion.

No norm and no attention, and nothing at full resolution: the last convolution makes blocks of 2x2 pixels.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stage1_autoencoder.config import DecoderModelConfig, VQGANConfig, VQVAEConfig

PIXEL_CHANNELS = 3


class FastDecoder(nn.Module):
    """Quantized latents -> images: residual blocks at each resolution from the latents' to half of the image's."""

    def __init__(self, config: DecoderModelConfig, autoencoder: VQGANConfig | VQVAEConfig) -> None:
        """Build it with random weights.

        Args:
            config: sizes; those that are null follow from the autoencoder's.
            autoencoder: whose latents it decodes.
        """
        super().__init__()
        self.config = config
        widths = config.widths(autoencoder)
        self.conv_in = _convolution(autoencoder.latent_channels, widths[0])
        self.context = nn.Conv2d(widths[0], widths[0], 1)
        inside = (*widths[:-1], widths[-1] // 2)  # at the highest resolution a layer costs most
        self.levels = nn.ModuleList(
            nn.Sequential(*(_Block(*both) for _ in range(config.blocks))) for both in zip(widths, inside, strict=True)
        )
        self.upsamplings = nn.ModuleList(_convolution(*both) for both in itertools.pairwise(widths))
        self.block = autoencoder.downsampling // 2 ** (len(widths) - 1)
        self.conv_out = _convolution(widths[-1], PIXEL_CHANNELS * self.block**2)

    @property
    def parameter_count(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, quantized: Tensor) -> Tensor:
        """Map the vectors of codes [b, c, h, w] to images [b, 3, h f, w f], about [-1, 1], not clamped."""
        x = F.relu(self.conv_in(quantized.contiguous(memory_format=torch.channels_last)))
        # The autoencoder's norms see the whole image: so do brightness and contrast here.
        x = self.levels[0](F.relu(x + self.context(x.mean((2, 3), keepdim=True))))
        for upsampling, level in zip(self.upsamplings, self.levels[1:], strict=True):
            x = level(F.relu(upsampling(F.interpolate(x, scale_factor=2.0, mode="nearest"))))
        return F.pixel_shuffle(self.conv_out(x), self.block)

    def boundary_parameters(self) -> list[nn.Parameter]:
        """First and last layer, which an optimizer for hidden matrices skips."""
        return [*self.conv_in.parameters(), *self.conv_out.parameters()]


class _Block(nn.Module):
    """Convolution, ReLU, convolution, and a skip around them, then ReLU."""

    def __init__(self, width: int, inside: int) -> None:
        super().__init__()
        self.conv1 = _convolution(width, inside)
        self.conv2 = _convolution(inside, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


def _convolution(channels: int, features: int) -> nn.Conv2d:
    return nn.Conv2d(channels, features, 3, padding=1)
