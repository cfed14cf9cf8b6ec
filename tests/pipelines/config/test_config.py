"""The configuration: what loads, and errors that name the key, the value and the way out."""

import os
from pathlib import Path

import pytest
import torch
import yaml

from pipelines.config import (
    differences,
    dump_config,
    find_preset,
    load_config,
    parse_config,
    result_settings,
    with_defaults,
)
from pipelines.errors import UserError
from stage1_autoencoder.families import build_autoencoder
from stage2_flow.vector_field import VectorField

CONFIGS = Path(__file__).parents[3] / "configs"
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
        (
            with_section(flow={"training": {"time_mean": -0.5}}),
            ["flow.training: time_mean -0.5 belongs to time_sampling: logit_normal"],
        ),
        (with_section(flow=[1]), ["flow: [1] is not allowed"]),
        ({"seed": 1}, ["dataset: Field required"]),
        ({"dataset": {"name": "../up", "source": "shapes"}}, ["dataset.name: '../up' is not allowed"]),
        (
            {"dataset": {"name": "toy", "source": "shapes", "image_size": 60}},
            ["dataset.image_size: 60 is not a multiple of 8", "channel_multipliers [1, 2, 2, 4]", "56 or 64"],
        ),
        (
            {"dataset": {"name": "toy", "source": "videos", "image_size": [70, 128]}},
            ["dataset.image_size: [70, 128] is not a multiple of 8", "[64, 128] or [72, 128]"],
        ),
        (
            {"dataset": {"name": "toy", "source": "videos", "image_size": [72, 128, 3]}},
            ["dataset.image_size: [72, 128, 3] is not allowed"],
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
        ("seed=017", lambda c: c.seed, 17),
        ("flow.training.steps=1e3", lambda c: c.flow.training.steps, 1000),
        ("dataset.root='/videos/take #2'", lambda c: c.dataset.root, "/videos/take #2"),
        (f"seed={2**63 - 1}", lambda c: c.seed, 2**63 - 1),
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
        ("dataset.root=/videos/take #2", ["--set dataset.root=/videos/take #2:", "comment"]),
        ("a." * 50 + "b=1", ["at most"]),
        ("flow.training={steps: 3, steps: 4}", ["--set flow.training={steps: 3, steps: 4}:", "'steps'"]),
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


def test_frames_that_are_not_square(write):
    wide = load_config(write(), ["dataset.image_size=[72, 128]", "dataset.fit=pad"])
    assert wide.dataset.frame_size == (72, 128)
    assert load_config(write(yaml.safe_load(dump_config(wide)), "dumped.yaml")) == wide
    square, pair = (load_config(write(), [f"dataset.image_size={size}"]).dataset for size in (64, "[64, 64]"))
    assert square == pair
    assert square.frame_size == (64, 64)
    assert pair.model_dump(mode="json")["image_size"] == 64


def test_a_record_lacks_keys_that_are_newer(write):
    """They were at their defaults."""
    flow = load_config(write(), ["flow.model.recent_frames=2"]).flow
    ours, recorded = result_settings(flow), result_settings(flow)
    del recorded["model"]["recent_frames"], recorded["training"]["betas"]
    recorded["model"]["gone"] = 1
    filled = with_defaults(recorded, ours, flow)
    assert differences(ours, filled) == ["model.gone: 1 -> None", "model.recent_frames: 1 -> 2"]
    assert "recent_frames" not in recorded["model"]


def test_differences_are_told_by_key():
    old, new = {"a": {"b": 1, "c": 2}, "d": None}, {"a": {"b": 1, "c": 3}, "e": 4}
    assert differences(new, old) == ["a.c: 2 -> 3", "e: None -> 4"]


@pytest.mark.parametrize(
    ("text", "mode"),
    [("off", "off"), ("false", "off"), ("true", "offline"), ("offline", "offline"), ("online", "online")],
)
def test_wandb_modes_survive_yaml(text, mode):
    assert load_config(CONFIGS / "shapes.yaml", [f"logging.wandb={text}"]).logging.wandb == mode


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=yes", "'yes'"),
        ("seed=on", "'on'"),
        ("seed=1:30", "'1:30'"),
        ("seed=true", "true"),
        (f"seed={2**63}", str(2**63)),
        ("seed=-1", "-1"),
        ("seed=.inf", "inf"),
        (f"sampling.seed={2**63}", str(2**63)),
        (f"evaluation.seed={2**63}", str(2**63)),
        (f"dataset.split_seed={2**63}", str(2**63)),
        (f"flow.training.steps={2**63}", str(2**63)),
        ("dataset.image_size=1000000", "1000000"),
        ("flow.model.width=1000000", "1000000"),
        ("flow.model.depth=1000000", "1000000"),
        ("flow.model.width=65536", "65536"),
        ("flow.training.batch_size=100000000", "100000000"),
        ("autoencoder.model={architecture: vqvae, levels: 1000000}", "1000000"),
        ("autoencoder.model.channels=1000000", "1000000"),
        ("autoencoder.training.adversarial.layers=1000000", "1000000"),
        ("evaluation.resamples=1000000000000", "1000000000000"),
        ("cache.memory_budget=99999999999 TiB", "'99999999999 TiB'"),
        ("cache.memory_budget='" + "9" * 400 + "'", "9999"),
        ("cache.memory_budget=0 GiB", "'0 GiB'"),
        ("flow.training.betas.0=1.0", None),
        ("flow.training.betas=[1.0, 0.9]", "1.0"),
        ("autoencoder.training.betas=[0.9, -0.1]", "-0.1"),
        ("autoencoder.training.adversarial.betas=[0.9, 2]", "2"),
        ("refiner.training.betas=[0.9, .nan]", "nan"),
        ("flow.training.learning_rate=.inf", "inf"),
        ("flow.training.learning_rate=1e400", "inf"),
        ("flow.training.weight_decay=.nan", "nan"),
        ("flow.training.weight_decay='nan'", "nan"),
        ("flow.training.weight_decay=true", "true"),
        ("autoencoder.training.l1_weight=-.inf", "inf"),
        ("flow.training.compile=maybe", "'maybe'"),
        ("sampling.batch_size=true", "true"),
        ("sampling.batch_size=big", "'big'"),
        ("dataset.splits={train: [1]}", "[1]"),
        ("dataset.splits={train: true}", "true"),
        ("dataset.splits={foo: 1}", "foo"),
        ("dataset.splits.train=100000000000", "100000000000"),
        ("dataset.name=" + "x" * 300, "xxx"),
        ("autoencoder.model=3", "3"),
        ("autoencoder.model.channel_multipliers=[null]", "null"),
        ("flow=true", "true"),
        ("seed=" + "9" * 5000, None),
        ("flow.training.learning_rate=" + "9" * 5000, None),
        ("seed.a.b.c.d.e.f=1", "{"),
        ("seed=!!python/name:os.system x", None),
    ],
)
def test_a_refusal_is_one_line_with_key_and_value(override, value):
    message = refused(CONFIGS / "shapes.yaml", override)
    assert len(message.splitlines()) == 1
    assert override.partition("=")[0] in message
    if value is not None:
        told = message.replace(f"--set {override}", "", 1)
        assert value in told
        assert len(told) < 700


def dotted(values: dict, prefix: str = "") -> list[str]:
    """All keys of nested sections."""
    inner = [name for key, value in values.items() if isinstance(value, dict) for name in dotted(value, f"{key}.")]
    return [prefix + name for name in (*values, *inner)]


def test_no_value_of_any_key_ends_in_a_traceback():
    vqvae = {"model": {"architecture": "vqvae"}}
    whole = (parse_config(values, "a test").model_dump() for values in (BASIC, with_section(autoencoder=vqvae)))
    keys = {*(key for values in whole for key in dotted(values)), "autoencoder.model.preset", "dataset.splits.val"}
    assert len(keys) > 150
    for key in keys:
        for value in (None, True, -1, 10**300, 1e300, float("nan"), "x", "1:30", [], [[None]], {}, {"a": {"b": 1}}):
            try:
                parse_config(nested(key, value), "a test")
            except UserError as error:
                lines = str(error).splitlines()
                assert len({line.partition(" is not allowed")[0] for line in lines}) == len(lines)


@pytest.mark.parametrize("word", ["none", "None", "yes", "no"])
def test_words_that_are_no_numbers_in_a_file(write, word):
    assert f"seed: '{word}'" in refused(write(f"dataset: {{name: toy, source: shapes}}\nseed: {word}\n"))


def test_the_smallest_and_largest_betas(write):
    assert load_config(write(), ["flow.training.betas=[0, 0.9999]"]).flow.training.betas == (0, 0.9999)


def test_null_is_the_default_again(write):
    base = write(
        {
            "dataset": {"name": "people", "source": "kth", "image_size": 32, "splits": {"train": "1-19", "test": 20}},
            "seed": 3,
            "flow": {"model": {"width": 32}, "training": {"grad_clip": 2.0, "steps": 5}},
            "autoencoder": {"model": {"channels": 32}},
        },
        "people.yaml",
    )
    own = write(
        "base: people\ndataset: {name: own, source: videos, splits: null}\nseed: null\nflow: null\n", "own.yaml"
    )
    config, fresh = load_config(own), load_config(write())
    assert (config.dataset.splits, config.dataset.image_size) == ({}, 32)
    assert (config.seed, config.flow) == (0, fresh.flow)
    assert config.autoencoder.model.channels == 32
    assert load_config(base, ["dataset.splits=null"]).dataset.splits == {}
    assert load_config(base, ["dataset.splits={test: null}"]).dataset.splits == {}
    assert load_config(base, ["dataset.splits.test=null"]).dataset.splits == {"train": "1-19"}
    assert load_config(base, ["flow=null", "flow.training.steps=7"]).flow.training.steps == 7
    # Null is itself a value of grad_clip.
    assert load_config(base, ["flow.training.grad_clip=null"]).flow.training == load_config(
        base, ["flow.training=null", "flow.training.steps=5"]
    ).flow.training.model_copy(update={"grad_clip": None})
    for override in ("dataset=null", "dataset.name=null"):
        assert f"{override.partition('=')[0]}: " in refused(base, override)
    assert "nothing: unknown key" in refused(base, "nothing=null")


def test_a_mapping_that_two_sections_share_is_set_in_one(write):
    text = "dataset: {name: toy, source: shapes}\nautoencoder: {training: &t {steps: 5}}\nflow: {training: *t}\n"
    config = load_config(write(text), ["flow.training.steps=9"])
    assert (config.autoencoder.training.steps, config.flow.training.steps) == (5, 9)


PATH_KEYS = (
    "paths.data",
    "paths.latents",
    "paths.runs",
    "dataset.root",
    "autoencoder.training.vgg_weights",
    "refiner.training.perceptual_network",
    "evaluation.video_network",
)


def value_at(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("key", PATH_KEYS)
def test_paths_expand(write, key, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DISK", str(tmp_path / "disk"))
    path = write()
    for text, expected in (("~/x", "home/x"), ("$DISK/x", "disk/x"), ("${DISK}s/x", "disks/x")):
        for config in (load_config(path, [f"{key}={text}"]), load_config(write(nested(key, text), "other.yaml"))):
            assert value_at(config, key) == str(tmp_path / expected)
    for text, missing in (("$NO_SUCH_DISK/x", "NO_SUCH_DISK"), ("~nobody-of-this-name/x", "nobody-of-this-name")):
        message = refused(path, f"{key}={text}")
        assert f"{key}: '{text}' is not allowed" in message
        assert missing in message.partition("is not allowed")[2]


def nested(key: str, value: object) -> dict:
    """BASIC with one more key."""
    values = {name: dict(section) for name, section in BASIC.items()}
    inner, (*sections, last) = values, key.split(".")
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[last] = value
    return values


@pytest.mark.parametrize("key", PATH_KEYS)
def test_relative_paths_belong_to_their_file(write, key, tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    write(nested(key, "../disk/x"), "project/base.yaml")
    own = write({"base": "project/base.yaml"}, "own.yaml")
    monkeypatch.chdir(tmp_path / "project")
    for path in (own, "base.yaml", "../own.yaml"):
        assert value_at(load_config(path), key) == str(tmp_path / "disk" / "x")
    # On the command line they belong to the working folder.
    assert os.path.abspath(value_at(load_config(own, [f"{key}=y"]), key)) == str(tmp_path / "project" / "y")
    # A written configuration holds wherever it is put.
    dumped = write(dump_config(load_config(own, [f"{key}=y"])), "dumped.yaml")
    monkeypatch.chdir(tmp_path)
    assert value_at(load_config(dumped), key) == str(tmp_path / "project" / "y")


def test_default_roots_are_in_the_working_folder(write):
    written = write(BASIC | {"paths": {"data": "data", "latents": "./latents"}})
    config = load_config(written)
    assert (config.data_root, config.run_path) == (Path("data"), Path("runs/toy"))
    assert config.store_path == written.parent / "latents" / "toy.zarr"


def test_a_root_below_the_root_of_data_stays(write):
    config = load_config(write(nested("dataset.root", "{data}/kth")), ["paths.data=/disk"])
    assert config.dataset.root == "{data}/kth"


def test_a_base_is_beside_its_file_then_among_the_presets(write, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    write(with_section(seed=5), "kth.yaml")
    write(with_section(seed=6), "work/kth.yaml")
    monkeypatch.chdir(tmp_path / "work")
    for base in ("kth.yaml", "kth", "./kth.yaml"):
        assert load_config(write({"base": base}, "own.yaml")).seed == 5
    (tmp_path / "kth.yaml").unlink()
    for base in ("kth.yaml", "kth", "configs/kth.yaml"):
        assert load_config(write({"base": base}, "own.yaml")).dataset.source == "kth"
    message = refused(write({"base": "khts"}, "own.yaml"))
    assert "own.yaml: base: khts" in message
    assert "kth" in message


def test_a_bare_name_is_the_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").write_text("no configuration")
    (tmp_path / "kth.yaml").write_text("dataset: {name: mine, source: kth}")
    assert load_config("shapes").dataset.name == "shapes"
    assert load_config("kth").dataset.name == "kth"
    assert load_config("kth.yaml").dataset.name == "mine"
    assert find_preset("./kth.yaml") == Path("kth.yaml")
