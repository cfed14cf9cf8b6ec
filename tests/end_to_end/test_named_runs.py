"""Named runs: several flows on one store and autoencoder, each with a folder of its own."""

import json
import shutil
from pathlib import Path

import torch

from pipelines.predictor import VideoPredictor

WIDER = "flow.model.width=64"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_named_run_is_beside_the_default_one(copied) -> None:
    before, wide = tree(copied.runs), copied.runs / "wide"
    copied.run("train-flow", "--run", "wide", sets=[WIDER, "flow.training.steps=4", "seed=1"]).ok()
    state = json.loads((wide / "flow" / "checkpoints" / "step_00000004" / "state.json").read_text())
    assert (state["settings"]["seed"], state["settings"]["flow"]["model"]["width"]) == (1, 64)
    for command in ("sample", "evaluate", "report"):  # with its settings, which are not repeated
        copied.run(command, "--run", "wide").ok()
    assert {path.name for path in wide.iterdir()} >= {"config.yaml", "samples", "evaluation.json", "report.html"}
    assert not (wide / "autoencoder").exists()
    page = (wide / "report.html").read_text()
    assert "--run wide" in page
    assert "Stage autoencoder" not in page  # which has a seed of its own
    assert {name: content for name, content in tree(copied.runs).items() if name in before} == before
    predictor = VideoPredictor.from_run(wide, device="cpu")
    assert predictor.vector_field.config.width == 64
    assert torch.equal(
        predictor.autoencoder.quantizer.codebook,
        VideoPredictor.from_run(copied.runs, device="cpu").autoencoder.quantizer.codebook,
    )

    listed = copied.run("runs").ok().out.splitlines()
    (default,) = (line for line in listed if line.startswith("default"))
    (line,) = (line for line in listed if line.startswith("wide"))
    psnr = json.loads((wide / "evaluation.json").read_text())["metrics"]["psnr"]["prediction"]
    for words in ("4", f"{psnr:.2f}", "flow.model.width: 32 -> 64", "flow.training.steps: 8 -> 4", "seed: 0 -> 1"):
        assert words in line
    assert "->" not in default

    # What all runs share is not replaced in the name of one of them.
    before = tree(copied.folder)
    for words in (
        ["train-autoencoder", "--restart"],
        ["train-autoencoder", "--resume", "3"],
        ["encode", "--overwrite"],
    ):
        copied.run(*words, "--run", "wide").refused(2, "--run")
    assert tree(copied.folder) == before
    outcome = copied.run("train-flow", "--restart", "--run", "wide").ok()
    (backup,) = wide.glob("flow.*")
    assert str(backup) in outcome.out
    assert (backup / "checkpoints" / "step_00000004").is_dir()
    assert [path.name for path in copied.runs.glob("flow*")] == ["flow"]
    copied.run("train-flow", sets=[WIDER]).refused(2, "--run")


def test_the_first_run_may_have_a_name(place) -> None:
    """It trains the autoencoder and encodes the store that all runs share."""
    few = ("autoencoder.training.steps=1", "flow.training.steps=1", "dataset.splits={train: 8, val: 2, test: 2}")
    assert len(place.with_sets(*few).run("runs").ok().out.splitlines()) == 1
    place.with_sets(*few).run("train-flow", "--run", "1").ok()
    assert {path.name for path in place.runs.iterdir()} == {"1", "autoencoder", "config.yaml", "environment.json"}
    assert place.checkpoint("1/flow").is_dir()
    # Further runs go by the settings of what they share, and by the file's for the rest.
    shutil.rmtree(place.store)
    place.run("train-flow", "--run", "other", sets=["flow.training.steps=2", "seed=3"]).ok()
    assert "flow: done" in place.run("train-flow", "--run", "1").ok().out
    assert place.checkpoint("other/flow").name == "step_00000002"
    assert place.checkpoint("autoencoder").name == "step_00000001"
    names = [line.split()[0] for line in place.run("runs").ok().out.splitlines()]
    assert names[-2:] == ["1", "other"]
    assert "default" not in names


def test_names_that_a_run_cannot_have(trained) -> None:
    taken = [path.name for path in trained.runs.iterdir()]
    assert {"flow", "samples", "report.html"} <= set(taken)
    others = ("Flow", "refiner", "predictions", "flow.20261128-201500", "flow.beginning", "..", "a/b", "", "-x")
    for name in (*taken, *others):
        trained.run("sample", f"--run={name}").refused(2, "run")
