"""RIVER's custom VQ-VAE: every output against the network written out."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stage1_autoencoder.config import VQVAEConfig
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.vqvae import VQVAE

CLEVRER = VQVAEConfig()
TINY = VQVAEConfig(channels=8, levels=2, codes=64, norm_groups=4)
SIZES = {"clevrer": CLEVRER, "tiny": TINY}


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def make_trained(model: nn.Module) -> None:
    """Set norm affines, biases, running statistics and codes to values as after a training."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in model.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(drawn.abs() + 0.3)
        elif name.endswith("num_batches_tracked"):
            tensor.fill_(17)
        elif name == "quantizer.embedding.weight":
            tensor.copy_(drawn)
        elif tensor.ndim == 1:
            tensor.copy_(0.3 * drawn + (1.0 if name.endswith("weight") else 0.0))


@pytest.fixture(scope="module", params=list(SIZES))
def exact(request: pytest.FixtureRequest) -> VQVAE:
    """In float64 and evaluation mode, as after a training."""
    torch.manual_seed(0)
    model = VQVAE(SIZES[request.param]).double()
    make_trained(model)
    return model.eval().requires_grad_(False)


@pytest.fixture
def tiny() -> VQVAE:
    torch.manual_seed(0)
    model = VQVAE(TINY).double()
    make_trained(model)
    return model.eval()


class Plain:
    """The network as described, one function per layer over the dictionary of its tensors."""

    def __init__(self, model: VQVAE, *, training: bool = False) -> None:
        self.tensors, self.training = dict(model.state_dict()), training
        self.groups, self.levels = model.config.norm_groups, model.config.levels

    def group_norm(self, x: Tensor, name: str) -> Tensor:
        b, c, h, w = x.shape
        grouped = x.reshape(b, self.groups, -1)
        mean = grouped.mean(-1, keepdim=True)
        variance = (grouped - mean).square().mean(-1, keepdim=True)
        x = ((grouped - mean) / (variance + 1e-6).sqrt()).reshape(b, c, h, w)
        return x * self.channel(f"{name}.weight") + self.channel(f"{name}.bias")

    def batch_norm(self, x: Tensor, name: str) -> Tensor:
        mean, variance = self.channel(f"{name}.running_mean"), self.channel(f"{name}.running_var")
        if self.training:
            mean = x.mean((0, 2, 3), keepdim=True)
            variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * self.channel(f"{name}.weight") + self.channel(f"{name}.bias")

    def channel(self, name: str) -> Tensor:
        return self.tensors[name][None, :, None, None]

    def conv(self, x: Tensor, name: str, *, bias: bool) -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        assert (f"{name}.bias" in self.tensors) == bias
        b, _, h, w = x.shape
        patches = F.unfold(x, weight.shape[-1], padding=weight.shape[-1] // 2)  # [b, c k k, h w]
        x = (weight.flatten(1) @ patches).reshape(b, -1, h, w)
        return x + self.channel(f"{name}.bias") if bias else x

    def residual(self, x: Tensor, name: str, pool: int) -> Tensor:
        h = self.conv(x, f"{name}.conv1", bias=False)
        h = leaky(self.group_norm(average(h, pool), f"{name}.bn1"))
        h = self.group_norm(self.conv(h, f"{name}.conv2", bias=False), f"{name}.bn2")
        if f"{name}.downsample.0.weight" in self.tensors:
            x = average(self.conv(x, f"{name}.downsample.0", bias=False), pool)
            x = self.group_norm(x, f"{name}.downsample.2")
        return leaky(h + x)

    def attention(self, x: Tensor, name: str) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.group_norm(x, f"{name}.attn_norm").flatten(2).transpose(1, 2)
        joint = tokens @ self.tensors[f"{name}.attn.in_proj_weight"].T + self.tensors[f"{name}.attn.in_proj_bias"]
        q, k, v = joint[..., :c], joint[..., c : 2 * c], joint[..., 2 * c :]
        scores = (q @ k.transpose(1, 2) / math.sqrt(c)).exp()
        mixed = scores / scores.sum(-1, keepdim=True) @ v
        mixed = mixed @ self.tensors[f"{name}.attn.out_proj.weight"].T + self.tensors[f"{name}.attn.out_proj.bias"]
        return x + mixed.transpose(1, 2).reshape(b, c, h, w)

    def middle(self, x: Tensor, name: str) -> Tensor:
        x = self.residual(x, f"{name}.pre_attn_residual", 1)
        return self.residual(self.attention(x, name), f"{name}.post_attn_residual", 1)

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv(x, "encoder.conv_in", bias=True)
        for level in range(self.levels):
            x = self.residual(x, f"encoder.residuals.{level}", 2)
        x = self.group_norm(self.middle(x, "encoder"), "encoder.out_norm")
        return self.conv(x / (1 + (-x).exp()), "encoder.out_conv", bias=True)

    def decode_quantized(self, x: Tensor) -> Tensor:
        x = self.middle(self.conv(x, "decoder.conv_in", bias=True), "decoder")
        for level in range(self.levels):
            x = self.residual(x, f"decoder.residuals.{level}.0", 1)
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = self.conv(x, f"decoder.residuals.{level}.1.conv", bias=False)
            x = leaky(self.batch_norm(x, f"decoder.residuals.{level}.1.norm"))
        x = self.group_norm(x, "decoder.out_norm")
        return torch.tanh(self.conv(x / (1 + (-x).exp()), "decoder.out_conv", bias=True))


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def average(x: Tensor, side: int) -> Tensor:
    """Average over squares of `side` x `side` pixels."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // side, side, w // side, side).mean((3, 5))


def test_latents_equal_the_network_written_out(exact):
    batch = images(2, 3, 32, 24)
    latents = exact.encode(batch)
    assert latents.std() > 0.1
    torch.testing.assert_close(latents, Plain(exact).encode(batch), atol=1e-10, rtol=0)


def test_images_equal_the_network_written_out(exact):
    f = exact.downsampling
    latents = torch.randn(2, 4, 4, 3, generator=torch.Generator().manual_seed(1)).double()
    decoded = exact.decode_quantized(latents)
    assert decoded.shape == (2, 3, 4 * f, 3 * f)
    assert decoded.std() > 0.1
    torch.testing.assert_close(decoded, Plain(exact).decode_quantized(latents), atol=1e-10, rtol=0)
    assert decoded.abs().max() <= 1  # a tanh is last
    features = exact.to_features(latents)
    torch.testing.assert_close(exact.to_images(features), decoded, atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.tanh(exact.last_layer(features)), decoded, atol=1e-12, rtol=0)


def test_training_normalizes_up_blocks_by_the_batch_and_averages_its_statistics(tiny):
    tiny.train()
    latents = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    expected = Plain(tiny, training=True).decode_quantized(latents)
    in_evaluation = Plain(tiny).decode_quantized(latents)
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items() if ".norm.running" in name}
    torch.testing.assert_close(tiny.decode_quantized(latents), expected, atol=1e-10, rtol=0)
    assert (expected - in_evaluation).abs().max() > 0.01
    after = tiny.state_dict()
    assert len(before) == 2 * TINY.levels
    assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert after["decoder.residuals.0.1.norm.num_batches_tracked"] == 18


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_layouts_and_precisions_stay_close(exact, precision):
    """Some 30 layers with sums of up to 2304 terms: their rms errors add up like sqrt(30) or sqrt(30 x 2304)."""
    single = build_autoencoder(exact.config)
    single.load_state_dict(exact.state_dict())
    single.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    batch = images(2, 3, 32, 32)
    quantized = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    inputs = (x.float().contiguous(memory_format=torch.channels_last) for x in (batch, quantized))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        found = [function(x) for function, x in zip((single.encode, single.decode_quantized), inputs, strict=True)]
    # Rounding to bf16 changes values by up to 2^-9: a lower bound shows that bf16 was in use.
    low, high = (1e-4, 5 * 30**0.5 * 2.0**-9) if precision == "bf16" else (0, 5 * (30 * 2304) ** 0.5 * 2.0**-24)
    for ours, theirs in zip(found, (exact.encode(batch), exact.decode_quantized(quantized)), strict=True):
        assert ours.shape == theirs.shape
        error = (ours.double() - theirs).square().mean().sqrt() / theirs.std()
        assert low <= error < high
