"""RIVER's custom VQ-VAE, of its training on CLEVRER, parameter for parameter.

Module names are those of the public checkpoints, so that `load_state_dict` accepts them. There is no convolution
between encoder and quantizer: the encoder's output is the latents.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.config import VQVAEConfig
from stage1_autoencoder.quantizer import VectorQuantizer

SLOPE = 0.2  # of every LeakyReLU


def _norm(channels: int, config: VQVAEConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """conv - pool - norm - leaky ReLU - conv - norm, plus the input (convolved, pooled, normed if shapes change)."""

    def __init__(self, in_channels: int, out_channels: int, config: VQVAEConfig, pool: int = 1) -> None:
        super().__init__()
        self.pool = pool
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn1 = _norm(out_channels, config)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = _norm(out_channels, config)
        if in_channels != out_channels or pool > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                nn.AvgPool2d(pool) if pool > 1 else nn.Identity(),
                _norm(out_channels, config),
            )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x)
        if self.pool > 1:
            h = F.avg_pool2d(h, self.pool)
        h = self.bn2(self.conv2(F.leaky_relu(self.bn1(h), SLOPE)))
        return F.leaky_relu(h + (self.downsample(x) if hasattr(self, "downsample") else x), SLOPE)


class UpBlock(nn.Module):
    """Double the side by nearest neighbours - convolution - BatchNorm - leaky ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))), SLOPE)


def _add_middle(module: nn.Module, channels: int, config: VQVAEConfig) -> None:
    """Block, attention, block at the lowest resolution, as attributes of `module` like in the checkpoints."""
    module.pre_attn_residual = ResidualBlock(channels, channels, config)
    module.attn_norm = _norm(channels, config)
    module.attn = nn.MultiheadAttention(channels, 1, batch_first=True)
    module.post_attn_residual = ResidualBlock(channels, channels, config)


def _run_middle(module: nn.Module, x: Tensor) -> Tensor:
    x = module.pre_attn_residual(x)
    tokens = rearrange(module.attn_norm(x), "b c h w -> b (h w) c")
    attended, _ = module.attn(tokens, tokens, tokens, need_weights=False)
    return module.post_attn_residual(x + rearrange(attended, "b (h w) c -> b c h w", h=x.shape[2]))


class Encoder(nn.Module):
    """Images [b, 3, h, w] to [b, latent_channels, h / f, w / f]."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.residuals = nn.ModuleList(
            ResidualBlock(widths[i], widths[i + 1], config, pool=2) for i in range(config.levels)
        )
        _add_middle(self, widths[-1], config)
        self.out_norm = _norm(widths[-1], config)
        self.out_conv = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for block in self.residuals:
            x = block(x)
        return self.out_conv(F.silu(self.out_norm(_run_middle(self, x))))


class Decoder(nn.Module):
    """Latents [b, latent_channels, h, w] to the input of the last convolution, [b, channels, h f, w f]."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        _add_middle(self, widths[0], config)
        self.residuals = nn.ModuleList(
            nn.Sequential(ResidualBlock(widths[i], widths[i + 1], config), UpBlock(widths[i + 1]))
            for i in range(config.levels)
        )
        self.out_norm = _norm(widths[-1], config)
        self.out_conv = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = _run_middle(self, self.conv_in(latents))
        for level in self.residuals:
            x = level(x)
        return F.silu(self.out_norm(x))


class VQVAE(Autoencoder):
    """The VQ-VAE. Images are the output of a tanh, so they lie in [-1, 1]."""

    config: VQVAEConfig

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantizer = VectorQuantizer(config.codes, config.latent_channels, normalize=config.normalize_codes)

    @property
    def last_layer(self) -> nn.Conv2d:
        return self.decoder.out_conv

    def boundary_parameters(self) -> list[nn.Parameter]:
        layers = (self.encoder.conv_in, self.encoder.out_conv, self.decoder.conv_in, self.decoder.out_conv)
        return [p for layer in (*layers, self.quantizer) for p in layer.parameters()]

    def to_latents(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def to_features(self, quantized: Tensor) -> Tensor:
        return self.decoder(quantized)

    def to_images(self, features: Tensor) -> Tensor:
        return torch.tanh(self.decoder.out_conv(features))


def from_official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the official parameters to ours; only the codebook differs."""
    official = "vector_quantizer."
    return {
        f"quantizer.{key.removeprefix(official)}" if key.startswith(official) else key: value
        for key, value in state.items()
    }
