"""The configuration: what loads, and errors that name the key, the value and the way out."""

from pathlib import Path

import pytest
import torch
import yaml

from pipelines.config import differences, dump_config, fingerprint, load_config
from pipelines.errors import UserError
from stage1_autoencoder.families import build_autoencoder
from stage2_flow.vector_field import VectorField

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = sorted(path.name for path in CONFIGS.glob("*.yaml"))
BASIC = {"dataset": {"name": "toy", "source": "shapes"}}


@pytest.fixture
def write(tmp_path):
    def write(values: dict | str = BASIC, name: str = "toy.yaml") -> Path:
        path = tmp_path / name
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    return str(error.value)


def with_section(**sections) -> dict:
    return BASIC | sections


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_and_survive_a_round_trip(name, write):
    config = load_config(CONFIGS / name)
    assert config.dataset.name == name.removesuffix(".yaml")
    assert load_config(write(dump_config(config))) == config


def test_there_are_presets_for_all_data_sets():
    assert {"shapes.yaml", "kth.yaml", "bair_64.yaml", "bair_256.yaml", "clevrer.yaml", "videos.yaml"} <= set(PRESETS)


@pytest.mark.parametrize(
    ("name", "autoencoder", "latent_shape", "head", "context", "horizon"),
    [
        ("kth", 63.8, (4, 8, 8), "ln", 10, 30),
        ("bair_64", 63.8, (4, 8, 8), "ln", 1, 15),
        ("bair_256", 69.6, (8, 16, 16), "bn", 1, 15),
        ("clevrer", 7.3, (4, 16, 16), "ln", 2, 14),
    ],
)
def test_paper_presets_have_the_papers_sizes(name, autoencoder, latent_shape, head, context, horizon):
    config = load_config(CONFIGS / f"{name}.yaml")
    with torch.device("meta"):
        first = build_autoencoder(config.autoencoder.model)
        second = VectorField(config.flow.model, latent_shape[0])
    side = config.dataset.image_size // first.downsampling
    assert (config.autoencoder.model.latent_channels, side, side) == latent_shape
    assert round(second.parameter_count / 1e6, 1) == 98.1
    assert config.flow.model.head == head
    assert config.sampling.preset == "default"
    assert (config.evaluation.context, config.evaluation.horizon) == (context, horizon)
    assert config.autoencoder.model.codes == (8192 if name == "clevrer" else 16384)
    assert round(first.parameter_count / 1e6, 1) == autoencoder


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            with_section(flow={"training": {"step": 5}}),
            ["flow.training.step: unknown key in flow.training", 'did you mean "steps"?'],
        ),
        (with_section(flwo={}), ["flwo: unknown key", 'did you mean "flow"?']),
        (with_section(zzz=3), ["zzz: unknown key; known here: autoencoder, cache"]),
        (
            {"dataset": {"name": "toy", "source": "shapes", "shapes": {"radus": 3}}},
            ["dataset.shapes.radus", 'did you mean "radius"?'],
        ),
        (with_section(seed="many"), ["seed: 'many' is not allowed", "integer"]),
        (with_section(flow={"training": {"steps": 0}}), ["flow.training.steps: 0 is not allowed", "greater than 0"]),
        (with_section(flow={"model": {"dropout": 1.0}}), ["flow.model.dropout: 1.0 is not allowed", "less than 1"]),
        (
            with_section(sampling={"solver": "eular"}),
            ["sampling.solver: 'eular' is not allowed", "'euler', 'midpoint', 'heun', 'rk4' or 'rk4-38'"],
        ),
        (
            with_section(flow={"model": {"width": 10, "heads": 4}}),
            ["flow.model: width 10 must be a multiple of heads 4"],
        ),
        (with_section(flow=[1]), ["flow: [1] is not allowed"]),
        ({"seed": 1}, ["dataset: Field required"]),
        ({"dataset": {"name": "../up", "source": "shapes"}}, ["dataset.name: '../up' is not allowed"]),
        (
            {"dataset": {"name": "toy", "source": "shapes", "image_size": 60}},
            ["dataset.image_size: 60 is not a multiple of 8", "channel_multipliers [1, 2, 2, 4]"],
        ),
        (
            with_section(autoencoder={"model": {"channels": 48}}),
            ["autoencoder.model.norm_groups: 32 does not divide the 48 channels"],
        ),
        (
            with_section(autoencoder={"training": {"pool_memory": "lots"}}),
            ["autoencoder.training.pool_memory: 'lots'"],
        ),
        (
            {"dataset": {"name": "toy", "source": "shapes", "splits": {"train": 0.9}}},
            ["dataset: splits.train: 0.9 "],
        ),
    ],
)
def test_mistakes_are_named(write, values, expected):
    path = write(values)
    message = refused(path)
    assert str(path) in message
    for part in expected:
        assert part in message
    assert "\n" not in message


def test_all_mistakes_are_told_at_once(write):
    message = refused(write(with_section(seed=-1, flow={"training": {"stepz": 1}})))
    assert "seed: -1" in message
    assert "flow.training.stepz" in message


def test_overrides_win_over_the_file_and_later_ones_over_earlier(write):
    path = write(with_section(flow={"training": {"steps": 5, "batch_size": 7}}))
    config = load_config(path, ["flow.training.steps=6", "flow.training.steps=8", "sampling.past_horizon=null"])
    assert config.flow.training.steps == 8
    assert config.flow.training.batch_size == 7
    assert config.sampling.past_horizon is None


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("flow.training.learning_rate=1e-3", lambda c: c.flow.training.learning_rate, 1e-3),
        (
            "autoencoder.model.attention_resolutions=[16,32]",
            lambda c: c.autoencoder.model.attention_resolutions,
            (16, 32),
        ),
        ("cache.codes=false", lambda c: c.cache.codes, False),
        ("flow.training.grad_clip=null", lambda c: c.flow.training.grad_clip, None),
        ("dataset.name=a=b", None, None),
        ("logging={every: 3}", lambda c: c.logging.every, 3),
        ("paths.runs=somewhere/else", lambda c: str(c.run_path), str(Path("somewhere/else/toy"))),
    ],
)
def test_override_values_are_yaml(write, override, read, value):
    path = write()
    if read is None:
        assert "'a=b' is not allowed" in refused(path, override)
    else:
        assert read(load_config(path, [override])) == value


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("flow.training.stps=3", ["--set flow.training.stps=3:", 'did you mean "steps"?']),
        ("flow.trainin.steps=3", ["--set flow.trainin.steps=3:", 'did you mean "training"?']),
        ("flow.training.steps=abc", ["--set flow.training.steps=abc: flow.training.steps: 'abc' is not allowed"]),
        ("autoencoder.model.channel_multipliers=[1,x]", ["--set autoencoder.model.channel_multipliers=[1,x]:", "'x'"]),
        ("dataset.image_size=60", ["--set dataset.image_size=60: dataset.image_size: 60 is not a multiple of 8"]),
        ("flow.model.width=10", ["--set flow.model.width=10: flow.model: width 10"]),
        ("flow.training={steps: 0}", ["--set flow.training={steps: 0}: flow.training.steps: 0"]),
        ("flow.training.steps", ["--set flow.training.steps: expected key.path=value"]),
        ("=3", ["--set =3: expected key.path=value"]),
        ("flow.training.steps=[1", ["--set flow.training.steps=[1: the value is not YAML"]),
        ("seed.x=1", ["--set seed.x=1: seed is a value, not a section"]),
    ],
)
def test_mistakes_in_overrides_name_the_override(write, override, expected):
    message = refused(write(with_section(seed=3)), "logging.every=7", override)
    for part in expected:
        assert part in message
    assert "logging.every" not in message


def test_a_base_is_inherited_key_by_key(write):
    write(with_section(seed=5, flow={"training": {"steps": 5, "batch_size": 7}}), "grand.yaml")
    write({"base": "grand.yaml", "flow": {"training": {"steps": 6}}}, "parent.yaml")
    config = load_config(write({"base": "parent.yaml", "dataset": {"name": "child"}}, "child.yaml"))
    assert (config.seed, config.dataset.name, config.dataset.source) == (5, "child", "shapes")
    assert (config.flow.training.steps, config.flow.training.batch_size) == (6, 7)


def test_bases_in_a_circle_are_refused(write):
    write({"base": "b.yaml"}, "a.yaml")
    assert "b.yaml: `base`" in refused(write({"base": "a.yaml"}, "b.yaml"))
    assert "c.yaml: `base`" in refused(write({"base": "c.yaml"}, "c.yaml"))


def test_a_missing_base_is_named(write):
    message = refused(write({"base": "nothing.yaml"}, "a.yaml"))
    assert "nothing.yaml: no such config file" in message
    assert "shapes" in message  # the presets that there are
    assert "toy.yaml: base: 3 " in refused(write({"base": 3}))


def test_missing_and_foreign_files_are_named(write, tmp_path):
    write(BASIC, "shapes.yaml")
    message = refused(tmp_path / "shape.yaml")
    assert str(tmp_path / "shape.yaml") in message
    assert "shapes" in message
    assert "no such config file" in refused(tmp_path / "nowhere" / "x.yaml")
    assert "not a YAML file" in refused(write("a: [1"))
    assert "expected sections such as `dataset:`, found list" in refused(write("- 1"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "not a YAML file" in refused(tmp_path / "binary.yaml")


def test_fingerprints_are_equal_exactly_when_settings_are(write):
    path = write()
    config, same, other = load_config(path), load_config(path), load_config(path, ["flow.model.depth=2"])
    assert fingerprint(config.flow, "x") == fingerprint(same.flow, "x")
    assert fingerprint(config.flow, "x") != fingerprint(other.flow, "x") != fingerprint(other.flow, "y")


def test_differences_are_told_by_key():
    old, new = {"a": {"b": 1, "c": 2}, "d": None}, {"a": {"b": 1, "c": 3}, "e": 4}
    assert differences(new, old) == ["a.c: 2 -> 3", "e: None -> 4"]


@pytest.mark.parametrize(
    ("text", "mode"),
    [("off", "off"), ("false", "off"), ("true", "offline"), ("offline", "offline"), ("online", "online")],
)
def test_wandb_modes_survive_yaml(text, mode):
    assert load_config(CONFIGS / "shapes.yaml", [f"logging.wandb={text}"]).logging.wandb == mode
