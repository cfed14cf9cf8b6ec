"""The VQGAN of taming-transformers, parameter for parameter (Esser et al. 2021).

Module names are those of the public checkpoints, so that `load_state_dict` accepts them.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.config import VQGANConfig
from stage1_autoencoder.quantizer import VectorQuantizer


def _swish(x: Tensor) -> Tensor:
    """x * sigmoid(x), in the memory of x unless gradients are enabled: x must not be used again."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def _plus(x: Tensor, change: Tensor) -> Tensor:
    """x + change, in the memory of `change` unless gradients are enabled: `change` must not be used again."""
    return x + change if torch.is_grad_enabled() or x.dtype != change.dtype else change.add_(x)


def _norm(channels: int, config: VQGANConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """norm - swish - conv - norm - swish - dropout - conv, plus the input (1x1 convolution where channels change)."""

    def __init__(self, in_channels: int, out_channels: int, config: VQGANConfig) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, config)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(_swish(self.norm1(x)))
        h = self.conv2(self.dropout(_swish(self.norm2(h))))
        return _plus(self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x, h)


class AttnBlock(nn.Module):
    """Single-head self-attention over positions with 1x1 convolutions: x + proj_out(softmax(q^T k / sqrt(c)) v)."""

    def __init__(self, channels: int, config: VQGANConfig) -> None:
        super().__init__()
        self.norm = _norm(channels, config)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (rearrange(layer(normed), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return _plus(x, self.proj_out(rearrange(attended, "b 1 (h w) c -> b c h w", h=x.shape[2])))


class Downsample(nn.Module):
    """Halve the side: zeros at the right and lower edge only, then a strided convolution without padding."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the side by nearest neighbours, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, config: VQGANConfig) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, config)
        self.attn_1 = AttnBlock(channels, config)
        self.block_2 = ResnetBlock(channels, channels, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


def _level(in_channels: int, out_channels: int, blocks: int, attention: bool, config: VQGANConfig) -> nn.Module:
    """The blocks of one resolution, with taming's names `block.i` and `attn.i`."""
    level = nn.Module()
    level.block = nn.ModuleList(
        ResnetBlock(in_channels if i == 0 else out_channels, out_channels, config) for i in range(blocks)
    )
    level.attn = nn.ModuleList(AttnBlock(out_channels, config) for _ in range(blocks if attention else 0))
    return level


def _run_level(level: nn.Module, x: Tensor) -> Tensor:
    for i, block in enumerate(level.block):
        x = block(x)
        if level.attn:
            x = level.attn[i](x)
    return x


class Encoder(nn.Module):
    """Images [b, 3, h, w] to [b, latent_channels, h / f, w / f]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            # Attention is placed by the configured resolution, not by the size of the input.
            attention = config.resolution // 2**i in config.attention_resolutions
            level = _level(widths[i - 1] if i else config.channels, width, config.blocks, attention, config)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = _Middle(widths[-1], config)
        self.norm_out = _norm(widths[-1], config)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.down:
            x = _run_level(level, x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(_swish(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents [b, latent_channels, h, w] to the input of the last convolution, [b, channels, h f, w f]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        blocks = config.blocks + 1 if config.decoder_blocks is None else config.decoder_blocks
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1], config)
        levels = []
        for i in reversed(range(len(widths))):
            attention = config.resolution // 2**i in config.attention_resolutions
            level = _level(widths[min(i + 1, len(widths) - 1)], widths[i], blocks, attention, config)
            if i > 0:
                level.upsample = Upsample(widths[i])
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)  # as in the checkpoints: up.0 is the full resolution
        self.norm_out = _norm(widths[0], config)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = _run_level(level, x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return _swish(self.norm_out(x))


class VQGAN(Autoencoder):
    """Taming's VQGAN, with a 1x1 convolution on each side of the quantizer."""

    config: VQGANConfig

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantizer = VectorQuantizer(config.codes, config.latent_channels, normalize=config.normalize_codes)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    @property
    def last_layer(self) -> nn.Conv2d:
        return self.decoder.conv_out

    def boundary_parameters(self) -> list[nn.Parameter]:
        layers = (self.encoder.conv_in, self.encoder.conv_out, self.decoder.conv_in, self.decoder.conv_out)
        return [
            p for layer in (*layers, self.quant_conv, self.post_quant_conv, self.quantizer) for p in layer.parameters()
        ]

    def to_latents(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(images))

    def to_features(self, quantized: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(quantized))

    def to_images(self, features: Tensor) -> Tensor:
        return self.decoder.conv_out(features)


def from_official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename taming's parameters to ours; only the codebook differs (`quantize` is a method here)."""
    return {
        key.replace("quantize.", "quantizer.", 1) if key.startswith("quantize.") else key: v for key, v in state.items()
    }
