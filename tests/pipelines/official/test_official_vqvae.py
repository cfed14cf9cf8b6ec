"""The official custom VQ-VAE: its own file, the main model around it, and what is no such file."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipelines.official import (
    OfficialFormatError,
    autoencoder_state,
    load_autoencoder,
    load_vector_field,
    read_official,
)
from stage1_autoencoder.config import VQGANConfig, VQVAEConfig
from stage1_autoencoder.vqgan import VQGAN, from_official_keys
from stage1_autoencoder.vqvae import VQVAE

SMALL = VQVAEConfig(channels=32, levels=2, codes=16, latent_channels=3)


def official_state(config: VQVAEConfig = SMALL) -> tuple[VQVAE, dict[str, Tensor]]:
    """A random network, and its tensors under their official names."""
    torch.manual_seed(0)
    model = VQVAE(config).eval()
    for name, tensor in model.state_dict().items():
        if "running" in name:
            tensor.uniform_(0.5, 2.0)
    return model, {name.replace("quantizer.", "vector_quantizer."): t for name, t in model.state_dict().items()}


def save(path: Path, state: dict[str, Tensor], prefix: str = "module.") -> Path:
    torch.save({"model": {f"{prefix}{name}": tensor for name, tensor in state.items()}}, path)
    return path


def outputs(model: VQVAE) -> tuple[Tensor, ...]:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        latents = model.encode(images)
        return latents, model.decode(latents), model.decode_quantized(latents)


FIELD = {"vector_field_regressor.project_in.1.weight": torch.ones(2)}


@pytest.mark.parametrize("main", [False, True], ids=["of its own", "main model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_it_is_built_from_its_own_file_and_from_the_main_model(tmp_path, prefix, main):
    written, state = official_state()
    state["loss.discriminator.weight"] = torch.ones(2)
    if main:
        state = {f"ae.backbone.{name}": tensor for name, tensor in state.items()} | FIELD
    read = load_autoencoder(save(tmp_path / "file.pth", state, prefix))
    assert isinstance(read, VQVAE)
    assert read.config == SMALL
    assert not any(module.training for module in read.modules())
    assert not any(tensor.is_meta for tensor in read.state_dict().values())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs(read), outputs(written), strict=True))


@pytest.mark.parametrize(
    "changes",
    [{}, {"levels": 1}, {"levels": 3, "codes": 7}, {"channels": 64}, {"latent_channels": 5}],
    ids=str,
)
def test_sizes_are_read_off_the_shapes(tmp_path, changes):
    config = SMALL.model_copy(update=changes)
    read = load_autoencoder(save(tmp_path / "vqvae.pth", official_state(config)[1]))
    assert read.config == config


def test_half_precision_files_become_fp32(tmp_path):
    written, state = official_state()
    read = load_autoencoder(save(tmp_path / "vqvae.pth", {name: tensor.half() for name, tensor in state.items()}))
    assert {name: tensor.dtype for name, tensor in read.state_dict().items()} == {
        name: tensor.dtype for name, tensor in written.state_dict().items()
    }
    for ours, theirs in zip(outputs(read)[:1], outputs(written), strict=False):
        torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, part):
    path = save(tmp_path / "vqvae.pth", official_state()[1])
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(OfficialFormatError, match=r"vqvae.pth is truncated or no torch.save file.*: download it again"):
        load_autoencoder(path)


class Canary:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_pickled_code_is_run(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"model": official_state()[1], "args": Canary(canary)}, tmp_path / "evil.pth")
    with pytest.raises(OfficialFormatError, match=r"holds a pickled \w+.mkdir, .*: refused"):
        load_autoencoder(tmp_path / "evil.pth")
    assert not canary.exists()


def drop(name: str):
    return lambda state: state.pop(name)


def put(name: str, *shape: int):
    return lambda state: state.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("encoder.conv_in.weight"), "missing: encoder.conv_in.weight"),
        (drop("encoder.attn.in_proj_bias"), "missing: encoder.attn.in_proj_bias"),
        (drop("decoder.residuals.1.1.norm.running_var"), "missing: decoder.residuals.1.1.norm.running_var"),
        (drop("vector_quantizer.embedding.weight"), "missing: quantizer.embedding.weight"),
        (put("encoder.extra", 1), "unexpected: encoder.extra"),
        (put("decoder.out_conv.bias", 4), r"another shape: decoder.out_conv.bias \[4\] in place of \[3\]"),
        (put("encoder.residuals.1.conv1.weight", 96, 64, 3, 3), r"encoder.residuals.1.conv1.weight \[96, 64, 3, 3\]"),
        (put("encoder.conv_in.weight", 32), r"encoder.conv_in.weight has shape \[32\], not 4 dimensions"),
        (put("encoder.conv_in.weight", 8, 3, 3, 3), "norm_groups: 32 does not divide the 8 channels"),
        (put("vector_quantizer.embedding.weight", 65537, 3), "codes: Input should be less than or equal to 65536"),
        (
            put("encoder.residuals.2.conv1.weight", 1),
            r"out_conv.weight takes 128 channels, not the 32 .* doubled 3 times",
        ),
        (put("encoder.residuals.999999.conv1.weight", 1), r"out_conv.weight takes 128 channels, not the 32 of"),
        (
            lambda state: [state.pop(name) for name in list(state) if name.startswith("encoder.residuals")],
            "levels: Input should be greater than 0",
        ),
    ],
    ids=range(13),
)
def test_what_is_no_custom_vqvae_is_refused_by_name(tmp_path, change, message):
    state = official_state(SMALL.model_copy(update={"channels": 32}))[1]
    change(state)
    path = save(tmp_path / "vqvae.pth", state)
    with pytest.raises(OfficialFormatError, match=f"{path}.*{message}") as error:
        load_autoencoder(path)
    assert "pydantic" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("encoder.conv_in.weight", (8, 3, 3, 3), "norm_groups: 32 does not divide the 8 channels of a level"),
        ("quantize.embedding.weight", (65537, 4), "codes: Input should be less than or equal to 65536"),
    ],
)
def test_sizes_that_no_vqgan_has_are_told_without_noise(tmp_path, name, shape, message):
    with torch.device("meta"):
        model = VQGAN(VQGANConfig(channels=32))
    state = {key.replace("quantizer.", "quantize."): torch.zeros(1).expand(t.shape) for key, t in
             model.state_dict().items()}  # fmt: skip
    torch.save({"state_dict": state | {name: torch.zeros(1).expand(shape)}}, tmp_path / "vqvae.ckpt")
    with pytest.raises(OfficialFormatError, match=f"does not fit the official network; {message}$"):
        load_autoencoder(tmp_path / "vqvae.ckpt")


def test_sizes_that_no_field_has_are_told_without_noise(tmp_path):
    state = {
        "vector_field_regressor.project_in.1.weight": torch.zeros(16, 12),
        "vector_field_regressor.project_out.4.weight": torch.zeros(4, 16, 3, 3),
    }
    torch.save({"model": state}, tmp_path / "model.pth")
    with pytest.raises(OfficialFormatError, match=r"model.pth does not fit .*; depth: Input should be greater than 0$"):
        load_vector_field(tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model.pth: its width 16 must be a multiple of heads 0$"):
        load_vector_field(tmp_path / "model.pth", heads=0)


def test_a_block_number_out_of_nowhere_builds_no_such_network(tmp_path):
    state = {
        "vector_field_regressor.project_in.1.weight": torch.zeros(16, 12),
        "vector_field_regressor.project_out.4.weight": torch.zeros(4, 16, 3, 3),
        "vector_field_regressor.in_blocks.999999999.norm1.weight": torch.zeros(16),
    }
    torch.save({"model": state}, tmp_path / "model.pth")
    with pytest.raises(OfficialFormatError, match=r"unexpected: in_blocks.999999999.norm1.weight"):
        load_vector_field(tmp_path / "model.pth")


def test_a_refiners_file_is_told_by_what_it_holds(fixtures):
    with pytest.raises(
        OfficialFormatError, match=r"holds neither 'model' .*, but refiner, optimizer, epoch, args: pass"
    ):
        read_official(fixtures / "rcan_s3_b3_c16_r4.pth")


def test_the_content_is_not_read_twice(tmp_path):
    path = save(tmp_path / "vqvae.pth", official_state()[1])
    content = read_official(path)
    path.unlink()
    assert load_autoencoder(path, content).config == SMALL
    assert autoencoder_state(path, content) == content.autoencoder
    with pytest.raises(OfficialFormatError, match="holds no vector field"):
        load_vector_field(path, content)


@pytest.mark.parametrize("preset", ["f8_small", "f8", "f16"])
def test_presets_are_the_public_models(preset, fixtures):
    with torch.device("meta"):
        model = VQGAN(VQGANConfig(preset=preset))
    lines = (fixtures / "reference" / f"vqgan_{preset}.keys.txt").read_text().splitlines()
    official = from_official_keys(dict(line.split("  ") for line in lines if line))
    assert {name: str(list(tensor.shape)) for name, tensor in model.state_dict().items()} == official
