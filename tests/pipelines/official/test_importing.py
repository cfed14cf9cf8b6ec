"""`import-official`: official files become a run that counts as trained and predicts with their weights."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipelines.__main__ import main
from pipelines.config import RiverConfig, load_config, parse_config
from pipelines.data.fetch import FetchError
from pipelines.errors import UserError
from pipelines.loading import find_autoencoder, find_flow, find_refiner, load_trained_field, weights_digest
from pipelines.official import importing
from pipelines.official.importing import import_official
from pipelines.official.parts import OfficialFiles
from pipelines.predictor import VideoPredictor
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.context import RunContext
from pipelines.runtime.run_folder import only_training_of
from pipelines.training.autoencoder_trainer import train_autoencoder
from pipelines.training.flow_trainer import train_flow
from tests.file_server import FileServer, serving

CPU = torch.device("cpu")


def run_import(official, config: RiverConfig | None = None, *, restart: bool = False, **files: Path) -> Path:
    """Import with the configuration that fits; return the run's folder."""
    config = config or official.config()
    import_official(config, RunContext(CPU, restart=restart), OfficialFiles(**files))
    return config.run_path


def write_config(official, **changes: Any) -> Path:
    path = official.path / "c.yaml"
    path.write_text(yaml.safe_dump(official.config().model_dump(mode="json") | changes))
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name[0] != "."}


@pytest.mark.parametrize("family", ["vqvae", "vqgan"])
@pytest.mark.parametrize("apart", [False, True], ids=["inside", "apart"])
@pytest.mark.parametrize("sizes", [{}, {"head": "bn", "reference": False, "depth": 2, "mid_depth": 0}], ids=str)
def test_a_run_predicts_with_the_weights_of_the_files(official, family, apart, sizes):
    official.autoencoder, official.field = official.make(family), official.make("field", **sizes)
    files = {"model": official.model(inside=not apart)} | (
        {"autoencoder": official.autoencoder_file()} if apart else {}
    )
    predictor = VideoPredictor.from_run(run_import(official, **files), device="cpu")
    assert official.same(predictor.vector_field, official.field)
    assert official.same(predictor.autoencoder, official.autoencoder)
    assert not any(network.training for network in (predictor.autoencoder, predictor.vector_field))
    assert (predictor.standardization.mean.tolist(), predictor.standardization.std.tolist()) == ([0.0] * 4, [1.0] * 4)
    images = torch.rand(1, 2, 3, 16, 16) * 2 - 1
    assert predictor.generate_frames(images, 1).shape == (1, 3, 3, 16, 16)


def test_the_run_records_its_origin(official):
    wide = official.config().dataset.model_dump() | {"image_size": [16, 24]}
    config, model = official.config(dataset=wide), official.model()
    run = run_import(official, config, model=model, refiner=official.refiner_file())
    assert load_config(run / "config.yaml") == config
    assert json.loads((run / "environment.json").read_text())["software"]["torch"]
    found = {"flow": find_flow(run), "autoencoder": find_autoencoder(run), "refiner": find_refiner(run)}
    assert {name: checkpoint.step for name, checkpoint in found.items()} == {
        "flow": 13, "autoencoder": 70, "refiner": 50
    }  # fmt: skip
    networks = {"flow": official.field, "autoencoder": official.autoencoder, "refiner": official.refiner}
    for name, checkpoint in found.items():
        imported = checkpoint.state["imported"]
        assert imported["file"] == ("refiner.pth" if name == "refiner" else "model.pth")
        assert imported["sha256"] == hashlib.sha256((official.path / imported["file"]).read_bytes()).hexdigest()
        assert imported["weights"] == weights_digest(networks[name])
        assert [file.name for file in sorted(checkpoint.path.iterdir())] == ["model.safetensors", "state.json"]
    digest = weights_digest(official.autoencoder)
    assert found["flow"].state["latent_shape"] == [4, 8, 12]
    assert train_autoencoder(config, RunContext(CPU)).path == found["autoencoder"].path
    assert found["flow"].state["fps"] == 5
    assert found["flow"].state["store"] == {"path": None, "fingerprint": None, "autoencoder": digest}
    assert found["refiner"].state["autoencoder"] == digest


def test_a_named_run_shares_the_autoencoder(official):
    """Another main model on the same latents is another run; another autoencoder is not, even with --restart."""
    default = run_import(official, model=official.model())
    before, named = files_of(default), official.config(run="other")
    official.field = official.make("field", depth=2)
    named = named.model_copy(update={"flow": named.flow.model_copy(update={"model": official.field.config})})
    run = run_import(official, named, model=official.model())
    assert run == default / "other"
    predictor = VideoPredictor.from_run(run, device="cpu")
    assert official.same(predictor.vector_field, official.field)
    assert official.same(predictor.autoencoder, official.autoencoder)
    official.autoencoder = official.make("vqvae")
    with pytest.raises(UserError, match="without --run"):
        run_import(official, named, restart=True, model=official.model())
    assert {name: content for name, content in files_of(default).items() if name in before} == before


@pytest.mark.parametrize(
    "changes",
    [{"seed": 5}, {"flow.training": {"steps": 10**6, "batch_size": 3, "standardize": True}},
     {"autoencoder.training": {"learning_rate": 0.1, "steps": 10**6}}, {"flow.model": {"dropout": 0.5}}],
    ids=str,
)  # fmt: skip
def test_both_trainings_are_done_whatever_their_settings(official, capsys, changes):
    run = run_import(official, model=official.model())
    before = files_of(run)
    values = official.config().model_dump(mode="json")
    for key, value in changes.items():
        section, _, part = key.partition(".")
        values[section] = values[section] | {part: values[section][part] | value} if part else value
    config, run_context = parse_config(values, "a test"), RunContext(CPU)
    assert train_autoencoder(config, run_context).path == find_autoencoder(run).path
    assert train_flow(config, run_context).path == find_flow(run).path
    out = capsys.readouterr().out
    assert "autoencoder: done, imported from model.pth" in out
    assert "flow: done, imported from model.pth" in out
    assert files_of(run) == before
    assert not config.store_path.exists()


@pytest.mark.parametrize(("image_size", "warned"), [([16, 64], False), ([16, 66], True)])
def test_frames_larger_than_those_of_the_released_weights(official, capsys, image_size, warned):
    """The official field has position codes for any of them, but those of KTH beyond 64 pixels were never trained."""
    dataset = official.config().dataset.model_dump() | {"image_size": image_size}
    run_import(official, official.config(dataset=dataset), model=official.model())
    assert ("64x64" in capsys.readouterr().err) == warned


@pytest.mark.parametrize(
    ("section", "changes", "train", "named"),
    [
        ("flow", {"width": 64}, train_flow, "flow.model.width: 32 -> 64"),
        ("flow", {"head": "bn"}, train_flow, "flow.model.head: ln -> bn"),
        ("autoencoder", {"codes": 32}, train_autoencoder, "autoencoder.model.codes: 16 -> 32"),
        ("dataset", {"image_size": 32}, train_autoencoder, "dataset.image_size: 16 -> 32"),
        ("dataset", {"image_size": [16, 32]}, train_autoencoder, r"dataset.image_size: 16 -> \[16, 32\]"),
    ],
)
def test_a_configuration_of_other_sizes_contradicts(official, section, changes, train, named):
    run_import(official, model=official.model())
    values = official.config().model_dump(mode="json")
    (values["dataset"] if section == "dataset" else values[section]["model"]).update(changes)
    with pytest.raises(UserError, match=rf"(?s)model.pth.*{named}.*--restart"):
        train(parse_config(values, "a test"), RunContext(CPU))


def test_importing_again_changes_nothing(official, capsys):
    files = {"model": official.model(), "refiner": official.refiner_file()}
    run = run_import(official, **files)
    before = files_of(run)
    capsys.readouterr()
    run_import(official, **files)
    assert files_of(run) == before
    out = capsys.readouterr().out
    assert re.findall(r"(\w+): done before", out) == ["autoencoder", "flow", "refiner"]
    # The same weights from other files are the same.
    again = {"model": official.model("copy.pth", prefix="", epoch=1), "autoencoder": official.autoencoder_file()}
    run_import(official, **again)
    assert files_of(run) == before


def test_other_weights_replace_imported_ones_only_with_restart(official):
    run = run_import(official, model=official.model())
    before = files_of(run)
    official.randomize(official.field)
    other = official.model("other.pth")
    with pytest.raises(UserError, match=rf"model.pth.*{re.escape(str(other))}.*--restart"):
        run_import(official, model=other)
    assert files_of(run) == before
    run_import(official, model=other, restart=True)
    assert official.same(load_trained_field(find_flow(run), CPU), official.field)
    (backup,) = (path for path in run.iterdir() if path.name.startswith("flow."))
    kept = {name: content for name, content in before.items() if name.startswith("flow/")}
    assert {f"flow/{name}": content for name, content in files_of(backup).items()} == kept
    assert not [path for path in run.iterdir() if path.name.startswith("autoencoder.")]  # that is the same


def test_the_same_weights_for_other_frames_or_another_autoencoder_are_not_the_same(official):
    model, apart, refiner = official.model(inside=False), official.autoencoder_file(), official.refiner_file()
    run = run_import(official, model=model, autoencoder=apart, refiner=refiner)
    values = official.config().model_dump(mode="json")
    values["dataset"]["image_size"] = 32
    with pytest.raises(UserError, match=r"autoencoder/.*vqvae.pth.*--restart"):
        run_import(official, parse_config(values, "a test"), autoencoder=apart)
    official.randomize(official.autoencoder)
    run_import(official, autoencoder=official.autoencoder_file(), restart=True)
    with pytest.raises(UserError, match=r"flow/.*model.pth.*--restart"):
        run_import(official, model=model)
    with pytest.raises(UserError, match=r"refiner/.*refiner.pth.*--restart"):
        run_import(official, refiner=refiner)
    run_import(official, model=model, refiner=refiner, restart=True)
    VideoPredictor.from_run(run, device="cpu").check_refiner()


def test_what_was_trained_here_is_replaced_only_with_restart(official):
    config = official.config()
    trained = CheckpointFolder(config.run_path / "autoencoder" / "checkpoints")
    state = {"model": official.autoencoder.config.model_dump(), "identity": {}}
    trained.save(70, {"model": official.autoencoder.state_dict()}, state)
    before = files_of(config.run_path)
    with pytest.raises(UserError, match=r"step_00000070.*trained here.*model.pth.*--restart"):
        run_import(official, config, model=official.model())
    assert files_of(config.run_path) == before
    run_import(official, config, model=official.model(), restart=True)
    assert VideoPredictor.from_run(config.run_path, device="cpu").fps == 5
    assert [path.name.partition(".")[0] for path in config.run_path.iterdir() if "20" in path.name] == ["autoencoder"]


def test_a_training_in_progress_is_not_disturbed(official):
    run = official.config().run_path
    with only_training_of(run / "flow"), pytest.raises(UserError, match=re.escape(str(run / "flow"))):
        run_import(official, model=official.model())
    assert not files_of(run)  # no other part was written either


def test_the_autoencoder_can_come_first(official, capsys):
    run = run_import(official, autoencoder=official.autoencoder_file())
    assert find_flow(run) is None
    assert "`train-flow`" in capsys.readouterr().out
    run_import(official, model=official.model(inside=False))
    assert official.same(VideoPredictor.from_run(run, device="cpu").autoencoder, official.autoencoder)


@pytest.mark.parametrize("which", ["model", "refiner"])
def test_without_any_autoencoder_it_is_refused(official, which):
    file = official.model(inside=False) if which == "model" else official.refiner_file()
    with pytest.raises(UserError, match=rf"{re.escape(str(file))}.*runs/kth.*--autoencoder"):
        run_import(official, **{which: file})
    assert not official.config().run_path.exists()
    folder = CheckpointFolder(official.config().run_path / "autoencoder" / "checkpoints")
    state = {"model": official.autoencoder.config.model_dump(), "identity": {}}
    folder.save(1, {"model": official.autoencoder.state_dict()}, state)
    with pytest.raises(UserError, match=rf"{re.escape(str(file))}.*trained here.*--autoencoder"):
        run_import(official, **{which: file})


def test_a_flow_of_another_autoencoder_is_reported(official, capsys):
    run = run_import(official, model=official.model())
    official.randomize(official.autoencoder)
    run_import(official, autoencoder=official.autoencoder_file(), restart=True)
    assert re.search(rf"warning: {re.escape(str(run))}/flow.*--restart", capsys.readouterr().err)
    with pytest.raises(UserError, match="trained on latents of autoencoder"):
        VideoPredictor.from_run(run, device="cpu")


def test_heads_are_eight_unless_given(official):
    values = official.config().model_dump(mode="json")
    values["flow"]["model"]["heads"] = 4
    with pytest.raises(UserError, match=r"flow.model.heads: 8 .*4"):
        run_import(official, parse_config(values, "a test"), model=official.model())
    official.field = official.make("field", width=36, heads=9)
    with pytest.raises(UserError, match=r"width 36 .*heads 8: .*--heads"):
        run_import(official, model=official.model())
    common = ["import-official", "--config", str(write_config(official)), "--device", "cpu"]
    assert main([*common, "--model", str(official.model()), "--heads", "9"]) == 0
    assert load_trained_field(find_flow(official.config().run_path), CPU).config.heads == 9


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--model model.pth.*--download.*kth, bair_64"),
        (["--model", "absent.pth"], "--model .*absent.pth: no such file"),
        (["--autoencoder", "."], "--autoencoder .*folder"),
        (["--model", "vqvae.pth"], "vqvae.pth .*model.pth"),
        (["--refiner", "model.pth"], "model.pth .*refiner"),
        (["--model", "cut.pth"], "cut.pth .*download it again"),
    ],
)
def test_the_command_refuses_with_exit_code_2(official, capsys, arguments, named):
    official.model(), official.autoencoder_file()
    (official.path / "cut.pth").write_bytes((official.path / "model.pth").read_bytes()[:5000])
    places = [word if word.startswith("--") else str(official.path / word) for word in arguments]
    assert main(["import-official", "--config", str(write_config(official)), "--device", "cpu", *places]) == 2
    assert re.search(f"^import-official: .*{named}", capsys.readouterr().err)
    assert not official.config().run_path.exists()


def test_after_the_import_the_other_commands_need_no_training(official, capsys, monkeypatch):
    monkeypatch.chdir(official.path)
    values = official.config().model_dump(mode="json")
    values["evaluation"] |= {"context": 2, "horizon": 1, "videos": 1}
    values["dataset"]["frame_step"] = 1
    write_config(official, evaluation=values["evaluation"], dataset=values["dataset"], sampling={"steps": 1})
    common = ["--config", "c.yaml", "--device", "cpu"]
    files = ["--model", str(official.model()), "--refiner", str(official.refiner_file())]
    assert main(["import-official", *common, *files]) == 0
    assert "GPL-3.0" in capsys.readouterr().out
    for command in ("train-autoencoder", "encode", "train-flow", "sample", "evaluate"):
        assert main([command, *common]) == 0
    assert main(["sample", *common, "--refine"]) == 0
    out = capsys.readouterr().out
    assert "store: complete" in out
    assert "refiner: done, imported from refiner.pth" in out
    assert "steps/s" not in out
    evaluation = json.loads((official.path / "runs" / "kth" / "evaluation.json").read_text())
    assert evaluation["protocol"]["autoencoder_sha256"] == weights_digest(official.autoencoder)
    assert evaluation["protocol"]["predictor"]["flow_step"] == 13
    # The store of another autoencoder does not stop predictions, but is reported.
    official.randomize(official.autoencoder)
    again = ["import-official", *common, "--model", str(official.model("other.pth"))]
    assert main(again) == 2
    assert main([*again, "--restart"]) == 0
    capsys.readouterr()
    assert main(["train-flow", *common]) == 0
    assert "encode" in capsys.readouterr().err
    assert main(["encode", *common]) == 2
    assert main(["encode", *common, "--overwrite"]) == 0


@pytest.fixture
def hub(official, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """Serves the files beside the run as those of KTH's repository."""
    repository = official.path / "river_kth_64" / "resolve"
    repository.mkdir(parents=True)
    (repository / "main").symlink_to(official.path)
    with serving(official.path) as server:
        monkeypatch.setattr(importing, "HUB", server.url)
        yield server


DOWNLOAD = RunContext(CPU, download=True)


@pytest.mark.parametrize("inside", [True, False])
def test_released_files_are_downloaded_when_allowed(official, hub, capsys, inside):
    official.model(inside=inside)
    official.autoencoder_file("vqvae.ckpt")
    config = official.config()
    import_official(config, DOWNLOAD, OfficialFiles())
    expected = ["model.pth"] if inside else ["model.pth", "vqvae.ckpt"]
    assert hub.asked == [f"/river_kth_64/resolve/main/{name}" for name in expected]
    folder = official.path / "data" / "kth" / "official"
    assert sorted(file.name for file in folder.iterdir()) == expected
    assert VideoPredictor.from_run(config.run_path, device="cpu").fps == 5
    digest = hashlib.sha256((folder / "model.pth").read_bytes()).hexdigest()
    assert f"official/model.pth: sha256 {digest}" in capsys.readouterr().out
    import_official(config, DOWNLOAD, OfficialFiles())
    assert len(hub.asked) == len(expected)


def test_nothing_is_downloaded_unasked(official, hub):
    with pytest.raises(UserError, match="--download"):
        run_import(official)
    with pytest.raises(UserError, match="--autoencoder"):
        run_import(official, model=official.model(inside=False))
    import_official(official.config(), DOWNLOAD, OfficialFiles(model=official.model()))
    assert hub.asked == []


def test_a_failed_download_names_the_way_out(official, hub):
    with pytest.raises(FetchError, match=r"model.pth: .*404 .*--model <file>"):
        import_official(official.config(), DOWNLOAD, OfficialFiles())
    values = official.config().model_dump(mode="json")
    values["dataset"]["name"] = "mine"
    with pytest.raises(UserError, match=r"kth, .*'mine'.*--model"):
        import_official(parse_config(values, "a test"), DOWNLOAD, OfficialFiles())


@pytest.mark.parametrize("content", [b"<!doctype html>sign in", b"version https://git-lfs.github.com/spec/v1"])
def test_a_page_instead_of_the_file_is_not_kept(official, hub, content):
    folder = official.path / "data" / "kth" / "official"
    (official.path / "model.pth").write_bytes(content)
    with pytest.raises(FetchError, match=rf"{hub.url}/.*model.pth: .*--model <file>"):
        import_official(official.config(), DOWNLOAD, OfficialFiles())
    assert list(folder.iterdir()) == []
    # One that another program left there is downloaded again.
    (folder / "model.pth").write_bytes(content)
    model = official.model()
    import_official(official.config(), DOWNLOAD, OfficialFiles())
    assert (folder / "model.pth").read_bytes() == model.read_bytes()
