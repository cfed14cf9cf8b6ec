"""Training a flow: wrong settings, too little memory, losses that are not finite."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from pipelines.loading import find_flow
from stage2_flow.vector_field import VectorField


@pytest.fixture
def flowless(trained, tmp_path: Path):
    """A place with a store and an autoencoder, in which no flow was trained."""
    place = trained.copy(tmp_path / "flowless", "latents")
    trained.copy(tmp_path / "whole", "runs")
    (place.runs).mkdir(parents=True)
    (tmp_path / "whole" / "runs" / "tiny" / "autoencoder").rename(place.runs / "autoencoder")
    return place


def test_a_store_smaller_than_a_batch(flowless) -> None:
    flowless.run("train-flow", sets=["flow.training.batch_size=512"]).refused(
        2, str(flowless.store), "split 'train': 240 frames", "fewer than flow.training.batch_size 512", "lower it"
    )
    assert not (flowless.runs / "flow" / "checkpoints").exists()


def test_clips_longer_than_the_videos(flowless) -> None:
    sets = ["flow.training.clip_frames=40", "evaluation.horizon=30"]
    outcome = flowless.run("train-flow", sets=sets).ok()
    assert re.search("clip_frames is 40, .* 12 frames: .* at most 10 frames", outcome.out)
    assert "10 instead of 30 frames (evaluation.horizon)" in outcome.out


def test_a_horizon_that_sampling_ignores(flowless) -> None:
    """Predictions keep to the horizon of the training."""
    flowless.run("train-flow", sets=["flow.training.past_horizon=4"]).ok()
    for ignored, expected in (("null", 4), ("5", 4), ("3", 3)):
        sets = ["flow.training.past_horizon=4", f"sampling.past_horizon={ignored}"]
        flowless.run("sample", sets=sets).ok()
        listed = json.loads((flowless.runs / "samples" / "samples.json").read_text())
        assert listed["sampling"]["past_horizon"] == expected


def test_a_horizon_is_trained_with(flowless, story, monkeypatch) -> None:
    distances = []
    story.wrap_field(monkeypatch, lambda forward, *inputs: distances.extend(inputs[3].tolist()) or forward(*inputs))
    sets = ["flow.training.past_horizon=3", "sampling.past_horizon=3", "flow.training.steps=2"]
    flowless.run("train-flow", sets=sets).ok()
    assert set(distances) == {1, 2}


@pytest.mark.parametrize("setting", ["batch_size=0", "accumulate=0", "past_horizon=1", "max_bad_steps=0"])
def test_settings_out_of_range(flowless, setting: str) -> None:
    key = setting.partition("=")[0]
    flowless.run("train-flow", sets=[f"flow.training.{setting}"]).refused(2, f"flow.training.{key}")


@pytest.mark.parametrize("where", ["update", "load"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory(flowless, monkeypatch, where: str, error: Exception) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(VectorField, "forward" if where == "update" else "to", fails)
    outcome = flowless.run("train-flow").refused(
        2, "flow: out of memory", "flow.training.accumulate=2", "flow.training.batch_size", "cache.residency=host"
    )
    assert ("2.00 GiB" in outcome.err) == isinstance(error, torch.OutOfMemoryError)
    assert "GPU 0" not in outcome.err  # one line


def test_an_error_of_another_kind_is_not_taken_for_it(flowless, monkeypatch) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(VectorField, "forward", fails)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        flowless.run("train-flow")


def test_single_steps_that_are_not_finite_do_not_end_a_training(flowless, story, monkeypatch) -> None:
    calls = itertools.count()
    factors = (float("inf"), 1)
    story.wrap_field(monkeypatch, lambda forward, *inputs: forward(*inputs) * factors[next(calls) % 2])
    outcome = flowless.run("train-flow", sets=["flow.training.max_bad_steps=2"]).ok()
    assert outcome.err.count("1 such steps in a row, 2 end the training") == 4
    assert "on targets in train_000" in outcome.err


def test_the_rate_is_reported_before_the_first_line_of_the_log(flowless, monkeypatch) -> None:
    monkeypatch.setattr("pipelines.training.training_loop.FIRST_WORD_SECONDS", 0.0)
    outcome = flowless.run("train-flow", sets=["logging.every=1000"]).ok()
    assert outcome.out.count("steps/s, about") == 1
    assert outcome.out.index("steps/s, about") < outcome.out.index("flow: step 4: validation loss")


def test_the_best_checkpoint_by_validation_or_the_last(trained, flowless, story) -> None:
    flowless.run("train-flow", sets=["flow.training.best_by=last", "flow.training.learning_rate=1.0"]).ok()
    assert not (flowless.runs / "flow" / "checkpoints" / "best").exists()
    assert find_flow(flowless.runs).step == 8
    checkpoints = trained.runs / "flow" / "checkpoints"
    assert find_flow(trained.runs).path.name == (checkpoints / "best").read_text()
    measured = {r["step"]: r["validation_loss"] for r in story.read_log(trained, "flow") if "validation_loss" in r}
    assert find_flow(trained.runs).step == min(measured, key=measured.get)
