"""What both families of autoencoders promise: official names, shapes, codes, and images that they refuse."""

from pathlib import Path

import pytest
import torch

from stage1_autoencoder import vqgan, vqvae
from stage1_autoencoder.autoencoder import Autoencoder, check_image_range, image_to_unit
from stage1_autoencoder.config import VQGANConfig, VQVAEConfig
from stage1_autoencoder.families import build_autoencoder

VQGAN = VQGANConfig(
    channels=8, channel_multipliers=(1, 2, 2), blocks=1, attention_resolutions=(16,), codes=64, norm_groups=4
)
VQVAE = VQVAEConfig(channels=8, levels=2, codes=64, norm_groups=4)


@pytest.fixture(params=[VQGAN, VQVAE], ids=lambda config: config.architecture)
def tiny(request: pytest.FixtureRequest) -> Autoencoder:
    """In float64, so that results may be compared closely."""
    torch.manual_seed(0)
    return build_autoencoder(request.param).double().eval()


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)).double() * 2 - 1


@pytest.mark.parametrize(
    ("keys", "config", "millions"),
    [
        ("vqgan_f8_small", VQGANConfig(), 63.8),
        ("vqgan_f8", VQGANConfig(preset="f8"), 67.7),
        ("vqgan_f16", VQGANConfig(preset="f16"), 69.6),
        ("vqvae_custom_clevrer", VQVAEConfig(), 7.3),
    ],
)
def test_public_sizes_have_the_official_names_and_shapes(keys, config, millions, fixtures: Path):
    with torch.device("meta"):
        model = build_autoencoder(config)
    lines = (fixtures / "reference" / f"{keys}.keys.txt").read_text().splitlines()
    rename = (vqvae if config.architecture == "vqvae" else vqgan).from_official_keys
    official = rename(dict(line.split("  ") for line in lines if line))
    assert {name: str(list(tensor.shape)) for name, tensor in model.state_dict().items()} == official
    assert round(model.parameter_count / 1e6, 1) == millions


@pytest.mark.parametrize(("module", "prefix"), [(vqgan, "quantize"), (vqvae, "vector_quantizer")])
def test_only_the_codebook_has_another_official_name(module, prefix):
    names = [f"{prefix}.embedding.weight", "encoder.conv_in.weight", f"decoder.{prefix}.weight"]
    renamed = module.from_official_keys({name: torch.zeros(1) for name in names})
    assert list(renamed) == ["quantizer.embedding.weight", *names[1:]]


def test_encoding_quantizing_and_decoding_fit_together(tiny):
    batch = images(2, 3, 16, 24)
    latents = tiny.encode(batch)
    assert tiny.downsampling == 4
    assert latents.shape == (2, 4, 4, 6)
    torch.testing.assert_close(latents[1:], tiny.encode(batch[1:]), atol=1e-12, rtol=0)
    quantized, codes = tiny.quantize(latents)
    assert codes.dtype == torch.int64
    vectors, codebook = latents.movedim(1, -1), tiny.quantizer.embedding.weight
    assert torch.equal(codes, (vectors[..., None, :] - codebook).square().sum(-1).argmin(-1))
    assert torch.equal(quantized, codebook[codes].movedim(-1, 1))
    decoded = tiny.decode(latents)
    assert decoded.shape == batch.shape
    for other in (tiny.decode_quantized(quantized), tiny.decode_quantized(tiny.embed(codes)), tiny.decode(quantized)):
        assert torch.equal(decoded, other)
    assert not torch.allclose(decoded, tiny.decode_quantized(latents), atol=1e-3)
    output = tiny(batch)
    assert torch.equal(output.latents, latents)
    assert torch.equal(output.codes, codes)
    torch.testing.assert_close(output.images, decoded, atol=1e-12, rtol=0)


def test_gradients_reach_every_parameter(tiny):
    output = tiny.train()(images(2, 3, 16, 16))
    output.images.square().mean().backward(retain_graph=True)
    assert next(tiny.encoder.parameters()).grad.abs().max() > 0  # straight through the quantizer
    assert tiny.quantizer.embedding.weight.grad is None
    (output.codebook_loss + output.commitment_loss).backward()
    for name, parameter in tiny.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_boundary_parameters_are_the_codebook_and_the_layers_of_few_channels(tiny):
    names = {id(parameter): name for name, parameter in tiny.named_parameters()}
    boundary = {names[id(parameter)].rpartition(".")[0] for parameter in tiny.boundary_parameters()}
    expected = {"encoder.conv_in", "decoder.conv_in", "quantizer.embedding"}
    if tiny.config.architecture == "vqgan":
        expected |= {"encoder.conv_out", "decoder.conv_out", "quant_conv", "post_quant_conv"}
    else:
        expected |= {"encoder.out_conv", "decoder.out_conv"}
    assert boundary == expected


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (images(1, 3, 18, 16), r"18x16.*factor 4"),
        (images(1, 3, 16, 30), r"16x30.*factor 4"),
        (images(1, 1, 16, 16), r"\[b, 3, h, w\].*\[1, 1, 16, 16\]"),
        (images(3, 16, 16), r"\[3, 16, 16\]"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), r"torch\.uint8.*x / 127\.5 - 1"),
        (images(1, 3, 16, 16) * 255, r"\[-1, 1\].*-2"),
    ],
    ids=range(6),
)
def test_wrong_images_are_refused(tiny, batch, message):
    with pytest.raises(ValueError, match=message):
        tiny.encode(batch)


@pytest.mark.parametrize("value", [1.002, -1.002, float("nan"), float("inf"), -float("inf")])
def test_one_value_out_of_range_is_refused(value):
    values = torch.zeros(1, 3, 16, 16)
    values[0, 1, 2, 3] = value
    with pytest.raises(ValueError, match=r"\[-1, 1\].*x / 127\.5 - 1"):
        check_image_range(values)
    check_image_range(torch.tensor([-1.0009, 1.0009]))  # rounding errors
    check_image_range(values[:0])


@pytest.mark.parametrize("config", [VQGAN, VQVAE], ids=["vqgan", "vqvae"])
def test_groups_that_do_not_divide_channels_are_refused(config):
    for groups in (3, 16):
        with pytest.raises(ValueError, match=rf"norm_groups: {groups} .*8 channels"):
            type(config)(**config.model_dump() | {"norm_groups": groups})


def test_attention_of_the_vqgan_is_placed_by_the_configured_resolution():
    tiny = build_autoencoder(VQGAN)
    assert [len(level.attn) for level in tiny.encoder.down] == [0, 0, 1]  # sides 64, 32, 16
    assert [len(level.attn) for level in tiny.decoder.up] == [0, 0, 2]
    other = build_autoencoder(VQGAN.model_copy(update={"resolution": 32}))
    assert [len(level.attn) for level in other.encoder.down] == [0, 1, 0]


def test_pixels_become_minus_one_to_one():
    pixels = torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)  # [1, h=1, w=1, 3]
    assert torch.equal(image_to_unit(pixels), torch.tensor([[[[-1.0]], [[1.0]], [[51 / 127.5 - 1]]]]))
    assert image_to_unit(torch.zeros(2, 5, 8, 6, 3, dtype=torch.uint8)).shape == (2, 5, 3, 8, 6)
