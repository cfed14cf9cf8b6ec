"""`gpu-check` as a rehearsal on a CPU: all checks, that each finds a device that computes otherwise, and its files."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from latent_cache import FlowBatch, ResidentSampler, StreamingSampler
from pipelines.__main__ import main
from pipelines.bench import comparisons, device_check
from pipelines.bench.comparisons import CHECKS, CheckRow, Story, compared, run_checks, skipped, story_config
from pipelines.bench.device_check import CheckSizes, GpuCheck, check_device
from pipelines.config import RiverConfig, parse_config
from pipelines.errors import CheckFailed, UserError
from pipelines.predictor import VideoPredictor
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import read_json
from pipelines.runtime.train_state import TrainState
from pipelines.training.autoencoder_trainer import AutoencoderTrainer
from pipelines.training.flow_trainer import FlowTrainer
from stage1_autoencoder.frame_encoder import FrameEncoder
from stage2_flow.linear import Linear
from stage2_flow.rollout import CachedEvaluator
from tests.no_host_sync import NoHostSync

CPU = torch.device("cpu")
SIZES = CheckSizes(
    videos=24, steps=10, compiles=False, presets=(("tiny", "shapes"),), batches=(4,), frames=1, seconds=0.0,
    store_bytes=400_000,
)  # fmt: skip


def config_of(runs: Path) -> RiverConfig:
    values = {
        "paths": {"runs": str(runs)},
        "dataset": {"name": "none", "source": "videos", "image_size": 32},
        "autoencoder": {
            "model": {
                "channels": 8, "channel_multipliers": [1, 2, 4, 8], "blocks": 1, "decoder_blocks": 1,
                "attention_resolutions": [], "codes": 32, "norm_groups": 4,
            }
        },
        "flow": {"model": {"width": 32, "depth": 1, "mid_depth": 0, "heads": 2, "dropout": 0.1}},
    }  # fmt: skip
    return parse_config(values, "a test")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """A story on a device that is another one by its name only."""
    folder = tmp_path_factory.mktemp("story")
    config = story_config(config_of(folder), folder, videos=SIZES.videos, steps=SIZES.steps)
    return Story(config, torch.device("cpu", 0), compiles=False)


@pytest.fixture
def fresh(story: Story) -> Story:
    """The story, which trains again on the device."""
    device = {key for key in story.known if key[0] == "cpu:0"}
    return dataclasses.replace(story, known={key: story.known[key] for key in story.known.keys() - device})


def states(rows: Iterator[CheckRow]) -> set[str]:
    return {row.state for row in rows}


def test_a_rehearsal(tmp_path):
    config = config_of(tmp_path / "runs")
    result = check_device(config, RunContext(CPU, asked_device="cpu"), 5, SIZES)
    assert read_json(config.run_path / "gpu_check.json", GpuCheck, "way out") == result
    table = (config.run_path / "gpu_check.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(result.checks) + len(result.measurements)
    for row in result.checks:
        assert row.state == "passed" or (row.state == "skipped" and ("CUDA" in row.why or "left out" in row.why)), row
        assert row.name in table
    assert sum(row.state == "passed" for row in result.checks) >= 15
    assert {row.unit for row in result.measurements} == {"steps/s", "frames/s"}
    assert len(result.measurements) == 4
    assert not result.left_out


def scaled(changed: Callable[[Any], Any]) -> Callable[[Any], Callable[..., Any]]:
    """Make a method's result another one in objects that are on the named device."""

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            result = method(self, *arguments, **options)
            return changed(result) if self.device.index == 0 else result

        return call

    return wrap


def other_rows(batch: FlowBatch) -> FlowBatch:
    return dataclasses.replace(batch, reference=batch.reference.roll(1, 0))


DAMAGES = [
    ("same draws", ResidentSampler, "batch", scaled(other_rows)),
    ("same draws", StreamingSampler, "batch", scaled(other_rows)),
    ("same draws", StreamingSampler, "targets", scaled(lambda targets: targets + 1)),
    (
        "encoding against the CPU", FrameEncoder, "encode",
        scaled(lambda encoded: dataclasses.replace(encoded, latents=encoded.latents * 1.001)),
    ),
    (
        "encoding against the CPU", FrameEncoder, "encode",
        scaled(lambda encoded: dataclasses.replace(encoded, codes=encoded.codes.roll(1, -1))),
    ),
    ("evaluation against the CPU", VideoPredictor, "decode_predictions", scaled(lambda images: images * 0.99)),
    ("compiled against eager", VideoPredictor, "generate_latents", scaled(lambda latents: latents * 1.0001)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "owner", "method", "damage"), DAMAGES)
def test_a_device_that_computes_otherwise_is_found(name, owner, method, damage, story, monkeypatch):
    assert story.run.exists()  # made on the CPU
    monkeypatch.setattr(owner, method, damage(getattr(owner, method)))
    assert "failed" in states(CHECKS[name](story))


def in_tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to the 10 bits of mantissa that TF32 has."""
    return ((x.detach().contiguous().view(torch.int32) + 2**12) & ~(2**13 - 1)).view(torch.float32)


def test_tf32_that_was_left_on_is_found(fresh, monkeypatch):
    step, forward, rounds = FlowTrainer.train_step, Linear.forward, []

    def train_step(trainer: FlowTrainer, number: int) -> Any:
        rounds[:] = [True] if trainer.device.index == 0 else []
        return step(trainer, number)

    def rounded(layer: Linear, x: torch.Tensor) -> torch.Tensor:
        return forward(layer, x + (in_tf32(x) - x.detach()) if rounds else x)

    monkeypatch.setattr(FlowTrainer, "train_step", train_step)
    monkeypatch.setattr(Linear, "forward", rounded)
    with_adamw, _ = CHECKS["losses against the CPU"](fresh)
    assert with_adamw.state == "failed"
    assert with_adamw.measured < 1e-2


def test_a_resume_that_forgets_is_found(fresh, monkeypatch):
    load = TrainState.load

    def forget(state: TrainState, *arguments: Any) -> None:
        load(state, *arguments)
        next(iter(state.optimizers[0].state.values()))["exp_avg"].zero_()

    monkeypatch.setattr(TrainState, "load", forget)
    # safetensors knows no cpu:0
    resumed, repeated = CHECKS["resume"](dataclasses.replace(fresh, device=CPU))
    assert resumed.state == "failed"
    assert repeated.state == "passed"


def test_a_tier_with_other_batches_is_found(fresh, monkeypatch):
    batch = ResidentSampler.batch

    def other(sampler: ResidentSampler, *arguments: int) -> FlowBatch:
        drawn = batch(sampler, *arguments)
        return other_rows(drawn) if sampler.storage_device.index == 0 else drawn

    monkeypatch.setattr(ResidentSampler, "batch", other)
    resident, streamed = CHECKS["tiers"](fresh)
    assert (resident.state, streamed.state) == ("failed", "passed")


@pytest.mark.parametrize(("measured", "state"), [(1.0, "passed"), (1.1, "failed"), (float("nan"), "failed")])
def test_a_bound(measured, state):
    assert compared("a", measured, 1.0, "b").state == state


def good(story: Story) -> Iterator[CheckRow]:
    yield skipped("nothing", "needs CUDA")
    yield compared("good", 0.0, 1.0, "why | so")


def bad(story: Story) -> Iterator[CheckRow]:
    yield compared("bad", float("nan"), 1.0, "why")
    raise OSError("no\nway")


def test_an_exception_is_the_failure_of_its_check(story, monkeypatch):
    monkeypatch.setattr(comparisons, "CHECKS", {"one": bad, "two": good})
    rows = list(run_checks(story))
    assert [(row.name, row.state) for row in rows] == [
        ("bad", "failed"), ("one", "failed"), ("nothing", "skipped"), ("good", "passed"),
    ]  # fmt: skip
    assert "OSError" in rows[1].why
    assert "no" in rows[1].why
    assert "in bad" in rows[1].trace


def test_the_command(tmp_path, monkeypatch, capsys):
    """It ends with exit code 1 after all was written; what there is no time for is named."""
    monkeypatch.setattr(device_check, "REHEARSAL", dataclasses.replace(SIZES, batches=(4, 8)))
    monkeypatch.setattr(comparisons, "CHECKS", {"one": bad, "two": good})
    words = ["gpu-check", "--device", "cpu", "--set", f"paths.runs={tmp_path}"]
    assert main(words) == 1
    captured = capsys.readouterr()
    assert "bad" in captured.err
    assert "Traceback" not in captured.err
    result = read_json(tmp_path / "shapes" / "gpu_check.json", GpuCheck, "way out")
    assert [row.state for row in result.checks] == ["failed", "failed", "skipped", "passed"]
    assert result.table() in captured.out
    assert len(result.measurements) == 6

    with pytest.raises(CheckFailed):
        check_device(config_of(tmp_path), RunContext(CPU, asked_device="cpu"), 0)
    result = read_json(tmp_path / "none" / "gpu_check.json", GpuCheck, "way out")
    assert len(result.checks) == 4
    assert not result.measurements
    assert len(result.left_out) == 6
    assert all(name in result.table() for name in result.left_out)


def test_a_gpu_that_torch_cannot_use_is_no_rehearsal(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 123.45")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(comparisons, "CHECKS", {"two": good})
    config = config_of(tmp_path)
    with pytest.raises(UserError, match=r"123\.45.*TORCH_INDEX.*--device cpu"):
        check_device(config, RunContext(CPU), 0, SIZES)
    assert check_device(config, RunContext(CPU, asked_device="cpu"), 0, SIZES).checks
    assert device_check.gpu_versions(torch.device("cuda"))["driver"] == "123.45"


def test_a_speed_that_cannot_be_measured_is_named(tmp_path, monkeypatch):
    def full(*arguments: Any, **options: Any) -> float:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(comparisons, "CHECKS", {"two": good})
    monkeypatch.setattr(device_check, "step_seconds", full)
    result = check_device(config_of(tmp_path), RunContext(CPU, asked_device="cpu"), 1, SIZES)
    assert len(result.measurements) == 2
    assert len(result.left_out) == 2
    assert all("too large" in why for why in result.left_out.values())


@pytest.fixture
def pretended(story: Story, monkeypatch: pytest.MonkeyPatch) -> Iterator[Story]:
    """The story on a CPU that passes for a GPU."""
    modes, entered = ExitStack(), []

    def set_mode(mode: str) -> None:
        modes.close()
        if mode == "error":
            entered.append(modes.enter_context(NoHostSync()))

    monkeypatch.setattr(Story, "on_gpu", True)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", set_mode)
    yield dataclasses.replace(story, device=CPU)
    modes.close()
    assert len(entered) >= 3


def test_steps_do_not_wait(pretended):
    rows = list(CHECKS["no waiting"](pretended))
    assert [row.state for row in rows] == ["passed"] * 3, rows


def test_a_step_that_waits_is_found(pretended, monkeypatch):
    def read(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            result = method(*arguments)
            torch.ones(2)[0].item()
            return result

        return call

    for owner, name in ((FlowTrainer, "train_step"), (AutoencoderTrainer, "train_step"), (CachedEvaluator, "velocity")):
        monkeypatch.setattr(owner, name, read(getattr(owner, name)))
    rows = list(CHECKS["no waiting"](pretended))
    assert [row.state for row in rows] == ["failed"] * 3, rows
    assert all("makes the host wait" in row.why for row in rows)
