"""The vector field network: a U-shaped vision transformer over the tokens of three or more latent frames.

Its parameters carry the official names, so that official checkpoints load as they are.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stage2_flow.config import VectorFieldConfig
from stage2_flow.linear import Linear, linear

POSITIONS = 512  # rows and columns that the position tables hold, as in the official code
DISTANCE_FEATURES = 256  # hidden features of the distance code
FEED_FORWARD = 4  # the feed-forward's width as a multiple of the token's
TIME_SCALE = 200  # t in [0, 1] is scaled to [0, 200] before its sinusoids
LONGEST_PERIOD = 10_000  # of the time sinusoids, divided by 2 pi
QK_NORM_EPS = 1e-6


def time_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoidal code of the time, cosines first, computed in fp32.

    In fp32 because the angle reaches 200 rad, where the spacing of bf16 numbers is 1 rad.

    Args:
        t: [b] float in [0, 1].
        width: features, even.
    Returns:
        [b, width] float32 in [-1, 1].
    """
    half = width // 2
    # frequency_i = exp(-ln(10000) i / (width / 2)), in this order of operations: a relative error of 1e-7 in a
    # frequency is an error of 2e-5 in the code.
    exponents = -math.log(LONGEST_PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = (TIME_SCALE * t.float())[:, None] * torch.exp(exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class PositionEncoding(nn.Module):
    """Learned two-dimensional position code: the column's half of the features first, then the row's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(POSITIONS, width // 2)
        self.col_embed = nn.Embedding(POSITIONS, width // 2)
        nn.init.uniform_(self.row_embed.weight, -1, 1)
        nn.init.uniform_(self.col_embed.weight, -1, 1)

    def forward(self, height: int, width: int) -> Tensor:
        """[height * width, features] codes of a map's positions, row by row; height and width at most 512."""
        # Slices instead of look-ups: their gradient needs no scatter.
        columns = self.col_embed.weight[None, :width].expand(height, -1, -1)
        rows = self.row_embed.weight[:height, None].expand(-1, width, -1)
        return rearrange([columns, rows], "halves y x d -> (y x) (halves d)")


def attention(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, with dropout on the weights.

    Args:
        query, key, value: [b, heads, n, d].
        dropout: probability that a weight is dropped.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # With bf16 and some dozens of tokens the fused CPU kernel and its gradient take seven times as long.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
        return F.dropout(weights, dropout) @ value if dropout else weights @ value
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)


def rms_normalize(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32 (float64 from float64).

    Args:
        x: [..., d] float.
        norm: eps and weight, over d features.
    Returns:
        Like x, in its dtype.
    """
    # Not norm(x): under autocast x is bf16 and the weight fp32, and that combination has no fused kernel.
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(dtype), norm.normalized_shape, norm.weight.to(dtype), norm.eps).to(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection, initialized like `nn.MultiheadAttention`.

    With `qk_norm` the queries and keys of each head have a root mean square of 1, times a learned scale per feature, so
    attention logits cannot grow with the weights (Dehghani et al., ICML 2023, section 3.1; RMSNorm instead of their
    LayerNorm). The paper does not do this.
    """

    def __init__(self, width: int, heads: int, dropout: float, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.q_norm = nn.RMSNorm(width // heads, eps=QK_NORM_EPS) if qk_norm else None
        self.k_norm = nn.RMSNorm(width // heads, eps=QK_NORM_EPS) if qk_norm else None
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x_bnd: Tensor) -> Tensor:
        qkv = linear(x_bnd, self.in_proj_weight, self.in_proj_bias)
        query, key, value = rearrange(qkv, "b n (qkv heads d) -> qkv b heads n d", qkv=3, heads=self.heads).unbind()
        if self.q_norm is not None and self.k_norm is not None:
            query, key = rms_normalize(query, self.q_norm), rms_normalize(key, self.k_norm)
        mixed = attention(query, key, value, dropout=self.dropout if self.training else 0.0)
        return self.out_proj(rearrange(mixed, "b heads n d -> b n (heads d)"))


class TransformerBlock(nn.Module):
    """A pre-norm transformer encoder layer with exact GELU: names, initialization and dropouts as in PyTorch's own."""

    def __init__(self, width: int, heads: int, dropout: float, qk_norm: bool) -> None:
        super().__init__()
        self.dropout = dropout
        self.self_attn = SelfAttention(width, heads, dropout, qk_norm)
        self.linear1 = Linear(width, FEED_FORWARD * width)
        self.linear2 = Linear(FEED_FORWARD * width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x_bnd: Tensor) -> Tensor:
        x_bnd = x_bnd + self._drop(self.self_attn(self.norm1(x_bnd)))
        hidden = self._drop(F.gelu(self.linear1(self.norm2(x_bnd))))
        return x_bnd + self._drop(self.linear2(hidden))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class LocalMixing(nn.Module):
    """x + a depthwise 3x3 convolution of x over the map, which is zero in a fresh network.

    Attention must learn from the position codes which tokens are neighbors; a convolution knows. Source: conditional
    position encodings (Chu et al., ICLR 2023), here before every block.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x_bnd: Tensor, height: int, width: int) -> Tensor:
        """Tokens [b, 1 + height * width, d] to the same; the first, that of the time, has no place in the map."""
        time_token, tokens = x_bnd.split([1, height * width], dim=1)
        mixed = self.conv(rearrange(tokens, "b (h w) d -> b d h w", h=height))
        return torch.cat([time_token, tokens + rearrange(mixed, "b d h w -> b (h w) d")], dim=1)


class VectorField(nn.Module):
    """The velocity of the next frame's latent, given the newest frames (the paper: one) and one earlier frame.

    Source: RIVER (ICCV 2023), section 3.3 and appendix (the network is a U-ViT, Bao et al., CVPR 2023).
    """

    def __init__(self, config: VectorFieldConfig, latent_channels: int) -> None:
        """Build the network with fresh weights.

        Args:
            config: its sizes.
            latent_channels: c of the latents.
        """
        super().__init__()
        self.config = config
        self.latent_channels = latent_channels
        width, frames = config.width, 2 + (config.recent_frames if config.reference else 0)

        def block() -> TransformerBlock:
            return TransformerBlock(width, config.heads, config.dropout, config.qk_norm)

        # The numbers in names are the positions of these layers in the official code's sequences.
        self.position_encoding = PositionEncoding(width)
        inputs = frames * latent_channels
        project_in = nn.Conv2d(inputs, width, 3, padding=1) if config.convolutions else Linear(inputs, width)
        self.project_in = nn.ModuleDict({"1": project_in})
        self.time_projection = nn.Sequential(  # of the distance in time, not of t
            Linear(1, DISTANCE_FEATURES), nn.ReLU(), Linear(DISTANCE_FEATURES, width)
        )
        self.noise_projection = None
        if config.past_noise:
            self.noise_projection = nn.Sequential(
                Linear(1, DISTANCE_FEATURES), nn.ReLU(), Linear(DISTANCE_FEATURES, width)
            )
        self.in_blocks = nn.ModuleList(block() for _ in range(config.depth))
        self.mid_blocks = nn.ModuleList(block() for _ in range(config.mid_depth))
        self.out_blocks = nn.ModuleList(nn.ModuleList([Linear(2 * width, width), block()]) for _ in range(config.depth))
        self.local_mixing = None
        if config.convolutions:
            self.local_mixing = nn.ModuleList(LocalMixing(width) for _ in range(2 * config.depth + config.mid_depth))
        norm = {"2": nn.LayerNorm(width)} if config.head == "ln" else {"3": nn.BatchNorm2d(width)}
        self.project_out = nn.ModuleDict(
            {"0": Linear(width, width), **norm, "4": nn.Conv2d(width, latent_channels, kernel_size=3, padding=1)}
        )

    @property
    def recent_frames(self) -> int:
        """Number of frames in the reference."""
        return self.config.recent_frames

    @property
    def parameter_count(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for parameter in self.parameters())

    def boundary_parameters(self) -> list[nn.Parameter]:
        """What an optimizer for hidden matrices leaves out: position tables, input, output and depthwise layers."""
        layers = [self.position_encoding, self.project_in, self.time_projection, self.project_out["4"]]
        layers += [layer for layer in (self.noise_projection, self.local_mixing) if layer is not None]
        return [parameter for layer in layers for parameter in layer.parameters()]

    def forward(
        self,
        x_t: Tensor,
        reference: Tensor | None,
        condition: Tensor,
        distance: Tensor,
        t: Tensor,
        noise_level: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the field.

        Args:
            x_t: [b, c, h, w] point of the path at time t; h and w at most 512.
            reference: [b, k c, h, w] final latents of the k = `recent_frames` newest frames, the newest first; ignored
                with `reference: false`.
            condition: [b, c, h, w] final latents of one earlier frame.
            distance: [b] int64 >= 1, frames between condition and newest frame.
            t: [b] float in [0, 1].
            noise_level: [b] float, standard deviation of the noise in reference and condition; None: 0. Ignored with
                `past_noise: 0`.
        Returns:
            [b, c, h, w] velocity.
        """
        tokens = self.embed(x_t, reference, condition, distance, noise_level)
        return self.trunk(tokens, time_embedding(t, self.config.width), *x_t.shape[-2:])

    def embed(
        self,
        x_t: Tensor,
        reference: Tensor | None,
        condition: Tensor,
        distance: Tensor,
        noise_level: Tensor | None = None,
    ) -> Tensor:
        """Project the frames to tokens, and add the codes of position, distance and noise; arguments as in `forward`.

        Returns:
            [b, h * w, features].
        """
        frames = [x_t, reference, condition] if self.config.reference else [x_t, condition]
        tokens = self.project(torch.cat(frames, dim=1), self.project_in["1"])
        tokens = tokens + self.position_encoding(*x_t.shape[-2:]) + self.distance_code(distance)[:, None]
        if self.noise_projection is not None:
            tokens = tokens + self.noise_code(x_t.new_zeros(len(x_t)) if noise_level is None else noise_level)[:, None]
        return tokens

    def project(self, frames: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply the input layer, or one with some of its columns.

        Args:
            frames: [b, n, h, w], the channels of one or more frames.
            layer: with `convolutions` from [b, n, h, w] to [b, features, h, w], else from [b, h * w, n].
        Returns:
            [b, h * w, features].
        """
        if self.config.convolutions:
            return rearrange(layer(frames), "b d h w -> b (h w) d")
        return layer(rearrange(frames, "b n h w -> b (h w) n"))

    def noise_code(self, level: Tensor) -> Tensor:
        """[n] standard deviations of the noise on past frames -> [n, features] codes, in the weights' precision."""
        assert self.noise_projection is not None
        with torch.autocast(level.device.type, enabled=False):
            share = level[:, None] / self.config.past_noise
            return self.noise_projection(share.to(self.noise_projection[0].weight.dtype))

    def distance_code(self, distance: Tensor) -> Tensor:
        """[n] int64 frames between condition and reference, >= 1 -> [n, features] codes, in the weights' precision."""
        with torch.autocast(distance.device.type, enabled=False):  # bf16 would merge neighboring distances
            dtype = self.time_projection[0].weight.dtype
            log_distance = distance.to(torch.promote_types(dtype, torch.float32)).log().to(dtype)
            return self.time_projection(log_distance[:, None])

    def trunk(self, tokens: Tensor, time_token: Tensor, height: int, width: int) -> Tensor:
        """The transformer and the output head.

        Args:
            tokens: [b, height * width, features], see `embed`.
            time_token: [b, features], see `time_embedding`.
        Returns:
            [b, c, height, width] velocity.
        """
        tokens = torch.cat([time_token.to(tokens.dtype)[:, None], tokens], dim=1)
        skips = []
        mixers = iter(self.local_mixing or ())

        def run(block: nn.Module, tokens: Tensor) -> Tensor:
            mixer = next(mixers, None)
            return block(tokens if mixer is None else mixer(tokens, height, width))

        for block in self.in_blocks:
            tokens = run(block, tokens)
            skips.append(tokens)
        for block in self.mid_blocks:
            tokens = run(block, tokens)
        for merge, block in self.out_blocks:
            tokens = run(block, merge(torch.cat([skips.pop(), tokens], dim=-1)))
        return self.to_velocity(F.gelu(self.project_out["0"](tokens[:, 1:])), height, width)

    def to_velocity(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """The rest of the head, [b, h * w, features] -> [b, c, h, w]; the two heads differ in the norm's position."""
        if self.config.head == "ln":
            tokens = self.project_out["2"](tokens)
        features = rearrange(tokens, "b (h w) d -> b d h w", h=height, w=width)
        if self.config.head == "bn":
            features = self.project_out["3"](features)
        return self.project_out["4"](features)
