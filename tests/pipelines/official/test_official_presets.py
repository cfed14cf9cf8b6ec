"""Files of the released models' true names and shapes: what is read off them, and which preset is named."""

import re
from ast import literal_eval
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipelines.config import load_config
from pipelines.errors import UserError
from pipelines.official import load_autoencoder, load_vector_field, read_official
from pipelines.official.importing import import_official
from pipelines.official.parts import FoundSizes, OfficialFiles, check_sizes
from pipelines.runtime.context import RunContext

# By preset: the lists of the autoencoder's and the field's parameters, and where the autoencoder is in the main model.
RELEASED = {
    "kth": ("vqgan_f8_small", "vector_field_regressor_kth_ln", "ae."),
    "bair_64": ("vqgan_f8_small", "vector_field_regressor_kth_ln", "ae."),
    "bair_256": ("vqgan_f16", "vector_field_regressor_bair256_bn", "ae."),
    "clevrer": ("vqvae_custom_clevrer", "vector_field_regressor_kth_ln", "ae.backbone."),
}
REFERENCE = "vector_field_regressor.project_in.1.weight"


def fitting(preset: str) -> list[str]:
    """All presets of a model's shapes."""
    return ["bair_64", "kth"] if preset in ("bair_64", "kth") else [preset]


@pytest.fixture
def configs(repository: Path) -> Path:
    return repository / "configs"


def listed(fixtures: Path, name: str, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of the shapes in a list, each of a single number: 400 MB that take none."""
    lines = (fixtures / "reference" / f"{name}.keys.txt").read_text().splitlines()
    shapes = {key: literal_eval(shape) for key, shape in (line.split("  ") for line in lines if line)}
    return {f"{prefix}{key}": torch.zeros(()).expand(shape) for key, shape in shapes.items()}


def save(path: Path, state: dict[str, Tensor], prefix: str = "", holder: str = "model") -> Path:
    torch.save({holder: {f"{prefix}{name}": tensor for name, tensor in state.items()}, "global_step": 3}, path)
    assert path.stat().st_size < 2e6
    return path


def main_model(fixtures: Path, preset: str, *, inside: bool = True) -> dict[str, Tensor]:
    autoencoder, field, where = RELEASED[preset]
    state = listed(fixtures, field, "vector_field_regressor.")
    return (listed(fixtures, autoencoder, where) if inside else {}) | state


def sizes_in(model: Path, autoencoder: Path | None = None) -> FoundSizes:
    content = read_official(model)
    field = load_vector_field(model, content)
    found = load_autoencoder(model, content) if autoencoder is None else load_autoencoder(autoencoder)
    return FoundSizes({"autoencoder": "vqvae", "flow": "model.pth"}, found.config, field.config)


@pytest.mark.parametrize("preset", RELEASED)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_released_models_fit_their_presets(
    tmp_path: Path, fixtures: Path, configs: Path, preset: str, prefix: str
) -> None:
    model = save(tmp_path / "model.pth", main_model(fixtures, preset), prefix)
    found, config = sizes_in(model), load_config(configs / f"{preset}.yaml")
    check_sizes(found, config, [configs])
    assert found.flow.model_dump(exclude={"dropout"}) == config.flow.model.model_dump(exclude={"dropout"})
    assert (found.autoencoder.latent_channels, found.autoencoder.codes, found.autoencoder.downsampling) == {
        "kth": (4, 16384, 8), "bair_64": (4, 16384, 8), "bair_256": (8, 16384, 16), "clevrer": (4, 8192, 8)
    }[preset]  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "other"),
    [(ours, other) for ours in RELEASED for other in (*RELEASED, "shapes") if other not in fitting(ours)],
)
def test_with_another_preset_the_one_that_fits_is_named(
    tmp_path: Path, fixtures: Path, configs: Path, preset: str, other: str
) -> None:
    model = save(tmp_path / "model.pth", main_model(fixtures, preset), "module.")
    config = load_config(configs / f"{other}.yaml", [f"paths.runs={tmp_path}/runs"])
    with pytest.raises(UserError, match=r"model.pth does not fit the configuration:") as error:
        import_official(config, RunContext(torch.device("cpu")), OfficialFiles(model=model), [configs])
    way_out = str(error.value).splitlines()[-1]
    assert re.findall(r"(\w+)\.yaml", way_out) == fitting(preset)
    assert way_out.endswith("name it with --config")
    assert not config.run_path.exists()


@pytest.mark.parametrize("preset", RELEASED)
def test_an_autoencoder_that_is_apart(tmp_path: Path, fixtures: Path, configs: Path, preset: str) -> None:
    model = save(tmp_path / "model.pth", main_model(fixtures, preset, inside=False), "module.")
    state = listed(fixtures, RELEASED[preset][0])
    if preset == "clevrer":
        apart = save(tmp_path / "vqvae.pth", state, "module.")
    else:
        state["loss.discriminator.main.0.weight"] = torch.zeros(64, 3, 4, 4)
        apart = save(tmp_path / "vqvae.ckpt", state, holder="state_dict")
    check_sizes(sizes_in(model, apart), load_config(configs / f"{preset}.yaml"), [configs])


@pytest.mark.parametrize("preset", RELEASED)
def test_without_a_reference(tmp_path: Path, fixtures: Path, configs: Path, preset: str) -> None:
    state = main_model(fixtures, preset)
    width, channels = state[REFERENCE].shape
    state[REFERENCE] = torch.zeros(()).expand(width, channels * 2 // 3)
    found = sizes_in(save(tmp_path / "model.pth", state))
    assert found.flow.reference is False
    with pytest.raises(UserError, match=r"no configuration .*\n  --set flow.model.reference=False$"):
        check_sizes(found, load_config(configs / f"{preset}.yaml"), [configs])
    check_sizes(found, load_config(configs / f"{preset}.yaml", ["flow.model.reference=false"]), [configs])


def test_the_public_f8_has_its_attention_elsewhere(tmp_path: Path, fixtures: Path, configs: Path) -> None:
    apart = save(tmp_path / "vqvae.ckpt", listed(fixtures, "vqgan_f8"), holder="state_dict")
    model = save(tmp_path / "model.pth", main_model(fixtures, "kth", inside=False))
    found = sizes_in(model, apart)
    with pytest.raises(UserError, match=r"attention at levels \[3\] in vqvae, \[2\] in the configuration"):
        check_sizes(found, load_config(configs / "kth.yaml"), [configs])
    check_sizes(found, load_config(configs / "kth.yaml", ["autoencoder.model.preset=f8"]), [configs])
