"""The same command gives the same digits, whatever its process did before, in the precision and from the distances of
the training; and it leaves its process as it was."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch

from pipelines.predictor import VideoPredictor

BACKENDS = torch.backends


def settings() -> dict[str, Any]:
    """What a process can set about digits."""
    places = {"cuda": BACKENDS.cuda.matmul, "cudnn": BACKENDS.cudnn.conv,
              "matrices": BACKENDS.mkldnn.matmul, "convolutions": BACKENDS.mkldnn.conv}  # fmt: skip
    return {
        "matmul": torch.get_float32_matmul_precision(),
        "tf32": BACKENDS.cudnn.allow_tf32,
        "benchmark": BACKENDS.cudnn.benchmark,
        "autocast": torch.is_autocast_enabled("cpu"),
    } | {name: place.fp32_precision for name, place in places.items()}


@contextmanager
def rough() -> Iterator[None]:
    """A process that trades digits for speed wherever it can, and leaves all that to whoever computes in it."""
    before = settings()
    torch.set_float32_matmul_precision("medium")
    BACKENDS.cudnn.allow_tf32 = BACKENDS.cudnn.benchmark = True
    BACKENDS.mkldnn.conv.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", torch.bfloat16):
            during = settings()
            yield
            assert settings() == during
    finally:
        torch.set_float32_matmul_precision(before["matmul"])
        BACKENDS.cudnn.allow_tf32, BACKENDS.cudnn.benchmark = before["tf32"], before["benchmark"]
        BACKENDS.mkldnn.conv.fp32_precision = before["convolutions"]


def test_evaluation(copied) -> None:
    file = copied.runs / "evaluation.json"
    copied.run("evaluate").ok()
    clean = json.loads(file.read_text())
    assert clean["protocol"]["predictor"]["sampling"]["precision"] == "fp32"
    with rough():
        copied.run("evaluate").ok()
    assert json.loads(file.read_text()) == clean


def test_encoding(trained, tmp_path, story: ModuleType) -> None:
    place = trained.copy(tmp_path / "place", "runs")
    with rough():
        place.run("encode").ok()
        place.run("encode", "--verify", "16").ok()
    expected, found = story.tree(trained.store), story.tree(place.store)
    chunks = {name for name in expected if "/c/" in name}
    assert len(chunks) >= 6
    assert all(found[name] == expected[name] for name in chunks)


def test_the_python_api(trained) -> None:
    predictor = VideoPredictor.from_run(trained.runs, "cpu")
    images = torch.rand(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = predictor.generate_frames(images, 4)
    with rough():
        assert torch.equal(predictor.generate_frames(images, 4), expected)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("what", ["autoencoder", "flow"])
def test_a_training_leaves_its_process_as_it_was(trained, tmp_path, what, precision) -> None:
    place = trained.copy(tmp_path / "place", "latents")
    before = settings()
    place.run(f"train-{what}", sets=(f"{what}.training.precision={precision}", f"{what}.training.steps=1")).ok()
    assert settings() == before


SETTINGS = {
    "autoencoder": ("autoencoder.training.codebook_start=uniform",),  # not from latents, in the training's precision
    "flow": (),
    "refiner": ("refiner.model={groups: 1, blocks: 1, features: 4, reduction: 2}", "refiner.training.clip_frames=3",
                "refiner.training.batch_size=2", "refiner.training.validation_clips=2"),
    "decoder": ("decoder.training.batch_size=2", "decoder.training.validation_frames=2"),
}  # fmt: skip


@pytest.mark.parametrize("what", SETTINGS)
def test_inference_during_a_training_is_in_full_precision(trained, tmp_path, what) -> None:
    """Validation, and whatever the autoencoder decodes; passes with gradients are in the training's precision.

    Where a training is mostly convolutions, cuDNN measures kernels for its shapes; inference keeps to the same kernels.
    """
    place = trained.copy(tmp_path / "place", "latents", "runs")
    seen: dict[bool, set[tuple[str, bool]]] = {True: set(), False: set()}

    def note(module: torch.nn.Module, inputs: object) -> None:
        if any(
            type(parameter) is torch.nn.Parameter for parameter in module.parameters()
        ):  # FLOPs are counted on fakes
            seen[torch.is_grad_enabled()].add((torch.get_float32_matmul_precision(), BACKENDS.cudnn.benchmark))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        sets = (f"{what}.training.precision=tf32", f"{what}.training.steps=1", *SETTINGS[what])
        place.run(f"train-{what}", *(("--restart",) if what != "refiner" else ()), sets=sets).ok()
    finally:
        hook.remove()
    assert seen == {True: {("high", what != "flow")}, False: {("highest", False)}}


def recorded_precision(place) -> str:
    state = json.loads((place.checkpoint("flow") / "state.json").read_text())
    found = {state[part]["flow"]["training"]["precision"] for part in ("identity", "settings")}
    assert len(found) == 1
    return found.pop()


def test_auto_is_resolved_before_it_is_recorded(trained) -> None:
    assert recorded_precision(trained) == "fp32"


def test_auto_goes_on_in_the_precision_of_the_existing_training(trained, tmp_path) -> None:
    """As a training that began on a GPU, whose choice is bf16."""
    place = trained.copy(tmp_path / "place", "latents", "runs")
    bf16, half = "flow.training.precision=bf16", "flow.training.steps=4"
    place.run("train-flow", "--restart", sets=(bf16, half)).ok()
    resumed = place.run("train-flow", sets=("flow.training.precision=auto", "flow.training.steps=8")).ok()
    assert "steps 4 to 8" in resumed.out
    assert [line for line in resumed.out.splitlines() if {"bf16,", "fp32"} <= {*line.split()}]
    assert recorded_precision(place) == "bf16"
    assert "flow: done" in place.run("train-flow").ok().out
    place.run("evaluate").ok()
    place.run("train-flow", sets=("flow.training.precision=fp32",)).refused(2, "flow.training.precision: bf16 -> fp32")
    place.run("train-flow", "--fine-tune", sets=(half,)).ok()
    assert recorded_precision(place) == "fp32"
    place.run("train-flow", "--restart", sets=(bf16, half)).ok()
    place.run("train-flow", "--restart", sets=(half,)).ok()
    assert recorded_precision(place) == "fp32"


def test_predictions_stay_within_the_distances_of_the_training(copied) -> None:
    """Clips of 8 frames in training: a condition is at most 6 frames before its reference."""
    usual = copied.run("sample").ok()
    assert "drawn from the last" not in usual.out
    longer = copied.run("sample", sets=("evaluation.horizon=9",)).ok()
    assert longer.out.count("drawn from the last 7 frames") == 1
    listed = json.loads((copied.runs / "samples" / "samples.json").read_text())
    assert (listed["sampling"]["past_horizon"], listed["sampling"]["precision"]) == (7, "fp32")
    official = ("evaluation.horizon=9", "sampling.preset=official", "sampling.solver=euler", "sampling.steps=4")
    assert "drawn from the last" not in copied.run("sample", sets=official).ok().out
