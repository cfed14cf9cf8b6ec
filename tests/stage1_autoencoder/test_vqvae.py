"""RIVER's custom VQ-VAE: official names, and every output against the network written out."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stage1_autoencoder.config import VQVAEConfig
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.vqvae import VQVAE, from_official_keys

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


def test_clevrers_sizes_have_the_official_names_and_shapes(fixtures):
    with torch.device("meta"):
        model = VQVAE(CLEVRER)
    lines = (fixtures / "reference" / "vqvae_custom_clevrer.keys.txt").read_text().splitlines()
    official = from_official_keys(dict(line.split("  ") for line in lines if line))
    assert {name: str(list(tensor.shape)) for name, tensor in model.state_dict().items()} == official
    assert round(model.parameter_count / 1e6, 1) == 7.3
    assert (model.downsampling, CLEVRER.codes, CLEVRER.latent_channels) == (8, 8192, 4)


def test_only_the_codebook_has_another_name():
    names = ["vector_quantizer.embedding.weight", "encoder.conv_in.weight", "decoder.vector_quantizer.weight"]
    renamed = from_official_keys({name: torch.zeros(1) for name in names})
    assert list(renamed) == ["quantizer.embedding.weight", *names[1:]]


def test_the_family_is_built_by_its_name():
    assert isinstance(build_autoencoder(TINY), VQVAE)


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


def test_codes_are_the_nearest_ones(exact):
    latents = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(2)).double()
    quantized, codes = exact.quantize(latents)
    codebook = exact.state_dict()["quantizer.embedding.weight"]
    nearest = (latents.movedim(1, -1)[..., None, :] - codebook).square().sum(-1).argmin(-1)
    assert torch.equal(codes, nearest)
    assert torch.equal(quantized, codebook[codes].movedim(-1, 1))
    torch.testing.assert_close(exact.decode(latents), Plain(exact).decode_quantized(quantized), atol=1e-10, rtol=0)
    torch.testing.assert_close(exact.decode_codes(codes), exact.decode(latents), atol=1e-12, rtol=0)
    assert not torch.allclose(exact.decode(latents), exact.decode_quantized(latents), atol=1e-3)


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


def test_evaluation_changes_no_statistics(tiny):
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    tiny(images(2, 3, 16, 16))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())


def test_every_parameter_has_a_gradient(tiny):
    output = tiny.train()(images(2, 3, 16, 16))
    assert torch.equal(output.codes, tiny.quantizer.nearest(output.latents))
    (output.images.square().mean() + output.codebook_loss + output.commitment_loss).backward()
    for name, parameter in tiny.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_the_straight_through_gradient_reaches_the_encoder(tiny):
    tiny(images(1, 3, 16, 16)).images.sum().backward()
    assert tiny.encoder.conv_in.weight.grad.abs().max() > 0
    assert tiny.quantizer.embedding.weight.grad is None


def test_shapes_through_the_network(tiny):
    batch = images(2, 3, 16, 24)
    latents = tiny.encode(batch)
    assert tiny.downsampling == 4
    assert latents.shape == (2, 4, 4, 6)
    quantized, codes = tiny.quantize(latents)
    assert quantized.shape == latents.shape
    assert codes.shape == (2, 4, 6)
    assert codes.dtype == torch.int64
    assert tiny.decode(latents).shape == batch.shape
    output = tiny(batch)
    assert torch.equal(output.latents, latents)
    assert torch.equal(output.codes, codes)
    torch.testing.assert_close(output.images, tiny.decode_codes(codes), atol=1e-12, rtol=0)


def test_an_image_does_not_depend_on_its_batch(tiny):
    batch = images(3, 3, 16, 16)
    torch.testing.assert_close(tiny.encode(batch)[1:2], tiny.encode(batch[1:2]), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), r"torch\.uint8.*x / 127\.5 - 1"),
        (images(1, 3, 16, 16) * 255, r"\[-1, 1\].*-2"),
        (images(1, 3, 18, 16), r"18x16.*factor 4"),
    ],
    ids=["dtype", "range", "sides"],
)
def test_wrong_images_are_refused(tiny, batch, message):
    with pytest.raises(ValueError, match=message):
        tiny.encode(batch)


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


def test_boundary_parameters_are_the_codebook_and_the_layers_of_few_channels(tiny):
    names = {id(parameter): name for name, parameter in tiny.named_parameters()}
    boundary = {names[id(parameter)].rpartition(".")[0] for parameter in tiny.boundary_parameters()}
    assert boundary == {
        "encoder.conv_in", "encoder.out_conv", "decoder.conv_in", "decoder.out_conv", "quantizer.embedding",
    }  # fmt: skip


@pytest.mark.parametrize("groups", [3, 16])
def test_groups_that_do_not_divide_channels_are_refused(groups):
    with pytest.raises(ValueError, match=rf"norm_groups: {groups} .*8 channels"):
        VQVAEConfig(**TINY.model_dump() | {"norm_groups": groups})
