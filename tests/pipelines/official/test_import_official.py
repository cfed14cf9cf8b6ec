"""`import-official`: official files become a run that counts as trained, and predicts what the official code does."""

import argparse
import hashlib
import json
import re
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipelines.__main__ import main
from pipelines.config import RiverConfig, load_config, parse_config
from pipelines.data.fetch import FetchError
from pipelines.errors import UserError
from pipelines.loading import (
    find_autoencoder,
    find_flow,
    find_refiner,
    load_trained_autoencoder,
    load_trained_field,
    load_trained_refiner,
    weights_digest,
)
from pipelines.official import load_autoencoder, load_vector_field
from pipelines.official import official_download as import_download
from pipelines.official.importing import import_official
from pipelines.official.parts import FoundSizes, OfficialFiles, check_sizes
from pipelines.predictor import VideoPredictor
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.context import RunContext
from pipelines.runtime.runs import only_training_of
from pipelines.training.autoencoder_stage import train_autoencoder
from pipelines.training.flow_stage import train_flow
from stage1_autoencoder.config import RefinerModelConfig, VQGANConfig, VQVAEConfig
from stage1_autoencoder.rcan import RCAN
from stage1_autoencoder.vqgan import VQGAN
from stage1_autoencoder.vqvae import VQVAE
from stage2_flow.config import VectorFieldConfig
from stage2_flow.vector_field import VectorField

VQVAE_SIZES = VQVAEConfig(channels=32, levels=1, codes=16)
VQGAN_SIZES = VQGANConfig(
    channels=32, channel_multipliers=(1, 2), blocks=1, attention_resolutions=(8,), resolution=16, codes=16
)
FIELD_SIZES = VectorFieldConfig(width=32, depth=1, mid_depth=1)
REFINER_SIZES = RefinerModelConfig(groups=1, blocks=1, features=8, reduction=4)
CPU = torch.device("cpu")


class Kit:
    """Official files of small random networks, and the configuration that fits them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.autoencoder: VQGAN | VQVAE = VQVAE(VQVAE_SIZES)
        self.field = VectorField(FIELD_SIZES, 4)
        self.refiner = RCAN(REFINER_SIZES)

    def config(self, **changes: Any) -> RiverConfig:
        """The configuration; `changes` replaces whole sections of it, `flow_training` and the like a part of one."""
        values = {
            "paths": {name: str(self.folder / name) for name in ("data", "latents", "runs")},
            "dataset": {"name": "kth", "source": "shapes", "image_size": 16, "frame_step": 5,
                        "splits": {"train": 2, "val": 1, "test": 1}},
            "autoencoder": {"model": self.autoencoder.config.model_dump(), "training": {"steps": 70}},
            "flow": {"model": self.field.config.model_dump(), "training": {"steps": 90}},
            "refiner": {"model": self.refiner.config.model_dump(), "training": {"steps": 50}},
            "sampling": {"preset": "official", "steps": 4},
        }  # fmt: skip
        return parse_config(values | changes, "a test")

    def model(self, name: str = "model.pth", *, inside: bool = True, prefix: str = "module.", **more: Any) -> Path:
        state = {f"vector_field_regressor.{name}": tensor for name, tensor in self.field.state_dict().items()}
        custom = isinstance(self.autoencoder, VQVAE)
        names = {"quantizer.": "vector_quantizer."} if custom else {"quantizer.": "quantize."}
        if inside:
            state |= {
                f"ae.{'backbone.' if custom else ''}{_renamed(name, names)}": tensor
                for name, tensor in self.autoencoder.state_dict().items()
            }
        content = {"model": {f"{prefix}{name}": tensor for name, tensor in state.items()}}
        torch.save(content | {"global_step": 13, "optimizer": {}} | more, self.folder / name)
        return self.folder / name

    def autoencoder_file(self, name: str = "vqvae.pth") -> Path:
        state = self.autoencoder.state_dict()
        if isinstance(self.autoencoder, VQVAE):
            content = {
                "model": {_renamed(f"module.{n}", {"quantizer.": "vector_quantizer."}): t for n, t in state.items()}
            }
        else:
            content = {"state_dict": {_renamed(n, {"quantizer.": "quantize."}): t for n, t in state.items()}}
        torch.save(content | {"epoch": 3, "global_step": 5}, self.folder / name)
        return self.folder / name

    def refiner_file(self) -> Path:
        state = {f"module.{name}": tensor for name, tensor in self.refiner.state_dict().items()}
        torch.save({"refiner": state, "epoch": 1, "args": argparse.Namespace(a=1)}, self.folder / "refiner.pth")
        return self.folder / "refiner.pth"

    def run(self, config: RiverConfig | None = None, *, restart: bool = False, **files: Path) -> Path:
        """Import; gives the run's folder."""
        config = config or self.config()
        import_official(config, RunContext(CPU, restart=restart), OfficialFiles(**files))
        return config.run_path


def _renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = re.sub(rf"(^|\.){re.escape(old)}", rf"\g<1>{new}", name)
    return name


def randomise(network: torch.nn.Module) -> None:
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else torch.randn_like(tensor) * 0.2)


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    left, right = ours.state_dict(), theirs.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kit:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    torch.manual_seed(0)
    made = Kit(tmp_path)
    for network in (made.autoencoder, made.field, made.refiner):
        randomise(network)
    return made


def no_training(*_: Any, **__: Any) -> None:
    raise AssertionError("nothing is to be trained")


@pytest.mark.parametrize("family", ["vqvae", "vqgan"])
@pytest.mark.parametrize("apart", [False, True], ids=["inside", "apart"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"head": "bn"}, {"reference": False}, {"head": "bn", "reference": False, "depth": 2, "mid_depth": 0}],
    ids=str,
)
def test_a_run_predicts_with_the_weights_of_the_files(given, family, apart, changes):
    if family == "vqgan":
        given.autoencoder = VQGAN(VQGAN_SIZES)
        randomise(given.autoencoder)
    given.field = VectorField(FIELD_SIZES.model_copy(update=changes), 4)
    randomise(given.field)
    files = {"model": given.model(inside=not apart)} | ({"autoencoder": given.autoencoder_file()} if apart else {})
    predictor = VideoPredictor.from_run(given.run(**files), device="cpu")
    assert same(predictor.vector_field, load_vector_field(files["model"]))
    assert same(predictor.autoencoder, load_autoencoder(files["autoencoder" if apart else "model"]))
    assert same(predictor.autoencoder, given.autoencoder)
    assert not any(network.training for network in (predictor.autoencoder, predictor.vector_field))
    assert (predictor.standardization.mean.tolist(), predictor.standardization.std.tolist()) == ([0.0] * 4, [1.0] * 4)
    images = torch.rand(1, 2, 3, 16, 16) * 2 - 1
    assert predictor.generate_frames(images, 1).shape == (1, 3, 3, 16, 16)


def test_the_run_says_where_it_comes_from(given):
    config = given.config()
    run = given.run(config, model=given.model())
    assert load_config(run / "config.yaml") == config
    assert json.loads((run / "environment.json").read_text())["software"]["torch"]
    flow, autoencoder = find_flow(run), find_autoencoder(run)
    assert (flow.step, autoencoder.step) == (13, 70)
    for found, network in ((flow, given.field), (autoencoder, given.autoencoder)):
        imported = found.state["imported"]
        assert imported["file"] == "model.pth"
        assert re.fullmatch(r"[0-9a-f]{64}", imported["sha256"])
        assert imported["weights"] == weights_digest(network)
        assert [file.name for file in sorted(found.path.iterdir())] == ["model.safetensors", "state.json"]
    assert flow.state["latent_shape"] == [4, 8, 8]
    assert flow.state["fps"] == 5
    assert flow.state["store"] == {"path": None, "fingerprint": None, "autoencoder": weights_digest(given.autoencoder)}


@pytest.mark.parametrize(
    "changes",
    [{}, {"seed": 5}, {"flow_training": {"steps": 10**6, "batch_size": 3, "standardize": True}},
     {"autoencoder_training": {"learning_rate": 0.1, "steps": 10**6}}, {"flow_model": {"dropout": 0.5}},
     {"sampling": {"steps": 2}}],
    ids=str,
)  # fmt: skip
def test_both_trainings_are_done_whatever_a_training_would_be_like(given, monkeypatch, capsys, changes):
    run = given.run(model=given.model())
    before = files_of(run)
    for place in ("autoencoder_stage.open_videos", "flow_stage.ensure_store"):
        monkeypatch.setattr(f"pipelines.training.{place}", no_training)
    values = given.config().model_dump(mode="json")
    for key, value in changes.items():
        section, _, part = key.partition("_")
        values[section] = values[section] | {part: values[section][part] | value} if part else value
    config, run_context = parse_config(values, "a test"), RunContext(CPU)
    assert train_autoencoder(config, run_context).path == find_autoencoder(run).path
    assert train_flow(config, run_context).path == find_flow(run).path
    out = capsys.readouterr().out
    assert "autoencoder: done, imported from model.pth" in out
    assert "flow: done, imported from model.pth" in out
    assert files_of(run) == before


@pytest.mark.parametrize(
    ("section", "changes", "train", "message"),
    [
        ("flow", {"width": 64}, train_flow, "flow.model.width: 32 -> 64"),
        ("flow", {"head": "bn"}, train_flow, "flow.model.head: ln -> bn"),
        ("autoencoder", {"codes": 32}, train_autoencoder, "autoencoder.model.codes: 16 -> 32"),
        ("dataset", {"image_size": 32}, train_autoencoder, "dataset.image_size: 16 -> 32"),
    ],
)
def test_a_configuration_of_other_sizes_contradicts(given, section, changes, train, message):
    given.run(model=given.model())
    values = given.config().model_dump(mode="json")
    if section == "dataset":
        values["dataset"] |= changes
    else:
        values[section]["model"] |= changes
    with pytest.raises(UserError, match=rf"was imported from model.pth under another .*\n  {message}\n.*--restart"):
        train(parse_config(values, "a test"), RunContext(CPU))


def test_importing_again_changes_nothing(given, capsys):
    files = {"model": given.model(), "refiner": given.refiner_file()}
    run = given.run(**files)
    before = files_of(run)
    capsys.readouterr()
    given.run(**files)
    assert files_of(run) == before
    out = capsys.readouterr().out
    assert re.findall(r"(\w+): done before", out) == ["autoencoder", "flow", "refiner"]
    # The same weights out of another file are the same.
    given.run(model=given.model("copy.pth", prefix="", epoch=1), autoencoder=given.autoencoder_file())
    assert files_of(run) == before


def test_other_weights_never_replace_what_is_there_silently(given):
    run = given.run(model=given.model())
    before = files_of(run)
    randomise(given.field)
    other = given.model("other.pth")
    with pytest.raises(UserError, match=r"was imported from model.pth, and .*other.pth would replace it: .*--restart"):
        given.run(model=other)
    assert files_of(run) == before
    given.run(model=other, restart=True)
    assert same(load_trained_field(find_flow(run), CPU), given.field)
    aside = [path for path in run.iterdir() if path.name.startswith("flow.")]
    assert len(aside) == 1
    kept = {name: content for name, content in before.items() if name.startswith("flow/")}
    assert {f"flow/{name}": content for name, content in files_of(aside[0]).items()} == kept
    assert not [path for path in run.iterdir() if path.name.startswith("autoencoder.")]  # that is the same


def test_the_same_weights_for_other_frames_or_another_autoencoder_are_not_the_same(given):
    model = given.model(inside=False)
    run = given.run(model=model, autoencoder=given.autoencoder_file())
    values = given.config().model_dump(mode="json")
    values["dataset"]["image_size"] = 32
    with pytest.raises(
        UserError, match=r"autoencoder/.* was imported from vqvae.pth, and .*vqvae.pth would replace it"
    ):
        given.run(parse_config(values, "a test"), autoencoder=given.autoencoder_file())
    randomise(given.autoencoder)
    given.run(autoencoder=given.autoencoder_file(), restart=True)
    with pytest.raises(UserError, match=r"flow/.* was imported from model.pth, and .*model.pth would replace it"):
        given.run(model=model)
    given.run(model=model, restart=True)
    assert VideoPredictor.from_run(run, device="cpu").fps == 5


def test_what_was_trained_here_is_never_replaced_silently(given):
    config = given.config()
    trained = CheckpointFolder(config.run_path / "autoencoder" / "checkpoints")
    trained.save(70, {"model": given.autoencoder.state_dict()}, {"model": VQVAE_SIZES.model_dump(), "identity": {}})
    before = files_of(config.run_path)
    with pytest.raises(UserError, match=r"step_00000070 was trained here, and .*model.pth would replace it"):
        given.run(config, model=given.model())
    assert files_of(config.run_path) == before
    given.run(config, model=given.model(), restart=True)
    assert VideoPredictor.from_run(config.run_path, device="cpu").fps == 5
    assert [path.name.partition(".")[0] for path in config.run_path.iterdir() if "20" in path.name] == ["autoencoder"]


def test_an_autoencoder_alone_is_enough_to_begin_with(given, capsys):
    run = given.run(autoencoder=given.autoencoder_file())
    assert find_flow(run) is None
    assert same(load_trained_autoencoder(find_autoencoder(run), CPU), given.autoencoder)
    assert "next: `encode` the videos, then `train-flow`" in capsys.readouterr().out
    # The model that was trained on it can come later, also without it.
    given.run(model=given.model(inside=False))
    assert VideoPredictor.from_run(run, device="cpu").fps == 5


def test_the_autoencoder_inside_the_model_wins(given, capsys):
    model = given.model()
    inside = weights_digest(given.autoencoder)
    randomise(given.autoencoder)
    run = given.run(model=model, autoencoder=given.autoencoder_file())
    assert find_autoencoder(run).state["imported"]["weights"] == inside
    assert "model.pth holds its autoencoder;" in capsys.readouterr().out


@pytest.mark.parametrize("which", ["model", "refiner"])
def test_without_any_autoencoder_it_is_refused(given, which):
    file = given.model(inside=False) if which == "model" else given.refiner_file()
    with pytest.raises(UserError, match=rf"{file} works on .*, and .*runs/kth has none: .*--autoencoder vqvae.ckpt"):
        given.run(**{which: file})
    assert not given.config().run_path.exists()
    folder = CheckpointFolder(given.config().run_path / "autoencoder" / "checkpoints")
    folder.save(1, {"model": given.autoencoder.state_dict()}, {"model": VQVAE_SIZES.model_dump(), "identity": {}})
    with pytest.raises(UserError, match=rf"{file} works on the latents of another autoencoder than .*trained here"):
        given.run(**{which: file})


def test_a_refiner_comes_along(given):
    run = given.run(model=given.model(), refiner=given.refiner_file())
    found = find_refiner(run)
    assert same(load_trained_refiner(found, CPU), given.refiner)
    assert found.state["autoencoder"] == weights_digest(given.autoencoder)
    assert found.state["imported"]["file"] == "refiner.pth"


def test_files_that_were_not_trained_together_are_refused(given):
    model = given.model(inside=False)
    given.autoencoder = VQVAE(VQVAE_SIZES.model_copy(update={"latent_channels": 6}))
    with pytest.raises(UserError, match=r"model.pth predicts latents of 4 channels, but .*vqvae.pth makes 6"):
        given.run(model=model, autoencoder=given.autoencoder_file())


def test_a_flow_of_another_autoencoder_is_told(given, capsys):
    run = given.run(model=given.model())
    randomise(given.autoencoder)
    given.run(autoencoder=given.autoencoder_file(), restart=True)
    assert "warning: " in (err := capsys.readouterr().err)
    assert "knows another autoencoder's latents" in err
    with pytest.raises(UserError, match="trained on latents of autoencoder"):
        VideoPredictor.from_run(run, device="cpu")


@pytest.mark.parametrize("family", ["vqvae", "vqgan"])
@pytest.mark.parametrize(
    "wanted",
    [
        {"autoencoder": {"model": {"channels": 64}}, "flow": {"model": {"width": 64, "heads": 4, "head": "bn"}}},
        {"autoencoder": {"model": {"architecture": "vqvae", "norm_groups": 8, "levels": 2}}, "flow": {"model": {}}},
        {"autoencoder": {"model": {"channel_multipliers": [1, 1], "resolution": 1, "attention_resolutions": []}},
         "flow": {"model": {"reference": False}}, "refiner": {"model": {"tanh": True}}},
    ],
    ids=["channels", "vqvae", "attention"],
)  # fmt: skip
def test_a_configuration_of_other_sizes_is_refused_with_the_options_that_fit(given, tmp_path, family, wanted):
    if family == "vqgan":
        given.autoencoder = VQGAN(VQGAN_SIZES)
    files = {"model": given.model(), "refiner": given.refiner_file()}
    values = given.config().model_dump(mode="json") | wanted
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "wrong.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"model.pth.* does not fit the configuration:\n  autoencoder.model") as error:
        import_official(load_config(path), RunContext(CPU), OfficialFiles(**files), [tmp_path / "mine"])
    assert not load_config(path).run_path.exists()
    words = shlex.split(str(error.value).splitlines()[-1])
    assert words[::2] == ["--set"] * (len(words) // 2)
    fitting = load_config(path, words[1::2])
    given.run(fitting, **files)
    assert same(load_trained_autoencoder(find_autoencoder(fitting.run_path), CPU), given.autoencoder)


@pytest.mark.parametrize(
    ("preset", "fitting"),
    [("kth", ["bair_64", "kth"]), ("bair_256", ["bair_256"]), ("clevrer", ["clevrer"])],
)
def test_the_configurations_of_the_released_weights_are_named(repository, preset, fitting):
    configs = repository / "configs"
    config = load_config(configs / f"{preset}.yaml")
    found = FoundSizes({"autoencoder": "vqvae", "flow": "model"}, config.autoencoder.model, config.flow.model)
    for name in fitting:
        check_sizes(found, load_config(configs / f"{name}.yaml"), [configs])
    with pytest.raises(UserError, match=r"these are the sizes of .*: name it with --config") as error:
        check_sizes(found, load_config(configs / "shapes.yaml"), [configs, configs])
    named = re.findall(r"(\w+)\.yaml", str(error.value))
    assert named == fitting


def test_heads_are_eight_unless_told(given):
    values = given.config().model_dump(mode="json")
    values["flow"]["model"]["heads"] = 4
    with pytest.raises(UserError, match=r"flow.model.heads: 8 in model.pth, 4 in the configuration"):
        given.run(parse_config(values, "a test"), model=given.model())
    given.field = VectorField(VectorFieldConfig(width=36, depth=1, mid_depth=1, heads=9), 4)
    with pytest.raises(UserError, match="width 36 must be a multiple of heads 8: name their number with --heads"):
        given.run(model=given.model())
    (given.folder / "c.yaml").write_text(yaml.safe_dump(given.config().model_dump(mode="json")))
    common = ["import-official", "--config", str(given.folder / "c.yaml"), "--device", "cpu"]
    assert main([*common, "--model", str(given.model()), "--heads", "9"]) == 0
    assert load_trained_field(find_flow(given.config().run_path), CPU).config.heads == 9


def test_half_precision_files_give_a_run_that_is_whole(given):
    given.field = VectorField(FIELD_SIZES.model_copy(update={"head": "bn"}), 4)
    content = torch.load(given.model(), weights_only=True)
    halved = {name: tensor.half() for name, tensor in content["model"].items()}
    torch.save({"model": halved}, given.folder / "half.pth")
    run = given.run(model=given.folder / "half.pth")
    predictor = VideoPredictor.from_run(run, device="cpu")
    dtypes = {tensor.dtype for tensor in predictor.vector_field.state_dict().values()}
    assert dtypes == {torch.float32, torch.int64}
    assert find_flow(run).step == 90  # the file does not tell: as many as the configuration wants


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the files: --model model.pth.*--download .there are some for kth, bair_64"),
        (["--model", "absent.pth"], "--model .*absent.pth: no such file"),
        (["--autoencoder", "."], "--autoencoder .*: is a folder"),
        (["--model", "vqvae.pth"], "holds no vector field: pass the main model"),
        (["--autoencoder", "refiner.pth"], "holds neither 'model' .* nor 'state_dict' .*, but refiner"),
        (["--refiner", "model.pth"], "holds no 'refiner'"),
        (["--model", "cut.pth"], "cut.pth is truncated or no torch.save file.*download it again"),
    ],
    ids=range(7),
)
def test_the_command_says_what_is_wrong(given, capsys, arguments, message):
    given.model(), given.autoencoder_file(), given.refiner_file()
    (given.folder / "cut.pth").write_bytes((given.folder / "model.pth").read_bytes()[:5000])
    (given.folder / "c.yaml").write_text(yaml.safe_dump(given.config().model_dump(mode="json")))
    places = [str(given.folder / word) if not word.startswith("--") else word for word in arguments]
    assert main(["import-official", "--config", str(given.folder / "c.yaml"), "--device", "cpu", *places]) == 2
    assert re.search(f"^import-official: .*{message}", capsys.readouterr().err)
    assert not given.config().run_path.exists()


def test_the_command_imports_and_the_others_go_on(given, capsys, monkeypatch):
    monkeypatch.chdir(given.folder)
    values = given.config().model_dump(mode="json")
    values["evaluation"] |= {"context": 2, "horizon": 1, "videos": 1}
    values["sampling"] = {"steps": 1}
    values["dataset"]["frame_step"] = 1
    (given.folder / "c.yaml").write_text(yaml.safe_dump(values))
    common = ["--config", "c.yaml", "--device", "cpu"]
    assert (
        main(["import-official", *common, "--model", str(given.model()), "--refiner", str(given.refiner_file())]) == 0
    )
    assert "GPL-3.0" in capsys.readouterr().out
    for command in ("train-autoencoder", "encode", "train-flow", "sample", "evaluate"):
        assert main([command, *common]) == 0
    assert main(["sample", *common, "--refine"]) == 0
    out = capsys.readouterr().out
    assert "store: complete" in out
    assert "refiner: done, imported from refiner.pth" in out
    assert "steps/s" not in out
    evaluation = json.loads((given.folder / "runs" / "kth" / "evaluation.json").read_text())
    assert evaluation["protocol"]["autoencoder_sha256"] == weights_digest(given.autoencoder)
    assert evaluation["protocol"]["flow_step"] == 13
    # Another autoencoder's store is no obstacle to predicting, and is told.
    randomise(given.autoencoder)
    again = ["import-official", *common, "--model", str(given.model("other.pth"))]
    assert main(again) == 2
    assert main([*again, "--restart"]) == 0
    capsys.readouterr()
    assert main(["train-flow", *common]) == 0
    assert "encode again with the imported one" in capsys.readouterr().err
    assert main(["encode", *common]) == 2
    assert main(["encode", *common, "--overwrite"]) == 0


class Hub(ThreadingHTTPServer):
    """Serves the files of a folder under any repository's `resolve/main/`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked, self.ranges = folder, [], []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/hub"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.wfile.write(self.answer())

    def answer(self) -> bytes:
        file = self.server.folder / self.path.rpartition("/")[2]
        if not file.is_file():
            self.send_error(404)
            return b""
        content, asked = file.read_bytes(), self.headers.get("Range")
        if asked is None:
            self.send_response(200)
        else:
            self.server.ranges.append(asked)
            first, whole = int(asked.removeprefix("bytes=").removesuffix("-")), len(content)
            content = content[first:]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{whole - 1}/{whole}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return content

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(given: Kit, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Hub(given.folder) as running:
        monkeypatch.setattr(import_download, "HUB", running.url)
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("inside", [True, False])
def test_released_files_are_fetched_when_asked_for(given, hub, capsys, inside):
    given.model(inside=inside)
    given.autoencoder_file("vqvae.ckpt")
    config, run_context = given.config(), RunContext(CPU, download=True)
    import_official(config, run_context, OfficialFiles())
    wanted = ["model.pth"] if inside else ["model.pth", "vqvae.ckpt"]
    assert hub.asked == [f"/hub/river_kth_64/resolve/main/{name}" for name in wanted]
    folder = given.folder / "data" / "kth" / "official"
    assert sorted(file.name for file in folder.iterdir()) == wanted
    assert VideoPredictor.from_run(config.run_path, device="cpu").fps == 5
    assert re.search(r"fetching http.*model.pth \(\d+\.\d [kM]B\) -> .*official/model.pth", capsys.readouterr().out)
    import_official(config, run_context, OfficialFiles())
    assert len(hub.asked) == len(wanted)
    assert "official/model.pth is there already" in capsys.readouterr().out


def test_nothing_is_fetched_unasked(given, hub):
    with pytest.raises(UserError, match="name the files"):
        given.run()
    with pytest.raises(UserError, match="name the one that came with it"):
        given.run(model=given.model(inside=False))
    import_official(given.config(), RunContext(CPU, download=True), OfficialFiles(model=given.model()))
    assert hub.asked == []


def test_what_cannot_be_fetched_is_told(given, hub):
    run_context = RunContext(CPU, download=True)
    with pytest.raises(FetchError, match=r"model.pth: the server answers 404 .*name it with --model <file>"):
        import_official(given.config(), run_context, OfficialFiles())
    values = given.config().model_dump(mode="json")
    values["dataset"]["name"] = "mine"
    with pytest.raises(UserError, match=r"released weights for the data sets kth, .*, not for 'mine'"):
        import_official(parse_config(values, "a test"), run_context, OfficialFiles())
    with pytest.raises(UserError, match=r"name them here, such as --model .*data/kth/official/model.pth"):
        import_official(parse_config(values, "a test"), run_context, OfficialFiles())


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"<!doctype html>sign in", "a web page, such as"), (b"version https://git-lfs.github.com/spec/v1", "git-lfs")],
)
def test_a_page_in_place_of_the_file_is_told_and_not_kept(given, hub, content, message):
    run_context, folder = RunContext(CPU, download=True), given.folder / "data" / "kth" / "official"
    page = given.folder / "model.pth"
    page.write_bytes(content)
    with pytest.raises(FetchError, match=rf"{hub.url}/.*model.pth: what came is .*{message}.*--model <file>"):
        import_official(given.config(), run_context, OfficialFiles())
    assert list(folder.iterdir()) == []
    # One that another program left there is fetched anew.
    (folder / "model.pth").write_bytes(content)
    given.model()
    import_official(given.config(), run_context, OfficialFiles())
    assert (folder / "model.pth").read_bytes() == page.read_bytes()


def test_a_download_that_broke_off_is_gone_on_with(given, hub):
    whole = given.model().read_bytes()
    folder = given.folder / "data" / "kth" / "official"
    folder.mkdir(parents=True)
    (folder / "model.pth.part").write_bytes(whole[:1000])
    import_official(given.config(), RunContext(CPU, download=True), OfficialFiles())
    assert hub.ranges == ["bytes=1000-"]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {"model.pth": whole}


def test_the_file_is_told_by_its_sha256(given, hub, capsys):
    digest = hashlib.sha256(given.model().read_bytes()).hexdigest()
    import_official(given.config(), RunContext(CPU, download=True), OfficialFiles())
    out = capsys.readouterr().out
    assert re.search(r"fetched \d\.\d MB", out)
    assert f"official/model.pth: sha256 {digest}" in out
    assert find_flow(given.config().run_path).state["imported"]["sha256"] == digest


def test_a_training_in_progress_is_not_disturbed(given):
    model = given.model()
    run = given.config().run_path
    with only_training_of(run / "flow"), pytest.raises(UserError, match="is training here"):
        given.run(model=model)
    assert not files_of(run)  # not a part of it was written either
