"""`VideoPredictor.from_official`: released files to predictions, without a run or a configuration."""

import argparse
import dataclasses
import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipelines.config import parse_config
from pipelines.errors import UserError
from pipelines.official import OfficialFormatError
from pipelines.official.importing import import_official
from pipelines.official.parts import OfficialFiles
from pipelines.predictor import VideoPredictor
from pipelines.runtime.context import RunContext
from stage1_autoencoder.config import RefinerModelConfig, VQGANConfig, VQVAEConfig
from stage1_autoencoder.rcan import RCAN
from stage1_autoencoder.vqgan import VQGAN
from stage1_autoencoder.vqvae import VQVAE
from stage2_flow.config import SamplingConfig, VectorFieldConfig
from stage2_flow.vector_field import VectorField

CPU = torch.device("cpu")
FAMILIES = {
    "vqvae": (lambda: VQVAE(VQVAEConfig(channels=32, levels=1, codes=16)), "ae.backbone.", "vector_quantizer."),
    "vqgan": (
        lambda: VQGAN(VQGANConfig(channels=32, channel_multipliers=(1, 2), blocks=1, resolution=16, codes=16)),
        "ae.",
        "quantize.",
    ),
}


def official_names(network: nn.Module, quantizer: str, prefix: str = "") -> dict[str, Tensor]:
    return {
        f"{prefix}{re.sub(r'^quantizer[.]', quantizer, name)}": tensor for name, tensor in network.state_dict().items()
    }


def save_model(path: Path, family: str | None, prefix: str = "module.", **sizes: Any) -> Path:
    """A random main model, with an autoencoder of a family inside, or none."""
    torch.manual_seed(0)
    field = VectorField(VectorFieldConfig(**({"width": 32, "depth": 1, "mid_depth": 1} | sizes)), 4)
    state = {f"vector_field_regressor.{name}": tensor for name, tensor in field.state_dict().items()}
    if family is not None:
        build, inside, quantizer = FAMILIES[family]
        state |= official_names(build(), quantizer, inside)
    torch.save({"model": {f"{prefix}{name}": tensor for name, tensor in state.items()}}, path)
    return path


def save_autoencoder(path: Path, family: str) -> Path:
    torch.manual_seed(1)
    build, _, quantizer = FAMILIES[family]
    state = official_names(build(), quantizer, "module." if family == "vqvae" else "")
    torch.save({"model" if family == "vqvae" else "state_dict": state}, path)
    return path


def save_refiner(path: Path) -> Path:
    refiner = RCAN(RefinerModelConfig(groups=1, blocks=1, features=8, reduction=4))
    torch.save({"refiner": refiner.state_dict(), "args": argparse.Namespace(a=1)}, path)
    return path


def images(frames: int = 2) -> Tensor:
    return torch.rand(1, frames, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.fixture(scope="module")
def replay(fixtures_folder: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in np.load(fixtures_folder / "sample_ws0.npz").items()}


@pytest.fixture(scope="module")
def fixtures_folder() -> Path:
    return Path(__file__).parents[2] / "fixtures"


@pytest.fixture(scope="module", params=["from_official", "from_run"])
def official(request: pytest.FixtureRequest, fixtures_folder: Path, tmp_path_factory: Any) -> VideoPredictor:
    """The recorded model, straight from its file and by way of a run."""
    packed = fixtures_folder / "main_ln_ddp.pth.gz"
    if request.param == "from_official":
        return VideoPredictor.from_official(packed, device="cpu")
    folder = tmp_path_factory.mktemp("replay")
    (folder / "model.pth").write_bytes(gzip.decompress(packed.read_bytes()))
    config = parse_config(
        {
            "paths": {"runs": str(folder / "runs")},
            "dataset": {"name": "replay", "source": "shapes", "image_size": 64},
            "autoencoder": {"model": {"channels": 32, "codes": 256}},
            "flow": {"model": {"width": 64, "depth": 2, "mid_depth": 1}},
            "sampling": {"preset": "official"},
        },
        "a test",
    )
    import_official(config, RunContext(CPU), OfficialFiles(model=folder / "model.pth"))
    return VideoPredictor.from_run(config.run_path, device="cpu")


def test_the_recorded_rollout_is_replayed(official: VideoPredictor, replay: dict[str, Tensor]) -> None:
    noise, expected = replay["noise"], replay["latents"]
    context = expected.shape[1] - len(noise)
    latents = official.generate_latents(
        expected[:, :context],
        len(noise),
        sampling={"preset": "official", "steps": 10},
        noise=noise,
        condition_indices=replay["conditioning_indices"],
    )
    assert (latents - expected).abs().max() < 1e-5
    frames = official.decode_videos(latents)
    assert (frames - replay["frames"].clamp(-1, 1)).abs().max() < 1.3e-4
    codes = official.autoencoder.quantize(latents.flatten(0, 1))[1].flatten()
    recorded, clear = replay["decoded_indices"].flatten(), replay["index_margin"].flatten() > 1e-5
    assert clear.float().mean() > 0.9
    assert (codes[clear] == recorded[clear]).all()


def test_it_predicts_as_the_paper_does(fixtures_folder: Path) -> None:
    predictor = VideoPredictor.from_official(str(fixtures_folder / "main_ln_ddp.pth.gz"), device="cpu")
    assert predictor.sampling == SamplingConfig(preset="official")
    assert (predictor.standardization.mean.tolist(), predictor.standardization.std.tolist()) == ([0.0] * 4, [1.0] * 4)
    assert predictor.fps == 25
    assert predictor.device == CPU
    for network in (predictor.autoencoder, predictor.vector_field):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(UserError, match=r"gz was loaded without a refiner: pass refiner="):
        predictor.check_refiner()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("sizes", [{"head": "ln"}, {"head": "bn"}, {"reference": False}], ids=str)
def test_all_kinds_are_read_without_options(tmp_path: Path, family: str, prefix: str, sizes: dict[str, Any]) -> None:
    model = save_model(tmp_path / "model.pth", family, prefix, **sizes)
    predictor = VideoPredictor.from_official(model, device="cpu")
    assert predictor.vector_field.config.model_dump().items() >= sizes.items()
    assert predictor.autoencoder.config.architecture == family
    assert predictor.fps == {"vqgan": 25, "vqvae": 5}[family]
    frames = predictor.generate_frames(images(1), 1, sampling={"preset": "official", "steps": 2})
    assert frames.shape == (1, 2, 3, 16, 16)
    assert frames.isfinite().all()


def test_an_autoencoder_that_is_apart_and_a_refiner(tmp_path: Path) -> None:
    files = {
        "model": save_model(tmp_path / "model.pth", None),
        "autoencoder": save_autoencoder(tmp_path / "vqvae.ckpt", "vqgan"),
        "refiner": save_refiner(tmp_path / "refiner.pth"),
    }
    predictor = VideoPredictor.from_official(**files, device="cpu")
    expected = torch.load(files["autoencoder"], weights_only=True)["state_dict"]["encoder.conv_in.weight"]
    assert torch.equal(predictor.autoencoder.encoder.conv_in.weight, expected)
    few = dataclasses.replace(predictor, sampling=SamplingConfig(steps=1))
    plain, refined = (few.generate_frames(images(), 1, refine=refine) for refine in (False, True))
    assert torch.equal(plain[:, :2], refined[:, :2])
    assert not torch.equal(plain[:, 2], refined[:, 2])


def test_the_autoencoder_inside_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model.pth", "vqgan")
    apart = save_autoencoder(tmp_path / "vqvae.ckpt", "vqgan")
    weights = [
        VideoPredictor.from_official(model, path, device="cpu").autoencoder.encoder.conv_in.weight
        for path in (None, apart)
    ]
    assert torch.equal(*weights)
    assert f"model.pth holds its autoencoder; {apart} is not looked at" in capsys.readouterr().out


def test_heads_are_told(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.pth", "vqgan", width=36, heads=9)
    with pytest.raises(UserError, match=r"width 36 must be a multiple of heads 8: pass heads=\.\.\.$"):
        VideoPredictor.from_official(model, device="cpu")
    assert VideoPredictor.from_official(model, device="cpu", heads=9).vector_field.config.heads == 9


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (["absent.pth"], UserError, r"^model .*absent.pth: no such file$"),
        (["."], UserError, "^model .*: is a folder: name the file in it$"),
        (["model.pth", "absent.ckpt"], UserError, r"^autoencoder .*absent.ckpt: no such file"),
        (["model.pth"], OfficialFormatError, r"model.pth works on .* not inside: .*autoencoder='vqvae.ckpt'"),
        (["model.pth", "model.pth"], OfficialFormatError, "model.pth holds no autoencoder: pass the vqvae"),
        (["model.pth", "six.pth"], UserError, r"model.pth predicts latents of 4 channels, but .*six.pth makes 6"),
        (["vqvae.ckpt"], OfficialFormatError, "holds no vector field: pass the main model"),
        (["cut.pth"], OfficialFormatError, r"cut.pth is truncated or no torch.save file.*download it again"),
        (["page.pth"], OfficialFormatError, r"page.pth is a web page, .*download it again"),
        (["pointer.pth"], OfficialFormatError, r"pointer.pth is the pointer of git-lfs .*`git lfs pull`"),
        (["refiner.pth"], OfficialFormatError, "holds neither 'model' .*, but refiner"),
        (["whole.pth", None, "model.pth"], OfficialFormatError, "holds no 'refiner'"),
    ],
    ids=range(12),
)
def test_it_says_what_is_wrong(tmp_path: Path, files: list[str | None], error: type[UserError], message: str) -> None:
    content = save_model(tmp_path / "model.pth", None).read_bytes()
    save_model(tmp_path / "whole.pth", "vqgan")
    save_autoencoder(tmp_path / "vqvae.ckpt", "vqgan")
    save_refiner(tmp_path / "refiner.pth")
    six = VQVAE(VQVAEConfig(channels=32, levels=1, codes=16, latent_channels=6))
    torch.save({"model": official_names(six, "vector_quantizer.")}, tmp_path / "six.pth")
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "page.pth").write_bytes(b"\xef\xbb\xbf\n<!DOCTYPE html>")
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(error, match=message):
        VideoPredictor.from_official(*(name and tmp_path / name for name in files), device="cpu")
    with pytest.raises(UserError, match="--device toaster"):
        VideoPredictor.from_official(tmp_path / "whole.pth", device="toaster")
