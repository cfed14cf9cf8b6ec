"""Official files: what loads, and what is refused with which words."""

import argparse
import gzip
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.official import (
    OfficialFormatError,
    autoencoder_state,
    load_pickle,
    load_vector_field,
    read_official,
)
from stage2_flow.config import VectorFieldConfig
from stage2_flow.vector_field import VectorField

FIXTURES = Path(__file__).parents[2] / "fixtures"
MAIN, TAMING = FIXTURES / "main_ln_ddp.pth.gz", FIXTURES / "vqgan_f8s_ch32.ckpt.gz"


@pytest.fixture(scope="module")
def main_content() -> dict:
    return torch.load(io.BytesIO(gzip.decompress(MAIN.read_bytes())), weights_only=True)


def save_field(path: Path, *, latent_channels: int = 4, prefix: str = "", change=None, **options) -> VectorField:
    """Write a small field the way the official code does; `change` edits its state dict first."""
    torch.manual_seed(0)
    config = VectorFieldConfig(**{"width": 32, "depth": 1, "mid_depth": 1, **options})
    field = VectorField(config, latent_channels).eval()
    state = {f"{prefix}vector_field_regressor.{name}": tensor for name, tensor in field.state_dict().items()}
    if change is not None:
        change(state)
    torch.save({"model": state, "global_step": 7}, path)
    return field


def outputs(field: VectorField, channels: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    frames = torch.randn(3, 2, channels, 4, 4, generator=generator)
    with torch.no_grad():
        return field(*frames, torch.tensor([1, 5]), torch.tensor([0.1, 0.8]))


def test_the_recorded_main_model_gives_the_recorded_output():
    field = load_vector_field(MAIN)
    recorded = np.load(FIXTURES / "regressor_ln.npz")
    names = ("input_latents", "reference_latents", "conditioning_latents", "index_distances", "timestamps")
    output = field(*(torch.from_numpy(recorded[name]) for name in names))
    assert (output - torch.from_numpy(recorded["output"])).abs().max() < 1e-5
    assert not field.training
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in field.parameters())


def test_the_main_model_holds_the_autoencoder_of_its_own_file():
    inside, apart = autoencoder_state(MAIN), autoencoder_state(TAMING)
    assert list(inside) == list(apart)
    assert all(torch.equal(inside[name], apart[name]) for name in apart)
    assert not any(name.startswith("loss.") for name in inside)
    assert "quant_conv.weight" in inside
    assert read_official(MAIN).iterations == 2


def test_plain_and_gzipped_files_with_and_without_the_prefix_read_the_same(tmp_path, main_content):
    bare = {name.removeprefix("module."): tensor for name, tensor in main_content["model"].items()}
    torch.save({"model": bare}, tmp_path / "single.pth")
    expected, found = read_official(MAIN), read_official(tmp_path / "single.pth")
    assert found.iterations is None
    for part in ("autoencoder", "vector_field"):
        ours, theirs = getattr(found, part), getattr(expected, part)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_custom_vqvae_sits_under_backbone(tmp_path, prefix):
    weight = torch.ones(2)
    save_field(
        tmp_path / "model.pth",
        prefix=prefix,
        change=lambda state: state.update({f"{prefix}ae.backbone.encoder.conv_in.weight": weight}),
    )
    torch.save({"model": {f"{prefix}encoder.conv_in.weight": weight}}, tmp_path / "vqvae.pth")
    for name in ("model.pth", "vqvae.pth"):
        state = autoencoder_state(tmp_path / name)
        assert list(state) == ["encoder.conv_in.weight"]
        assert torch.equal(state["encoder.conv_in.weight"], weight)


@pytest.mark.parametrize(
    ("latent_channels", "options"),
    [
        (4, {"head": "ln"}),
        (8, {"head": "bn"}),
        (4, {"reference": False}),
        (6, {"reference": False, "head": "bn", "depth": 2, "mid_depth": 0}),
        (3, {"width": 64, "depth": 3, "mid_depth": 2}),
        (4, {"width": 36, "heads": 9}),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_sizes_are_read_off_the_shapes(tmp_path, latent_channels, options, prefix):
    written = save_field(tmp_path / "model.pth", latent_channels=latent_channels, prefix=prefix, **options)
    read = load_vector_field(tmp_path / "model.pth", heads=options.get("heads", 8))
    assert read.config == written.config
    assert read.latent_channels == latent_channels
    assert torch.equal(outputs(read, latent_channels), outputs(written, latent_channels))


def test_half_precision_weights_become_fp32(tmp_path):
    save_field(
        tmp_path / "model.pth", head="bn", change=lambda state: state.update({k: v.half() for k, v in state.items()})
    )
    field = load_vector_field(tmp_path / "model.pth")
    assert {parameter.dtype for parameter in field.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("vector_field_regressor.project_in.1.weight"), "missing: project_in.1.weight"),
        (lambda state: state.pop("vector_field_regressor.mid_blocks.0.norm1.bias"), "missing: mid_blocks.0.norm1.bias"),
        (
            lambda state: state.update({"vector_field_regressor.extra.weight": torch.ones(1)}),
            "unexpected: extra.weight",
        ),
        (
            lambda state: state.update({"vector_field_regressor.project_out.4.bias": torch.ones(5)}),
            r"another shape: project_out.4.bias \[5\] in place of \[4\]",
        ),
        (
            lambda state: state.update({"vector_field_regressor.project_in.1.weight": torch.ones(32, 15)}),
            "takes 15 channels, which is neither 3 .* nor 2 .* times the 4 latent channels",
        ),
        (
            lambda state: state.update({"vector_field_regressor.project_in.1.weight": torch.ones(32)}),
            r"project_in.1.weight has shape \[32\], not 2 dimensions",
        ),
        (lambda state: state.update({"refiner.weight": torch.ones(1)}), "keys of neither .*: refiner.weight"),
    ],
)
def test_refuses_a_state_that_is_not_the_networks(tmp_path, change, message):
    path = tmp_path / "model.pth"
    save_field(path, change=change)
    with pytest.raises(OfficialFormatError, match=f"{path}.*{message}"):
        load_vector_field(path)


def test_refuses_heads_that_do_not_divide_the_width(tmp_path):
    save_field(tmp_path / "model.pth")
    with pytest.raises(ValueError, match="width 32 must be a multiple of heads 5"):
        load_vector_field(tmp_path / "model.pth", heads=5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": {}}, "holds neither 'model' .* nor 'state_dict' .*, but weights"),
        ([1, 2], "holds neither .*, but list"),
        ({"model": {"a": 1}}, "'model' is not a dictionary of tensors"),
        ({"state_dict": [torch.ones(1)]}, "'state_dict' is not a dictionary of tensors"),
    ],
)
def test_refuses_other_content(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(OfficialFormatError, match=message):
        read_official(tmp_path / "other.pth")


def test_says_which_file_to_pass_instead(tmp_path):
    with pytest.raises(OfficialFormatError, match="holds no vector field: pass the main model"):
        load_vector_field(TAMING)
    save_field(tmp_path / "model.pth")
    with pytest.raises(OfficialFormatError, match="holds no autoencoder: pass the vqvae"):
        autoencoder_state(tmp_path / "model.pth")
    with pytest.raises(FileNotFoundError):
        read_official(tmp_path / "absent.pth")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("packed", [False, True])
def test_refuses_a_truncated_file(tmp_path, part, packed):
    save_field(tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    content = gzip.compress(content, compresslevel=1) if packed else content
    path = tmp_path / ("cut.pth.gz" if packed else "cut.pth")
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(OfficialFormatError, match=f"{path} is truncated or no torch.save file.*: download it again"):
        read_official(path)


def test_refuses_a_foreign_file(tmp_path):
    (tmp_path / "page.pth").write_text("<html>404: file not found</html>")
    with pytest.raises(
        OfficialFormatError, match=r"page.pth is a web page, .* and no torch.save file: download it again"
    ):
        read_official(tmp_path / "page.pth")
    (tmp_path / "noise.pth").write_bytes(bytes(range(256)))
    with pytest.raises(OfficialFormatError, match=r"truncated or no torch\.save file"):
        read_official(tmp_path / "noise.pth")


class Canary:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_runs_no_pickled_code(tmp_path, legacy):
    canary, path = tmp_path / "canary", tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "callbacks": Canary(canary)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(OfficialFormatError, match=r"holds a pickled \w+.mkdir, .*: refused. If you trust .*torch.save"):
        read_official(path)
    assert not canary.exists()


def test_allowed_globals_are_allowed_for_one_call_only(tmp_path):
    torch.save({"args": argparse.Namespace(groups=3)}, tmp_path / "refiner.pth")
    with pytest.raises(OfficialFormatError, match=r"a pickled argparse.Namespace"):
        load_pickle(tmp_path / "refiner.pth")
    assert load_pickle(tmp_path / "refiner.pth", [argparse.Namespace])["args"].groups == 3
    with pytest.raises(OfficialFormatError, match=r"a pickled argparse.Namespace"):
        load_pickle(tmp_path / "refiner.pth")


def test_a_legacy_torch_file_reads_the_same(tmp_path, main_content):
    torch.save(main_content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    ours, theirs = read_official(tmp_path / "old.ckpt").vector_field, read_official(MAIN).vector_field
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
