"""Official files to networks: released models and their presets, and `VideoPredictor.from_official`."""

import dataclasses
import gzip
import re
import shlex
from ast import literal_eval
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from pipelines.config import load_config, parse_config
from pipelines.errors import UserError
from pipelines.official import OfficialFormatError
from pipelines.official.importing import import_official
from pipelines.official.parts import OfficialFiles
from pipelines.predictor import VideoPredictor
from pipelines.runtime.context import RunContext
from stage2_flow.config import SamplingConfig

CPU = torch.device("cpu")
FIXTURES = Path(__file__).parents[2] / "fixtures"
MAIN = FIXTURES / "main_ln_ddp.pth.gz"


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in np.load(FIXTURES / "sample_ws0.npz").items()}


@pytest.fixture(scope="module", params=["from_official", "from_run"])
def recorded_model(request: pytest.FixtureRequest, tmp_path_factory: Any) -> VideoPredictor:
    """The recorded model, from its file and through a run."""
    if request.param == "from_official":
        return VideoPredictor.from_official(MAIN, device="cpu")
    folder = tmp_path_factory.mktemp("replay")
    (folder / "model.pth").write_bytes(gzip.decompress(MAIN.read_bytes()))
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


def test_the_recorded_rollout_is_replayed(recorded_model, recorded):
    noise, expected = recorded["noise"], recorded["latents"]
    context = expected.shape[1] - len(noise)
    latents = recorded_model.generate_latents(
        expected[:, :context],
        len(noise),
        sampling={"preset": "official", "steps": 10},
        noise=noise,
        condition_indices=recorded["conditioning_indices"],
    )
    # Two fp32 evaluations of the field lie at most 3.3e-5 apart, and a rollout of two frames amplifies that by less
    # than 4: tests/stage2_flow/conftest.py and test_rollout.py derive both.
    tolerance = 1.3e-4
    assert (latents - expected).abs().max() < tolerance
    # Ten times the rounding of the decoder's recorded fp32 output, which was recorded in float64, too.
    decoder = np.load(FIXTURES / "vqgan_f8s_ch32.npz")
    noise = 10 * np.abs(decoder["decoded"] - decoder["decoded_f64"]).max()
    frames = recorded_model.decode_videos(expected)
    assert (frames - recorded["frames"].clamp(-1, 1)).abs().max() < noise
    # Latents between two codes may be off to the other one.
    codes = recorded_model.autoencoder.quantize(latents.flatten(0, 1))[1].flatten()
    expected_codes, clear = recorded["decoded_indices"].flatten(), recorded["index_margin"].flatten() > 2 * tolerance
    assert clear.float().mean() > 0.9
    assert (codes[clear] == expected_codes[clear]).all()


def test_from_official_predicts_as_the_paper_does():
    predictor = VideoPredictor.from_official(str(MAIN), device="cpu")
    assert predictor.sampling == SamplingConfig(preset="official")
    assert (predictor.standardization.mean.tolist(), predictor.standardization.std.tolist()) == ([0.0] * 4, [1.0] * 4)
    assert (predictor.fps, predictor.device) == (25, CPU)
    for network in (predictor.autoencoder, predictor.vector_field):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(UserError, match=rf"{re.escape(str(MAIN))} .*refiner="):
        predictor.check_refiner()


@pytest.mark.parametrize("family", ["vqvae", "vqgan"])
@pytest.mark.parametrize("sizes", [{"head": "ln"}, {"head": "bn"}, {"reference": False}], ids=str)
def test_from_official_needs_no_options(official, family, sizes):
    official.autoencoder, official.field = official.make(family), official.make("field", **sizes)
    predictor = VideoPredictor.from_official(official.model(), device="cpu")
    assert official.same(predictor.vector_field, official.field)
    assert official.same(predictor.autoencoder, official.autoencoder)
    assert predictor.fps == {"vqgan": 25, "vqvae": 5}[family]
    images = torch.rand(1, 1, 3, 16, 24) * 2 - 1  # any grid that the position codes allow
    frames = predictor.generate_frames(images, 1, sampling={"preset": "official", "steps": 2})
    assert frames.shape == (1, 2, 3, 16, 24)
    assert frames.isfinite().all()


def test_from_official_with_three_files(official):
    files = {
        "model": official.model(inside=False),
        "autoencoder": official.autoencoder_file(),
        "refiner": official.refiner_file(),
    }
    predictor = VideoPredictor.from_official(**files, device="cpu")
    assert official.same(predictor.autoencoder, official.autoencoder)
    few = dataclasses.replace(predictor, sampling=SamplingConfig(steps=1))
    images = torch.rand(1, 2, 3, 16, 16) * 2 - 1
    plain, refined = (few.generate_frames(images, 1, refine=refine) for refine in (False, True))
    assert torch.equal(plain[:, :2], refined[:, :2])
    assert not torch.equal(plain[:, 2], refined[:, 2])


def test_the_autoencoder_inside_the_model_wins(official, capsys):
    model, inside = official.model(), official.autoencoder
    official.autoencoder = official.make("vqgan")
    apart = official.autoencoder_file("vqvae.ckpt")
    predictor = VideoPredictor.from_official(model, apart, device="cpu")
    assert official.same(predictor.autoencoder, inside)
    assert str(apart) in capsys.readouterr().out


def test_from_official_takes_the_number_of_heads(official):
    official.field = official.make("field", width=36, heads=9)
    with pytest.raises(UserError, match=r"model.pth: .*width 36 .*heads 8.*heads="):
        VideoPredictor.from_official(official.model(), device="cpu")
    assert VideoPredictor.from_official(official.model(), device="cpu", heads=9).vector_field.config.heads == 9


@pytest.mark.parametrize(
    ("files", "error", "named"),
    [
        (["absent.pth"], UserError, r"^model .*absent.pth: no such file$"),
        (["."], UserError, "^model .*folder"),
        (["model.pth", "absent.ckpt"], UserError, r"^autoencoder .*absent.ckpt: no such file"),
        (["model.pth"], OfficialFormatError, r"model.pth .*autoencoder='vqvae.ckpt'"),
        (["model.pth", "six.pth"], UserError, r"model.pth predicts latents of 4 channels, but .*six.pth makes 6"),
    ],
)
def test_from_official_names_the_file_that_is_wrong(official, files, error, named):
    official.model(inside=False)
    official.autoencoder = official.make("vqvae", latent_channels=6)
    official.autoencoder_file("six.pth")
    with pytest.raises(error, match=named):
        VideoPredictor.from_official(*(official.path / name for name in files), device="cpu")


# By preset: the lists of the autoencoder's and the field's parameters, and where the autoencoder is in the main model.
RELEASED = {
    "kth": ("vqgan_f8_small", "vector_field_regressor_kth_ln", "ae."),
    "bair_64": ("vqgan_f8_small", "vector_field_regressor_kth_ln", "ae."),
    "bair_256": ("vqgan_f16", "vector_field_regressor_bair256_bn", "ae."),
    "clevrer": ("vqvae_custom_clevrer", "vector_field_regressor_kth_ln", "ae.backbone."),
}


def fitting(preset: str) -> list[str]:
    """All presets of a model's shapes."""
    return ["bair_64", "kth"] if preset in ("bair_64", "kth") else [preset]


def listed(name: str, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of the shapes in a list, each of a single number: 400 MB that take no memory."""
    lines = (FIXTURES / "reference" / f"{name}.keys.txt").read_text().splitlines()
    shapes = {key: literal_eval(shape) for key, shape in (line.split("  ") for line in lines if line)}
    return {f"{prefix}{key}": torch.zeros(()).expand(shape) for key, shape in shapes.items()}


def save(path: Path, state: dict[str, Tensor], holder: str = "model") -> Path:
    torch.save({holder: state, "global_step": 3}, path)
    assert path.stat().st_size < 2e6
    return path


def main_model(preset: str, *, inside: bool = True) -> dict[str, Tensor]:
    autoencoder, field, where = RELEASED[preset]
    return (listed(autoencoder, where) if inside else {}) | listed(field, "vector_field_regressor.")


def difference(configs: Path, preset: str, *options: str, **files: Path) -> str:
    """The message about sizes that differ; checked before anything of a run is written, and before weights are used."""
    config = load_config(configs / f"{preset}.yaml", [f"paths.runs={files['model'].parent}/runs", *options])
    with pytest.raises(UserError, match="does not fit the configuration:") as error:
        import_official(config, RunContext(CPU), OfficialFiles(**files), [configs, configs])
    assert not config.run_path.exists()
    return str(error.value)


@pytest.fixture
def configs(repository: Path) -> Path:
    return repository / "configs"


@pytest.mark.parametrize(
    ("preset", "other"),
    [(ours, other) for ours in RELEASED for other in (*RELEASED, "shapes") if other not in fitting(ours)],
)
def test_released_models_name_the_presets_that_fit(tmp_path, configs, preset, other):
    message = difference(configs, other, model=save(tmp_path / "model.pth", main_model(preset)))
    assert "model.pth" in message
    way_out = message.splitlines()[-1]
    assert re.findall(r"(\w+)\.yaml", way_out) == fitting(preset)
    assert "--config" in way_out


@pytest.mark.parametrize("preset", RELEASED)
def test_a_released_model_of_two_files_fits_its_preset(tmp_path, configs, preset):
    """The message names the only size that is made different."""
    model = save(tmp_path / "model.pth", main_model(preset, inside=False))
    state = listed(RELEASED[preset][0])
    if preset == "clevrer":
        apart = save(tmp_path / "vqvae.pth", state)
    else:
        state["loss.discriminator.main.0.weight"] = torch.zeros(64, 3, 4, 4)
        apart = save(tmp_path / "vqvae.ckpt", state, holder="state_dict")
    message = difference(configs, preset, "flow.model.depth=7", model=model, autoencoder=apart)
    assert re.findall(r"^  ([\w.]+): ", message, re.MULTILINE) == ["flow.model.depth"]


@pytest.mark.parametrize("preset", RELEASED)
def test_a_model_without_a_reference_is_told_with_the_option(tmp_path, configs, preset):
    state = main_model(preset)
    name = "vector_field_regressor.project_in.1.weight"
    width, channels = state[name].shape
    state[name] = torch.zeros(()).expand(width, channels * 2 // 3)
    message = difference(configs, preset, model=save(tmp_path / "model.pth", state))
    assert message.splitlines()[-1] == "  --set flow.model.reference=False"


def test_the_public_f8_has_its_attention_elsewhere(tmp_path, configs):
    apart = save(tmp_path / "vqvae.ckpt", listed("vqgan_f8"), holder="state_dict")
    model = save(tmp_path / "model.pth", main_model("kth", inside=False))
    assert re.search(
        r"levels \[3\] in vqvae.ckpt, .*levels \[2\]", difference(configs, "kth", model=model, autoencoder=apart)
    )


@pytest.mark.parametrize("family", ["vqvae", "vqgan"])
@pytest.mark.parametrize(
    "changes",
    [
        {"autoencoder": {"model": {"channels": 64}}, "flow": {"model": {"width": 64, "heads": 4, "head": "bn"}}},
        {"autoencoder": {"model": {"architecture": "vqvae", "norm_groups": 8, "levels": 2}}, "flow": {"model": {}}},
        {"autoencoder": {"model": {"channel_multipliers": [1, 1], "resolution": 1, "attention_resolutions": []}},
         "flow": {"model": {"reference": False}}, "refiner": {"model": {"tanh": True}}},
    ],
    ids=["channels", "vqvae", "attention"],
)  # fmt: skip
def test_the_options_in_the_message_make_a_configuration_fit(official, family, changes):
    official.autoencoder = official.make(family)
    files = OfficialFiles(model=official.model(), refiner=official.refiner_file())
    folder = official.path / "mine"
    folder.mkdir()
    path = folder / "wrong.yaml"
    path.write_text(yaml.safe_dump(official.config().model_dump(mode="json") | changes))
    with pytest.raises(UserError, match=r"does not fit the configuration:\n  autoencoder\.model") as error:
        import_official(load_config(path), RunContext(CPU), files, [folder])
    words = shlex.split(str(error.value).splitlines()[-1])
    assert words[::2] == ["--set"] * (len(words) // 2)
    config = load_config(path, words[1::2])
    import_official(config, RunContext(CPU), files)
    assert official.same(VideoPredictor.from_run(config.run_path, device="cpu").autoencoder, official.autoencoder)
