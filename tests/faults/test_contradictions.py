"""Checkpoints and stores that are damaged, or belong to something else: refused by name, with the way out."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

import latent_cache
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.files import SEAL
from pipelines.runtime.run_folder import only_training_of
from stage1_autoencoder.vqgan import VQGAN
from stage2_flow.vector_field import VectorField

OTHER_SEED = ["seed=1"]


def edit_state(checkpoint: Path, change) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    del state[SEAL]
    change(state)
    (checkpoint / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(("command", "change", "line"), [
    ("train-flow", "flow.model.width=64", "flow.model.width: 32 -> 64"),
    ("train-flow", "flow.training.learning_rate=5e-4", "flow.training.learning_rate: 0.001 -> 0.0005"),
    ("sample", "flow.model.head=bn", "flow.model.head: ln -> bn"),
    ("train-autoencoder", "autoencoder.model.channels=16", "autoencoder.model.channels: 8 -> 16"),
    ("encode", "autoencoder.model.codes=64", "autoencoder.model.codes: 32 -> 64"),
    ("encode", "dataset.shapes.max_speed=2.5", "dataset.shapes.max_speed: 3.0 -> 2.5"),
])  # fmt: skip
def test_checkpoint_of_another_configuration(trained, story: ModuleType, command: str, change: str, line: str) -> None:
    before = story.stamps(trained.store, trained.runs)
    trained.run(command, sets=[change]).refused(2, "step_0000000", line, "--restart")
    assert story.stamps(trained.store, trained.runs) == before


def test_restart_moves_the_old_flow_to_a_backup(copied, trained, story: ModuleType) -> None:
    outcome = copied.run("train-flow", "--restart", sets=["flow.model.width=64"]).ok()
    (aside,) = copied.runs.glob("flow.*")
    assert str(aside) in outcome.out
    assert story.tree(aside) == story.tree(trained.runs / "flow")
    assert "steps 0 to 8" in outcome.out
    assert CheckpointFolder(copied.runs / "flow" / "checkpoints").latest().state["model"]["width"] == 64
    # The way out is gone once, not each time.
    assert "flow: done" in copied.run("sample", sets=["flow.model.width=64"]).ok().out
    assert story.tree(copied.runs / "autoencoder") == story.tree(trained.runs / "autoencoder")


def test_another_autoencoder(copied, trained, story: ModuleType) -> None:
    """Trained anew with another seed: the store, and the flow on it, are of the old one, and both are refused."""
    store = story.tree(copied.store)
    copied.run("train-autoencoder", "--restart", sets=OTHER_SEED).ok()
    was_encoded = f"{copied.store} was encoded by autoencoder "
    copied.run("encode", sets=OTHER_SEED).refused(2, was_encoded, "encode --overwrite")
    copied.run("train-flow", "--restart", sets=OTHER_SEED).refused(2, was_encoded)
    copied.run("inspect", "--gif", str(copied.folder / "x.gif"), sets=OTHER_SEED).refused(2, "but", "is another")
    assert story.tree(copied.store) == store

    copied.run("encode", "--overwrite", sets=OTHER_SEED).ok()
    assert story.tree(copied.store) != store
    assert latent_cache.is_complete(copied.store)
    copied.run("train-flow", "--restart", sets=OTHER_SEED).ok()
    copied.run("sample", sets=OTHER_SEED).ok()


def test_flow_of_a_store_of_another_autoencoder(copied, story: ModuleType) -> None:
    """The flow's seed is the same, so that only the store tells."""
    change = ["autoencoder.training.learning_rate=2e-4"]
    copied.run("train-autoencoder", "--restart", sets=change).ok()
    copied.run("sample", sets=change).refused(2, "was encoded by autoencoder")
    copied.run("encode", "--overwrite", sets=change).ok()
    for command in ("train-flow", "sample", "evaluate"):
        copied.run(command, sets=change).refused(
            2, "store.autoencoder: ", "store.fingerprint: ", "train-flow --restart"
        )
    shutil.move(copied.store, copied.folder / "away.zarr")
    copied.run("sample", sets=change).refused(2, "was trained on latents of autoencoder", "but", "is ")
    shutil.move(copied.folder / "away.zarr", copied.store)
    copied.run("train-flow", "--restart", sets=change).ok()
    copied.run("sample", sets=change).ok()


def test_store_with_other_preprocessing(copied, trained, story: ModuleType) -> None:
    latent_cache.unseal(copied.store)
    attributes = copied.store / "zarr.json"
    content = json.loads(attributes.read_text())
    content["attributes"]["preprocessing"]["frame_step"] = 2
    attributes.write_text(json.dumps(content))
    for command in ("encode", "train-flow"):
        copied.run(command).refused(2, "other preprocessing", "frame_step: 2 in the store, 1 in the", "--overwrite")
    copied.run("encode", "--overwrite").ok()
    assert story.tree(copied.store) == story.tree(trained.store)
    assert "flow: done" in copied.run("train-flow").ok().out


@pytest.mark.parametrize("command", ["train-flow", "sample", "evaluate"])
def test_a_store_that_is_not_complete_is_not_trained_on(copied, story: ModuleType, command: str) -> None:
    root = copied.store / "zarr.json"
    content = json.loads(root.read_text())
    content["attributes"]["complete"] = False
    root.write_text(json.dumps(content))
    shutil.rmtree(copied.runs / "flow")
    copied.run(command).refused(2, f"{copied.store}: the store is not complete", "encode --overwrite")
    assert not (copied.runs / "flow" / "checkpoints").exists()
    copied.run("encode").refused(2, str(copied.store), "encode --overwrite")
    copied.run("encode", "--overwrite").ok()
    copied.run(command).ok()


def test_half_done_store_of_another_autoencoder(copied, story: ModuleType, monkeypatch) -> None:
    from latent_cache import StoreWriter

    shutil.rmtree(copied.store)
    with monkeypatch.context() as patch:
        story.send_at(patch, StoreWriter, "finish", 1)
        patch.setattr(StoreWriter, "finish", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        copied.run("encode").refused(1, "Input/output error")
    copied.run("train-autoencoder", "--restart", sets=OTHER_SEED).ok()
    copied.run("encode", sets=OTHER_SEED).refused(2, str(copied.store), "autoencoder", "--overwrite")
    copied.run("encode", "--overwrite", sets=OTHER_SEED).ok()
    assert latent_cache.is_complete(copied.store)


@pytest.mark.parametrize("what", ["flow", "autoencoder"])
@pytest.mark.parametrize("damage", ["other sizes", "impossible sizes", "unknown size", "no model"])
def test_edited_state(copied, what: str, damage: str) -> None:
    def change(state: dict) -> None:
        model = state["model"]
        match damage:
            case "other sizes":
                model["width" if what == "flow" else "channels"] *= 2
            case "impossible sizes":
                model["heads" if what == "flow" else "norm_groups"] = 7
            case "unknown size":
                model["colour"] = 3
            case "no model":
                del state["model"]

    checkpoint = copied.checkpoint(what)
    edit_state(checkpoint, change)
    lacks, misfits = (
        f"{checkpoint}/state.json has no 'model'",
        f"{checkpoint}: weights don't fit the sizes in state.json",
    )
    copied.run("sample").refused(2, lacks if damage == "no model" else misfits)


@pytest.mark.parametrize("what", ["flow", "autoencoder"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "state", "no state"])
def test_damaged_newest_checkpoint(copied, trained, story: ModuleType, what: str, damage: str) -> None:
    """It is named, and training goes on from the one before to the same end."""
    checkpoint = copied.checkpoint(what)
    match damage:
        case "truncated":
            file = checkpoint / "optimizer.safetensors"
            file.write_bytes(file.read_bytes()[:-100])
        case "missing":
            (checkpoint / "model.safetensors").unlink()
        case "state":
            (checkpoint / "state.json").write_text('{"step": ')
        case "no state":
            (checkpoint / "state.json").unlink()
    outcome = copied.run(f"train-{what}").ok()
    assert f"warning: {checkpoint}: not a whole checkpoint" in outcome.err
    steps = {"flow": "steps 4 to 8", "autoencoder": "steps 3 to 6"}[what]
    assert steps in outcome.out
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (copied.checkpoint(what) / file).read_bytes() == (trained.checkpoint(what) / file).read_bytes()
    assert "done" in copied.run(f"train-{what}").ok().out


def test_without_a_whole_checkpoint_nothing_is_trained_over_the_damaged_ones(copied, story: ModuleType) -> None:
    """Only with --restart, which keeps them."""
    for state in (copied.runs / "flow").rglob("state.json"):
        state.unlink()
    weights = {path.name for path in (copied.runs / "flow" / "checkpoints").glob("step_*")}
    for command in ("train-flow", "sample"):
        copied.run(command).refused(2, str(copied.runs / "flow" / "checkpoints"), "none of them is whole", "--restart")
    assert "steps 0 to 8" in copied.run("train-flow", "--restart").ok().out
    assert [record["step"] for record in story.read_log(copied, "flow")] == [2, 4, 6, 8]
    (backup,) = copied.runs.glob("flow.*")
    assert weights == {path.name for path in (backup / "checkpoints").glob("step_*")}


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "flipped"])
def test_damaged_chunk(trained, tmp_path: Path, damage: str) -> None:
    place = trained.copy(tmp_path / "damaged", "latents")
    chunk = place.store / "train" / "latents" / "c" / "0" / "0" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    match damage:
        case "truncated":
            chunk.write_bytes(content[: len(content) // 2])
        case "empty":
            chunk.write_bytes(b"")
        case "missing":
            chunk.unlink()
        case "flipped":
            content[100] ^= 1
            chunk.write_bytes(content)
    place.run("train-flow").refused(2, str(place.store), "train/latents/c/0/0/0/0", "train_00000")
    assert not (place.runs / "flow" / "checkpoints").exists()


def test_store_that_is_none(place, command) -> None:
    place.store.mkdir(parents=True)
    (place.store / "holiday.jpg").write_bytes(b"x")
    for words in (["encode"], ["train-flow"], ["encode", "--overwrite"]):
        place.run(*words).refused(2, str(place.store))
    assert (place.store / "holiday.jpg").read_bytes() == b"x"
    assert "conflicting" in place.run("encode", "--dry-run").ok().out
    command(["inspect", str(place.folder / "none.zarr")]).refused(2, "none.zarr: no such path")
    command(["inspect", str(place.store)]).refused(2, str(place.store))


def test_run_without_its_config(copied) -> None:
    (copied.runs / "config.yaml").unlink()
    copied.run("sample").refused(2, f"{copied.runs}/config.yaml: missing")


def test_loss_that_is_not_finite(trained, tmp_path: Path, story: ModuleType, monkeypatch) -> None:
    """Nothing is updated by such steps, and `max_bad_steps` of them stop the training with advice."""
    place, calls = trained.copy(tmp_path / "nan", "latents"), itertools.count(1)
    story.wrap_field(monkeypatch, lambda forward, *inputs: forward(*inputs) * (float("nan") if next(calls) >= 7 else 1))
    sets = ["logging.every=10", "flow.training.checkpoint_every=2", "flow.training.steps=20"]
    sets += ["flow.training.max_bad_steps=3"]
    outcome = place.run("train-flow", sets=sets).refused(
        2, "not finite at step 9 (loss nan", "3 steps in a row", "on targets in train_000", "flow.training.grad_clip",
    )  # fmt: skip
    assert "not finite at step 7 (loss nan" in outcome.err
    assert "2 such steps in a row, 3 end the training" in outcome.err
    sixth, eighth = (place.runs / "flow" / "checkpoints" / f"step_{step:08d}" for step in (6, 8))
    assert (eighth / "model.safetensors").read_bytes() == (sixth / "model.safetensors").read_bytes()


@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_predictions_that_are_not_finite(copied, story: ModuleType, monkeypatch, command: str) -> None:
    """No number and no picture is made of them, and the earlier results stay."""
    before, calls, head = story.stamps(copied.runs), itertools.count(), VectorField.to_velocity

    def overflows(field: VectorField, *inputs: object) -> torch.Tensor:
        return head(field, *inputs) * (float("inf") if next(calls) == 5 else 1)  # two evaluations per frame

    monkeypatch.setattr(VectorField, "to_velocity", overflows)
    copied.run(command).refused(2, "predicted latents: NaN or inf in frame 4 of video 0")
    assert story.stamps(copied.runs) == before


def test_autoencoder_loss_that_is_not_finite(place, monkeypatch) -> None:
    forward, calls = VQGAN.forward, itertools.count(1)

    def breaks(model: VQGAN, images: torch.Tensor) -> object:
        output = forward(model, images)
        return dataclasses.replace(output, images=output.images * (float("nan") if next(calls) >= 4 else 1))

    monkeypatch.setattr(VQGAN, "forward", breaks)
    sets = ["logging.every=10", "autoencoder.training.checkpoint_every=2"]
    sets += ["autoencoder.training.validate_every=100", "autoencoder.training.max_bad_steps=2"]
    outcome = place.run("encode", sets=sets).refused(
        2, "not finite at step 5 (loss nan", "2 steps in a row", "on a batch of train_000", " frame ",
        "autoencoder.training.grad_clip",
    )  # fmt: skip
    assert "not finite at step 4 (loss nan" in outcome.err
    assert place.checkpoint("autoencoder").name == "step_00000004"
    assert not place.store.exists()


@pytest.mark.parametrize("what", ["flow", "autoencoder"])
def test_two_trainings_of_one_run(trained, tmp_path: Path, what: str) -> None:
    place = trained.copy(tmp_path / "two", "latents")
    with only_training_of(place.runs / what):
        place.run(f"train-{what}").refused(2, f"{place.runs / what}: process ", "is training here")
    assert not (place.runs / what / "log.jsonl").exists()
    place.run(f"train-{what}").ok()
