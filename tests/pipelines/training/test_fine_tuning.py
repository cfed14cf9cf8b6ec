"""`train-flow --fine-tune`: which weights it starts from, what it keeps, how it resumes, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from latent_cache import SplitPlan, StoreMetadata, StoreWriter
from pipelines.config import RiverConfig, parse_config
from pipelines.errors import StoppedBySignal, UserError
from pipelines.loading import find_flow, load_trained_field, weights_digest
from pipelines.runtime.checkpoints import Checkpoint, CheckpointFolder
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import SEAL
from pipelines.runtime.run_folder import move_to_backup, only_training_of
from pipelines.stages import describe
from pipelines.training.flow_trainer import FlowTrainer, train_flow

CPU = torch.device("cpu")
AUTOENCODER = "a" * 64


class Kit:
    """A run whose flow is trained on stores of noise; no autoencoder is needed for that."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write_store(mean=3.0)

    def config(self, model: dict[str, Any] | None = None, **training: Any) -> RiverConfig:
        """Settings of a training; 4 steps with a warm-up, checkpoints at 2 and 4, no validation split."""
        values = {"steps": 4, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 1, "clip_frames": 8,
                  "checkpoint_every": 2, "standardize": True, "ema_decay": 0.5}  # fmt: skip
        sizes = {"width": 16, "depth": 1, "mid_depth": 0, "heads": 2, "dropout": 0.1}
        return parse_config(
            {
                "paths": {name: str(self.folder / name) for name in ("data", "latents", "runs")},
                "dataset": {"name": "toy", "source": "shapes"},
                "flow": {"model": sizes | (model or {}), "training": values | training},
            },
            "a test",
        )

    def write_store(self, *, mean: float, autoencoder: str = AUTOENCODER, side: int = 2) -> None:
        """Noise around a mean, with 2 as its deviation."""
        path = self.config().store_path
        lengths, shape = [12, 9, 7], (4, side, side)
        plan = SplitPlan([f"clip_{i}" for i in range(3)], ["identity"] * 3, lengths, shape, 64)
        metadata = StoreMetadata("toy", 10.0, {}, {"sha256": autoencoder, "codes": 8}, {})
        generator = np.random.default_rng(int(mean))
        with StoreWriter.open(path, metadata, {"train": plan}, codes=False, overwrite=path.exists()) as writer:
            for chunk in plan.chunks:
                latents = (mean + 2 * generator.standard_normal((chunk.frames, *shape))).astype(np.float32)
                writer.write_chunk("train", chunk, latents, None)
            writer.finish()

    def train(self, config: RiverConfig | None = None, **run_context: Any) -> Checkpoint:
        return train_flow(config or self.config(), RunContext(CPU, **run_context))

    @property
    def flow(self) -> Path:
        return self.config().run_path / "flow"

    @property
    def backups(self) -> list[Path]:
        return sorted(path for path in self.flow.parent.iterdir() if path.name.startswith("flow."))


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def all_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in checkpoint.path.iterdir() if file.suffix == ".safetensors"}


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("ema", [0.5, None])
def test_it_starts_from_the_weights_that_predict(kit: Kit, ema: float | None) -> None:
    start = kit.train()
    averaged = start.tensors("ema")
    assert not same(averaged, start.tensors("model"))
    # The first step of a warm-up has learning rate 0.
    tuned = kit.train(kit.config(steps=1, ema_decay=ema), fine_tune=True)
    assert same(tuned.tensors("model"), averaged)
    assert tuned.has("ema") == (ema is not None)
    if ema is not None:
        assert same(tuned.tensors("ema"), averaged)
    random = kit.train(kit.config(steps=1), restart=True)
    assert not same(random.tensors("model"), averaged)
    assert "fine_tuned_from" not in random.state


def test_the_average_moves_from_the_start(kit: Kit) -> None:
    averaged = kit.train().tensors("ema")
    tuned = kit.train(kit.config(steps=1, ema_decay=0.9, warmup_steps=0), fine_tune=True)
    assert not same(tuned.tensors("model"), averaged)
    for name, start in averaged.items():
        expected = start + 0.9 * (tuned.tensors("model")[name] - start)
        torch.testing.assert_close(tuned.tensors("ema")[name], expected, atol=1e-6, rtol=1e-5)


def test_the_existing_flow_is_moved_to_a_backup(kit: Kit, capsys: pytest.CaptureFixture[str]) -> None:
    start = kit.train()
    digest, kept = weights_digest(load_trained_field(start, CPU)), all_files(start)
    tuned = kit.train(kit.config(learning_rate=1e-3), fine_tune=True)
    assert names_of(kit.flow) == ["step_00000002", "step_00000004"]
    (backup,) = kit.backups
    assert all_files(Checkpoint(backup / "checkpoints" / start.path.name, {})) == kept
    out = capsys.readouterr().out
    assert str(backup) in out
    assert "steps 0 to 4" in out
    origin = tuned.state["fine_tuned_from"]
    assert (origin["step"], origin["weights"]) == (4, digest)
    assert origin["store"] == start.state["store"]
    assert "imported" not in origin
    assert [record["step"] for record in map(json.loads, (kit.flow / "log.jsonl").read_text().splitlines())] == [4]


def test_a_plain_train_flow_knows_it_afterwards(kit: Kit, capsys: pytest.CaptureFixture[str]) -> None:
    kit.train()
    tuned = kit.train(kit.config(learning_rate=1e-3), fine_tune=True)
    for run_context in ({}, {"fine_tune": True}):
        capsys.readouterr()
        assert kit.train(kit.config(learning_rate=1e-3), **run_context).path == tuned.path
        out = capsys.readouterr().out
        assert "flow: done, 4 steps of fine-tuning from step 4" in out
        assert ("--fine-tune --restart" in out) == bool(run_context)
    assert len(kit.backups) == 1
    assert "4 steps of fine-tuning" in describe(kit.config(learning_rate=1e-3), CPU)
    with pytest.raises(UserError, match=r"learning_rate: 0.001 -> 0.01\n.*`train-flow --fine-tune --restart`"):
        kit.train(fine_tune=True)
    again = kit.train(fine_tune=True, restart=True)
    assert again.state["fine_tuned_from"]["fine_tuned_from"] == tuned.state["fine_tuned_from"]
    assert len(kit.backups) == 2


@pytest.mark.parametrize("again", [{}, {"fine_tune": True}])
def test_a_stopped_fine_tuning_resumes_exactly(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, again: dict[str, Any]
) -> None:
    kit.train()
    config = kit.config(learning_rate=3e-3)
    whole = kit.train(config, fine_tune=True)
    expected, state = all_files(whole), whole.state
    move_to_backup(kit.flow, "flow")
    kit.backups[0].rename(kit.flow)
    step = FlowTrainer.train_step

    def stops(self: FlowTrainer, number: int) -> Any:
        if number == 3:
            raise StoppedBySignal(9, "killed")
        return step(self, number)

    monkeypatch.setattr(FlowTrainer, "train_step", stops)
    with pytest.raises(StoppedBySignal):
        kit.train(config, fine_tune=True)
    monkeypatch.setattr(FlowTrainer, "train_step", step)
    assert names_of(kit.flow) == ["step_00000000", "step_00000002"]
    halves = kit.train(config, **again)
    assert all_files(halves) == expected
    assert dict(halves.state) == dict(state)


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("moment", ["while it saves", "before the old one is moved", "after that", "at step 1"])
def test_killed_while_it_begins(kit: Kit, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    start = kit.train()
    config = kit.config(learning_rate=3e-3)

    def dies(*_: Any, **__: Any) -> None:
        raise Killed

    def dies_after(*arguments: Any) -> None:
        move_to_backup(*arguments)
        raise Killed

    where, how = {
        "while it saves": ("pipelines.runtime.checkpoints.save_file", dies),
        "before the old one is moved": ("pipelines.training.fine_tuning.move_to_backup", dies),
        "after that": ("pipelines.training.fine_tuning.move_to_backup", dies_after),
        "at step 1": ("pipelines.training.flow_trainer.FlowTrainer.train_step", dies),
    }[moment]
    with monkeypatch.context() as patch:
        patch.setattr(where, how)
        with pytest.raises(Killed):
            kit.train(config, fine_tune=True)
    old_is_in_place = moment in ("while it saves", "before the old one is moved")
    if old_is_in_place:  # and still in use
        assert kit.train().path == start.path
    resumed = kit.train(config, fine_tune=True) if old_is_in_place else kit.train(config)
    assert resumed.state["fine_tuned_from"]["weights"] == weights_digest(_field(kit, start))
    assert resumed.step == 4
    (backup,) = kit.backups
    assert names_of(backup) == ["step_00000002", "step_00000004"]


def _field(kit: Kit, start: Checkpoint) -> torch.nn.Module:
    return load_trained_field(Checkpoint(kit.backups[0] / "checkpoints" / start.path.name, start.state), CPU)


def test_one_without_a_step_is_begun_again_in_its_place(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a refused batch size it begins again, without a second copy of the weights."""
    start = kit.train()
    with pytest.raises(UserError, match=r"fewer than flow.training.batch_size 800: lower it"):
        kit.train(kit.config(batch_size=800), fine_tune=True)
    assert names_of(kit.flow) == ["step_00000000"]
    tuned = kit.train(kit.config(batch_size=4), fine_tune=True)
    assert tuned.state["fine_tuned_from"]["step"] == 4
    assert "fine_tuned_from" not in tuned.state["fine_tuned_from"]
    (backup,) = kit.backups
    assert start.path.name in names_of(backup)


def test_standardization_is_that_of_the_start(kit: Kit) -> None:
    start = kit.train()
    assert start.state["standardization"]["mean"] == pytest.approx([3.0] * 4, abs=0.5)
    kit.write_store(mean=50.0)
    tuned = kit.train(fine_tune=True)
    assert tuned.state["standardization"] == start.state["standardization"]
    assert tuned.state["store"]["fingerprint"] != start.state["store"]["fingerprint"]
    assert tuned.state["fine_tuned_from"]["store"] == start.state["store"]
    # A training from random weights has those of its store.
    assert kit.train(restart=True).state["standardization"]["mean"] == pytest.approx([50.0] * 4, abs=0.5)


@pytest.mark.parametrize(
    ("trained", "changed", "message"),
    [
        ({}, {"model": {"width": 32}}, r"step_00000004 .*:\n  flow.model.width: 16 -> 32\n"),
        ({}, {"model": {"head": "bn"}}, r"flow.model.head: ln -> bn"),
        ({}, {"standardize": False}, r"standardize: false.*step_00000004.*standardize=true"),
        ({"standardize": False}, {"standardize": True}, r"standardize: true, but .*raw latents.*standardize=false"),
    ],
    ids=["width", "head", "standardised", "raw"],
)
def test_settings_that_do_not_fit_the_start_are_refused(
    kit: Kit, trained: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    start = kit.train(kit.config(**trained))
    with pytest.raises(UserError, match=message):
        kit.train(kit.config(**(trained | changed)), fine_tune=True)
    assert find_flow(kit.flow.parent).path == start.path
    assert kit.backups == []


def test_dropout_is_no_size(kit: Kit) -> None:
    kit.train()
    tuned = kit.train(kit.config({"dropout": 0.0}), fine_tune=True)
    assert tuned.state["model"]["dropout"] == 0.0


def test_latents_of_another_autoencoder_are_refused(kit: Kit) -> None:
    kit.train()
    kit.write_store(mean=3.0, autoencoder="b" * 64)
    with pytest.raises(
        UserError,
        match=r"toy.zarr was encoded by autoencoder bbbbbbbbbbbb.*aaaaaaaaaaaa.*encode --overwrite.*--restart",
    ):
        kit.train(fine_tune=True)
    assert kit.backups == []


def test_larger_frames_are_taken_with_a_warning(kit: Kit, capsys: pytest.CaptureFixture[str]) -> None:
    kit.train()
    kit.write_store(mean=3.0, side=3)
    assert kit.train(fine_tune=True).state["latent_shape"] == [4, 3, 3]
    assert "was trained on latents of 2x2, and" in capsys.readouterr().err


def test_nothing_to_start_from(kit: Kit) -> None:
    with pytest.raises(UserError, match=r"flow/checkpoints .*`import-official`.*`train-flow`"):
        kit.train(fine_tune=True)
    kit.train()
    with pytest.raises(UserError, match=r"--resume 2 .*--fine-tune"):
        kit.train(fine_tune=True, resume="2")


def test_an_unfinished_training_is_a_start_only_with_restart(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(self: FlowTrainer, step: int) -> None:
        raise StoppedBySignal(15, "stopped")

    kit.train(kit.config(steps=2))
    with monkeypatch.context() as patch:
        patch.setattr(FlowTrainer, "train_step", stops)
        with pytest.raises(StoppedBySignal):
            kit.train(kit.config(steps=6))
    assert kit.train(kit.config(steps=2)).step == 2
    # The training before had 2 steps, whatever the fine-tuning has.
    assert kit.train(kit.config(steps=6), fine_tune=True).step == 6
    kit.train(kit.config(steps=4), restart=True)
    state = kit.flow / "checkpoints" / "step_00000004" / "state.json"
    content = json.loads(state.read_text())
    content["settings"]["flow"]["training"]["steps"] = 9
    del content[SEAL]
    state.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"step_00000004 .* 4 of 9 .*--fine-tune --restart"):
        kit.train(fine_tune=True)
    assert kit.train(fine_tune=True, restart=True).state["fine_tuned_from"]["step"] == 4


def test_another_process_that_trains_or_begins_is_respected(kit: Kit) -> None:
    kit.train()
    with only_training_of(kit.flow), pytest.raises(UserError, match="is training here"):
        kit.train(fine_tune=True)
    assert kit.train().step == 4
    beginning = kit.flow.with_name("flow.beginning")
    with only_training_of(beginning), pytest.raises(UserError, match=r"flow.beginning: process .* is training here"):
        kit.train()
    assert beginning.is_dir()
    kit.train()
    assert not beginning.exists()


def test_optimizer_moments_start_from_zero(kit: Kit) -> None:
    kit.train()
    kit.train(kit.config(steps=1), fine_tune=True)
    first = CheckpointFolder(kit.flow / "checkpoints").named("0")
    assert first.tensors("optimizer") == {}
    counts = {int(v) for name, v in find_flow(kit.flow.parent).tensors("optimizer").items() if name.endswith("step")}
    assert counts == {1}
