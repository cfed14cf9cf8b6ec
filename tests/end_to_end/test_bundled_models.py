"""A model that comes with the program predicts what it says, wherever it is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config import load_config
from pipelines.errors import UserError
from pipelines.evaluation.measures.metrics import psnr
from pipelines.prediction.clips import open_clips
from pipelines.predictor import VideoPredictor
from pipelines.report.run_files import Run
from pipelines.runtime.context import RunContext
from pipelines.sharing.bundled_models import BUNDLED, MODELS, with_bundled_run
from pipelines.sharing.released_run import check_released_run

NAME = "shapes-small"
NAMED = ["--run", NAME, "--device", "cpu"]
# dB above copying the last frame. Weights changed at random by 1e-6, or 2 threads, or no AVX, change none by 0.0001.
MEASURED = {"test_00000": 7.5870, "test_00032": 10.5276, "test_00063": 8.5905}
ARITHMETIC = 0.002
# fp16 rounds weights by up to 2^-12: evaluated before and after that, the worst of 16 clips differs by 0.033 dB.
ROUNDING = 0.1


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_they_are_whole_and_small() -> None:
    assert MODELS is not None
    assert {folder.name for folder in MODELS.iterdir()} == set(BUNDLED)
    for name in BUNDLED:
        release = check_released_run(MODELS / name)
        assert release.dataset == name
        assert sum(file.size for file in release.files.values()) <= 8e6


def test_it_predicts_what_it_states() -> None:
    predictor, config = VideoPredictor.from_run(MODELS / NAME, device="cpu"), load_config("shapes")
    context, horizon, samples = 2, 10, 3
    assert (context, horizon, samples) == tuple(
        getattr(config.evaluation, key) for key in ("context", "horizon", "samples")
    )
    stated, gains = json.loads((MODELS / NAME / "evaluation.json").read_text())["clips"], {}
    for clip in open_clips(config, RunContext(torch.device("cpu")), 3):
        given, truth = clip.frames[None, :context], clip.frames[context:]
        keys = [(clip.key, 0)]
        predicted = predictor.generate_frames(given, horizon, samples=samples, keys=keys)[:, context:]
        copied = given[0, -1:].expand_as(truth)
        better = [psnr(frames, truth) - psnr(copied, truth) for frames in predicted]
        gains[clip.name] = float(torch.stack(better).mean())
    assert gains == pytest.approx(MEASURED, abs=ARITHMETIC)
    assert gains == pytest.approx({name: stated[name] for name in gains}, abs=ROUNDING)


def test_naming_it_makes_an_ordinary_run_of_it(empty: Path, command: Any, story: Any) -> None:
    before = story.tree(MODELS)
    assert NAME in command(["runs"]).ok().out
    assert not list(empty.iterdir())
    story.write_video(empty / "mine.mp4", story.moving_square(6, 0))
    outcome = command(["predict", "mine.mp4", *NAMED, "--frames", "2"]).ok()
    assert BUNDLED[NAME] in outcome.out
    assert {path.name for path in empty.iterdir()} == {"mine.mp4", "runs"}  # nothing was encoded, nothing trained
    copied = story.stamps(empty / "runs" / NAME / "flow")
    command(["sample", *NAMED, "--videos", "1", "--set", "sampling.decoder=fast"]).ok()
    assert story.stamps(empty / "runs" / NAME / "flow") == copied
    for name in ("samples/overview.gif", "predictions/mine.gif", "predictions/mine.mp4"):
        assert (empty / "runs" / NAME / name).stat().st_size > 0
    assert VideoPredictor.from_run(f"runs/{NAME}", device="cpu").sampler_is_chosen
    command(["report", *NAMED]).ok()
    command(["clean", *NAMED, "--yes"]).ok()
    assert not (empty / "runs" / NAME).exists()
    command(["clean", *NAMED, "--yes"]).refused(2, NAME)
    assert story.tree(MODELS) == before


def test_it_has_no_store_to_inspect(empty: Path, command: Any) -> None:
    store = f"latents/{NAME}.zarr"
    told = command(["inspect", *NAMED]).refused(
        2, f"{store}: no store", f"river encode --run {NAME}", f"river report --run {NAME}"
    )
    assert told.err.count("\n") == 1
    command(["encode", "--verify", *NAMED]).refused(2, f"{store}: no store", "--verify")
    command(["inspect"]).refused(2, "latents/shapes.zarr: no store", "river encode --config shapes")
    command(["inspect", "--run", "none"]).refused(2, "latents/shapes.zarr: no store")


def test_its_store_is_inspected_by_its_name(empty: Path, command: Any) -> None:
    few = ["--set", "dataset.splits={train: 2, val: 1, test: 1}"]
    command(["encode", *NAMED, *few]).ok()
    assert f"latents of {NAME}" in command(["inspect", *NAMED]).ok().out
    command(["inspect", f"latents/{NAME}.zarr", *NAMED, "--gif", "a.gif"]).ok()
    assert Path("a.gif").stat().st_size > 0


def test_names_that_are_looked_up(empty: Path) -> None:
    def resolved(run: str, config: str = "shapes") -> list[str]:
        return with_bundled_run(config, [f"run={run}"], copies=False)

    config = load_config("shapes", resolved(NAME))
    assert (config.run, config.dataset.name) == (None, NAME)
    assert Run(config).command("evaluate") == f"river evaluate --run {NAME}"
    with pytest.raises(UserError, match=rf"{NAME}.*kth_small.*--config shapes"):
        resolved(NAME, "kth_small")
    for name in ("wide", "shapes-large"):
        assert resolved(name) == [f"run={name}"]
    for name in ("shapes_small", "Shapes-small", "shapes-smal"):  # rather than minutes of training
        with pytest.raises(UserError, match=rf"{name}.*{NAME}"):
            resolved(name)
    with pytest.raises(UserError, match=f"--run {NAME}"):
        with_bundled_run(NAME, [], copies=False)
    (empty / "runs" / "shapes" / NAME).mkdir(parents=True)  # a run of one's own comes first
    assert resolved(NAME) == [f"run={NAME}"]


def test_a_damaged_model_is_refused(empty: Path, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(MODELS, empty / "models")
    monkeypatch.setattr("pipelines.sharing.bundled_models.MODELS", empty / "models")
    (weights,) = (empty / "models" / NAME / "flow").rglob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    command(["sample", *NAMED]).refused(2, str(weights))
    assert not (empty / "runs").exists()
