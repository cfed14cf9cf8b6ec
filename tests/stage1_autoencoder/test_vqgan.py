"""The VQGAN: official names and sizes, shapes, and images that it refuses."""

import pytest
import torch

from stage1_autoencoder.autoencoder import check_image_range, image_to_unit
from stage1_autoencoder.config import VQGANConfig
from stage1_autoencoder.vqgan import VQGAN, from_official_keys

PAPER = {
    "f8_small": (VQGANConfig(), 63.8),
    "f8": (VQGANConfig(attention_resolutions=(32,), resolution=256), 67.7),
    "f16": (
        VQGANConfig(
            channel_multipliers=(1, 1, 2, 2, 4), attention_resolutions=(16,), resolution=256, latent_channels=8
        ),
        69.6,
    ),
}
TINY = VQGANConfig(
    channels=8, channel_multipliers=(1, 2, 2), blocks=1, attention_resolutions=(16,), codes=64, norm_groups=4
)


@pytest.fixture
def tiny() -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(TINY).double().eval()


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)).double() * 2 - 1


@pytest.mark.parametrize("name", list(PAPER))
def test_paper_sizes_have_the_official_names_and_shapes(name, fixtures):
    config, millions = PAPER[name]
    with torch.device("meta"):
        model = VQGAN(config)
    ours = [f"{key}  {list(tensor.shape)}" for key, tensor in model.state_dict().items()]
    lines = (fixtures / "reference" / f"vqgan_{name}.keys.txt").read_text().splitlines()
    official = from_official_keys({line.split("  ")[0]: line for line in lines if line})
    assert sorted(ours) == sorted(line.replace(line.split("  ")[0], key, 1) for key, line in official.items())
    assert round(model.parameter_count / 1e6, 1) == millions


def test_shapes_through_the_network(tiny):
    batch = images(2, 3, 16, 24)
    latents = tiny.encode(batch)
    assert tiny.downsampling == 4
    assert latents.shape == (2, 4, 4, 6)
    quantized, codes = tiny.quantize(latents)
    assert quantized.shape == latents.shape
    assert codes.shape == (2, 4, 6)
    assert tiny.decode(latents).shape == batch.shape
    output = tiny(batch)
    assert output.images.shape == batch.shape
    assert torch.equal(output.latents, latents)
    assert torch.equal(output.codes, codes)


def test_decode_quantizes_and_decode_quantized_does_not(tiny):
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    quantized, codes = tiny.quantize(latents)
    decoded = tiny.decode(latents)
    assert torch.equal(decoded, tiny.decode_quantized(quantized))
    assert torch.equal(decoded, tiny.decode_codes(codes))
    assert not torch.allclose(decoded, tiny.decode_quantized(latents), atol=1e-3)
    assert torch.equal(decoded, tiny.decode(quantized))


def test_the_forward_pass_of_training_decodes_the_codes(tiny):
    batch = images(2, 3, 16, 16)
    output = tiny(batch)
    torch.testing.assert_close(output.images, tiny.decode_codes(output.codes), atol=1e-12, rtol=0)


def test_attention_is_placed_by_the_configured_resolution(tiny):
    assert [len(level.attn) for level in tiny.encoder.down] == [0, 0, 1]  # sides 64, 32, 16
    assert [len(level.attn) for level in tiny.decoder.up] == [0, 0, 2]
    other = VQGAN(TINY.model_copy(update={"resolution": 32}))
    assert [len(level.attn) for level in other.encoder.down] == [0, 1, 0]


def test_an_image_does_not_depend_on_its_batch(tiny):
    batch = images(3, 3, 16, 16)
    torch.testing.assert_close(tiny.encode(batch)[1:2], tiny.encode(batch[1:2]), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 18, 16), r"18x16.*factor 4"),
        ((1, 3, 16, 30), r"16x30.*factor 4"),
        ((1, 1, 16, 16), r"\[b, 3, h, w\].*\[1, 1, 16, 16\]"),
        ((3, 16, 16), r"\[3, 16, 16\]"),
    ],
)
def test_wrong_images_are_refused(tiny, shape, message):
    with pytest.raises(ValueError, match=message):
        tiny.encode(images(*shape))


@pytest.mark.parametrize("value", [1.002, -1.002, float("nan"), float("inf"), -float("inf")])
def test_one_value_out_of_range_is_refused(value):
    values = torch.zeros(1, 3, 16, 16)
    values[0, 1, 2, 3] = value
    with pytest.raises(ValueError, match=r"\[-1, 1\].*x / 127\.5 - 1"):
        check_image_range(values)


def test_rounding_errors_out_of_range_are_accepted():
    check_image_range(torch.tensor([-1.0009, 1.0009]))
    check_image_range(torch.zeros(0, 3, 16, 16))


def test_groups_that_do_not_divide_channels_are_refused():
    with pytest.raises(ValueError, match=r"norm_groups: 3 .*8 channels"):
        VQGANConfig(**TINY.model_dump() | {"norm_groups": 3})


def test_boundary_parameters_are_the_codebook_and_the_layers_of_few_channels(tiny):
    names = {id(parameter): name for name, parameter in tiny.named_parameters()}
    boundary = {names[id(parameter)].rpartition(".")[0] for parameter in tiny.boundary_parameters()}
    assert boundary == {
        "encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out", "quant_conv", "post_quant_conv",
        "quantizer.embedding",
    }  # fmt: skip


def test_pixels_become_minus_one_to_one():
    pixels = torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)  # [1, h=1, w=1, 3]
    assert torch.equal(image_to_unit(pixels), torch.tensor([[[[-1.0]], [[1.0]], [[51 / 127.5 - 1]]]]))
    assert image_to_unit(torch.zeros(2, 5, 8, 6, 3, dtype=torch.uint8)).shape == (2, 5, 3, 8, 6)
