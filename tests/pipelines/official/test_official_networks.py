"""Networks from official files: recorded outputs, sizes read off the shapes, and tensors that are refused by name."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.official import OfficialFormatError, load_autoencoder, load_refiner, load_vector_field
from stage1_autoencoder.config import RefinerModelConfig, VQGANConfig
from stage1_autoencoder.vqgan import VQGAN, from_official_keys

FIXTURES = Path(__file__).parents[2] / "fixtures"
TAMING, MAIN = FIXTURES / "vqgan_f8s_ch32.ckpt.gz", FIXTURES / "main_ln_ddp.pth.gz"
REFINER = FIXTURES / "rcan_s3_b3_c16_r4"


def load_arrays(path: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in np.load(path).items() if array.dtype.kind in "bif"}


def off(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_arrays(FIXTURES / "vqgan_f8s_ch32.npz")


@pytest.fixture(scope="module", params=[TAMING, MAIN], ids=["taming", "main model"])
def autoencoder(request) -> VQGAN:
    return load_autoencoder(request.param).requires_grad_(False)


def test_the_recorded_autoencoders_sizes(autoencoder):
    config = autoencoder.config
    assert (config.channels, config.channel_multipliers) == (32, (1, 2, 2, 4))
    assert (config.blocks, config.decoder_blocks, config.latent_channels, config.codes) == (2, 3, 4, 256)
    assert [len(level.attn) for level in autoencoder.encoder.down] == [0, 0, 2, 0]


@pytest.fixture(scope="module")
def noise(recorded) -> dict[str, float]:
    """Ten times the rounding of the recorded fp32 outputs, which is known: they were recorded in float64, too."""
    return {name: 10 * off(recorded[name].double(), recorded[f"{name}_f64"]) for name in ("latents", "decoded")}


def test_the_recorded_autoencoders_latents(autoencoder, recorded, noise):
    assert off(autoencoder.encode(recorded["images"]), recorded["latents"]) < noise["latents"]


def test_the_recorded_autoencoders_codes(autoencoder, recorded, noise):
    quantized, codes = autoencoder.quantize(autoencoder.encode(recorded["images"]))
    # Latents that are off by the noise may have another nearest code where two are about equally near.
    clear = recorded["index_margin"] >= noise["latents"]
    assert clear.float().mean() > 0.9
    assert (codes == recorded["indices"].reshape(codes.shape))[clear].all()
    assert off(quantized.movedim(1, -1)[clear], recorded["quantized"].movedim(1, -1)[clear]) < noise["latents"]


def test_the_recorded_autoencoders_decoded_images(autoencoder, recorded, noise):
    assert off(autoencoder.decode(recorded["latents"]), recorded["decoded"]) < noise["decoded"]


def test_the_recorded_autoencoders_decoding_without_quantizing(autoencoder, recorded, noise):
    decoded = autoencoder.decode_quantized(recorded["latents"])
    assert off(decoded, recorded["decoded_force_not_quantize"]) < noise["decoded"]
    # The test could fail: quantizing moves these random latents far.
    assert off(recorded["decoded"], recorded["decoded_force_not_quantize"]) > 0.01


def test_the_recorded_autoencoders_decoding_codes(autoencoder, recorded, noise):
    codes = recorded["indices"].reshape(recorded["latents"][:, 0].shape)
    embedded = autoencoder.embed(codes)
    decoded = autoencoder.decode_quantized(embedded)
    assert off(decoded, recorded["decoded_from_codebook_entries"]) < noise["decoded"]
    # The official straight-through estimator returns z + (e - z), which rounds twice.
    assert off(embedded, recorded["quantized"]) < 2 * torch.finfo(torch.float32).eps * embedded.abs().max()


def test_the_legacy_loss_is_ours_with_beta_on_the_other_term(autoencoder, recorded):
    output = autoencoder(recorded["images"])
    # Taming: mean((sg[e] - z)^2) + 0.25 mean((e - sg[z])^2).
    legacy = output.commitment_loss + 0.25 * output.codebook_loss
    # Means of 768 squares each: summed in fp32 they round to within n eps / 2 of their value.
    assert legacy.item() == pytest.approx(
        recorded["vq_loss_legacy"].item(), rel=768 * torch.finfo(torch.float32).eps / 2
    )


def test_the_recorded_autoencoders_float64(recorded, noise):
    exact = load_autoencoder(TAMING).requires_grad_(False).double()
    # float64 rounds 2^29 times finer than float32, and so do the recorded outputs: a margin of 2^9 is left.
    latents = exact.encode(recorded["images"].double())
    assert off(latents, recorded["latents_f64"]) < noise["latents"] / 2**20
    assert off(exact.decode(latents), recorded["decoded_f64"]) < noise["decoded"] / 2**20


def test_the_recorded_vector_field():
    field, recorded = load_vector_field(MAIN), load_arrays(FIXTURES / "regressor_ln.npz")
    names = ("input_latents", "reference_latents", "conditioning_latents", "index_distances")
    with torch.no_grad():
        # Given the recorded time code: fp32 angles of 200 rad differ between processors.
        output = field.trunk(field.embed(*(recorded[name] for name in names)), recorded["temb"], 8, 8)
    assert off(output, recorded["output"]) < 10 * off(recorded["output"].double(), recorded["output_f64"])
    assert all(parameter.requires_grad for parameter in field.parameters())


def test_the_recorded_refiner():
    refiner, recorded = load_refiner(REFINER.with_suffix(".pth")), load_arrays(REFINER.with_suffix(".npz"))
    assert refiner.config == RefinerModelConfig(groups=3, blocks=3, features=16, reduction=4)
    previous, decoded = recorded["net_input"].split(3, dim=1)
    with torch.no_grad():
        exact = refiner.double()(previous.double(), decoded.double())
        # Their fp32 rounding, which ours may exceed tenfold; by itself it must be one of fp32: below 100 eps.
        rounding = off(recorded["net_output"].double(), exact)
        assert rounding < 100 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert off(refiner.float()(previous, decoded), recorded["net_output"]) < 10 * rounding
        assert off(refiner(decoded, previous), recorded["net_output"]) > 0.1


def save(official, kind: str, network, change=None, prefix: str = "module.") -> tuple[Path, object]:
    """A file that holds a network, and the function that loads it."""
    if kind == "field":
        official.field = network
        return official.model(inside=False, prefix=prefix, change=change), load_vector_field
    if kind == "refiner":
        official.refiner = network
        return official.refiner_file(prefix=prefix, change=change), load_refiner
    official.autoencoder = network
    return official.autoencoder_file(prefix=prefix, change=change), load_autoencoder


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("field", {}),
        ("field", {"latent_channels": 8, "head": "bn"}),
        ("field", {"reference": False}),
        ("field", {"latent_channels": 6, "reference": False, "head": "bn", "depth": 2, "mid_depth": 0}),
        ("field", {"latent_channels": 3, "width": 64, "depth": 3, "mid_depth": 2}),
        ("vqvae", {}),
        ("vqvae", {"levels": 3, "codes": 7}),
        ("vqvae", {"channels": 64, "latent_channels": 5}),
        ("vqgan", {}),
        ("vqgan", {"channel_multipliers": (1,), "attention_resolutions": ()}),
        ("vqgan", {"attention_resolutions": (16, 8)}),
        ("vqgan", {"blocks": 2, "decoder_blocks": 1, "latent_channels": 3}),
        ("refiner", {"tanh": True}),
        ("refiner", {"blocks": 3}),
        ("refiner", {"groups": 11}),  # as text, 10 comes before 2
        ("refiner", {"features": 12, "reduction": 5}),
    ],
    ids=str,
)
def test_sizes_are_read_off_the_shapes(official, kind, sizes, prefix):
    written = official.make(kind, **sizes)
    path, load = save(official, kind, written, prefix=prefix)
    read = load(path)
    assert official.same(read, written)
    assert not any(module.training for module in read.modules())
    assert not any(tensor.is_meta for tensor in read.state_dict().values())
    images = torch.rand(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        if kind == "field":
            assert read.config == written.config
            frames = torch.randn(3, 2, read.latent_channels, 4, 4)
            arguments = (*frames, torch.tensor([1, 5]), torch.tensor([0.1, 0.8]))
            assert torch.equal(read(*arguments), written(*arguments))
        elif kind == "refiner":
            assert read.config.tanh == sizes.get("tanh", False)
            assert torch.equal(read(*images), written(*images))
        else:
            latents = written.encode(images[0])
            assert torch.equal(read.encode(images[0]), latents)
            assert torch.equal(read.decode(latents), written.decode(latents))


@pytest.mark.parametrize("kind", ["field", "vqvae", "vqgan", "refiner"])
def test_half_precision_weights_become_fp32(official, kind):
    written = official.make(kind, **({"head": "bn"} if kind == "field" else {}))
    path, load = save(official, kind, written, lambda state: state.update({k: v.half() for k, v in state.items()}))
    read = load(path)
    assert {name: tensor.dtype for name, tensor in read.state_dict().items()} == {
        name: tensor.dtype for name, tensor in written.state_dict().items()
    }
    for name, tensor in written.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor.half().to(tensor.dtype))


FIELD = "vector_field_regressor."


@pytest.mark.parametrize(
    ("kind", "name", "shape", "named"),
    [
        # shape None: the tensor is missing.
        ("field", f"{FIELD}project_in.1.weight", None, "missing: project_in.1.weight"),
        ("field", f"{FIELD}mid_blocks.0.norm1.bias", None, "missing: mid_blocks.0.norm1.bias"),
        ("field", f"{FIELD}extra.weight", (1,), "unexpected: extra.weight"),
        ("field", f"{FIELD}in_blocks.999999999.norm1.weight", (1,), "unexpected: in_blocks.999999999.norm1.weight"),
        ("field", f"{FIELD}project_out.4.bias", (5,), r"project_out.4.bias \[5\], expected \[4\]"),
        ("field", f"{FIELD}project_in.1.weight", (32, 15), "15 channels.*4 latent channels"),
        ("field", f"{FIELD}project_in.1.weight", (32,), r"project_in.1.weight .*\[32\], expected 2 dimensions"),
        ("vqgan", "encoder.conv_in.weight", None, "missing: encoder.conv_in.weight"),
        ("vqgan", "decoder.up.0.block.0.conv1.bias", None, "missing: decoder.up.0.block.0.conv1.bias"),
        ("vqgan", "encoder.extra", (1,), "unexpected: encoder.extra"),
        ("vqgan", "quant_conv.weight", (6, 6, 1, 1), r"quant_conv.weight \[6, 6, 1, 1\]"),
        ("vqgan", "encoder.conv_in.weight", (32,), r"encoder.conv_in.weight .*\[32\], expected 4 dimensions"),
        ("vqgan", "encoder.down.1.block.0.conv1.weight", (40, 32, 3, 3), "40 channels"),
        ("vqgan", "encoder.conv_in.weight", (8, 3, 3, 3), "norm_groups: 32 .* 8 channels"),
        ("vqgan", "quantize.embedding.weight", (65537, 4), "codes: .*65536"),
        ("vqvae", "encoder.conv_in.weight", None, "missing: encoder.conv_in.weight"),
        ("vqvae", "encoder.attn.in_proj_bias", None, "missing: encoder.attn.in_proj_bias"),
        ("vqvae", "vector_quantizer.embedding.weight", None, "missing: quantizer.embedding.weight"),
        ("vqvae", "encoder.extra", (1,), "unexpected: encoder.extra"),
        ("vqvae", "decoder.out_conv.bias", (4,), r"decoder.out_conv.bias \[4\], expected \[3\]"),
        ("vqvae", "encoder.conv_in.weight", (32,), r"encoder.conv_in.weight .*\[32\], expected 4 dimensions"),
        ("vqvae", "encoder.conv_in.weight", (8, 3, 3, 3), "norm_groups: 32 .* 8 channels"),
        ("vqvae", "vector_quantizer.embedding.weight", (65537, 4), "codes: .*65536"),
        ("vqvae", "encoder.residuals.1.conv1.weight", (1,), "64 channels.*32 .*doubled 2 times"),
        ("vqvae", "encoder.residuals.999999.conv1.weight", (1,), "64 channels.*32 "),
        ("refiner", "tail.bias", None, "missing: tail.bias"),
        ("refiner", "body.0.body.0.body.2.weight", None, "missing: body.0.body.0.body.2.weight"),
        ("refiner", "extra", (1,), "unexpected: extra"),
        ("refiner", "body.99999999.weight", (1,), "missing: body.1.body.0"),
        ("refiner", "tail.bias", (4,), r"tail.bias \[4\], expected \[3\]"),
        ("refiner", "head.weight", (8,), r"head.weight .*\[8\]"),
        ("refiner", "head.weight", (8, 3, 3, 3), r"head.weight \[8, 3, 3, 3\]"),
        ("refiner", "head.weight", (1, 6, 3, 3), "features"),
    ],
)
def test_tensors_that_do_not_fit_are_named(official, kind, name, shape, named):
    def change(state: dict[str, Tensor]) -> None:
        if shape is None:
            del state[name]
        else:
            state[name] = torch.zeros(()).expand(shape)

    path, load = save(official, kind, official.make(kind), change)
    with pytest.raises(OfficialFormatError, match=f"^{re.escape(str(path))}.*{named}") as error:
        load(path)
    assert "\n" not in str(error.value)
    assert "pydantic" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("field", f"{FIELD}project_in.1.weight"), ("vqgan", "quant_conv.weight"), ("refiner", "tail.bias")],
)
def test_weights_that_are_not_finite_are_named(official, kind, name):
    def change(state: dict[str, Tensor]) -> None:
        state[name] = torch.full_like(state[name], float("nan"))

    path, load = save(official, kind, official.make(kind), change)
    with pytest.raises(OfficialFormatError, match=f"^{re.escape(str(path))}: .*{name.removeprefix(FIELD)}"):
        load(path)


def test_a_network_without_blocks_is_refused(official):
    def drop(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if "_blocks." in name or "encoder.residuals" in name]:
            del state[name]

    for kind, named in (("field", "depth: .*greater than 0"), ("vqvae", "levels: .*greater than 0")):
        path, load = save(official, kind, official.make(kind), drop)
        with pytest.raises(OfficialFormatError, match=named):
            load(path)


def test_a_file_of_another_kind_is_refused_with_the_one_to_pass(official):
    model, autoencoder, refiner = official.model(inside=False), official.autoencoder_file(), official.refiner_file()
    for load, path, wanted in (
        (load_vector_field, autoencoder, "model.pth"), (load_vector_field, refiner, "model.pth"),
        (load_autoencoder, model, "vqvae.ckpt"), (load_autoencoder, refiner, "vqvae.ckpt"),
        (load_refiner, model, "refiner"), (load_refiner, autoencoder, "refiner"),
    ):  # fmt: skip
        with pytest.raises(OfficialFormatError, match=rf"{re.escape(str(path))} holds no .*{wanted}"):
            load(path)


@pytest.mark.parametrize("preset", ["f8_small", "f8", "f16"])
def test_presets_are_the_public_models(preset):
    with torch.device("meta"):
        model = VQGAN(VQGANConfig(preset=preset))
    lines = (FIXTURES / "reference" / f"vqgan_{preset}.keys.txt").read_text().splitlines()
    expected = from_official_keys(dict(line.split("  ") for line in lines if line))
    assert {name: str(list(tensor.shape)) for name, tensor in model.state_dict().items()} == expected
