"""A run that is stopped and resumed equals one that is not, bit for bit: both trainings and the store."""

import json
import math
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

import latent_cache
from latent_cache import ChunkWriter, StoreWriter
from latent_cache.writing.markers import ChunkMarker
from pipelines.encoding.chunk_encoder import ChunkTask
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.files import size_text
from pipelines.training.autoencoder_trainer import AutoencoderTrainer
from pipelines.training.flow_trainer import FlowTrainer

PLAIN = ()
EVERYTHING = (
    "flow.model.dropout=0.2", "flow.model.head=bn", "flow.model.mid_depth=1", "flow.training.precision=bf16",
    "flow.training.ema_decay=0.9", "flow.training.optimizer=muon", "flow.training.grad_clip=1.0",
    "autoencoder.model.dropout=0.2", "autoencoder.training.precision=bf16", "autoencoder.training.ema_decay=0.9",
    "autoencoder.training.optimizer=muon", "autoencoder.training.accumulate=2", "autoencoder.training.flip=true",
    "autoencoder.training.color_jitter={brightness: 0.2, hue: 0.1}",
    "autoencoder.training.adversarial={weight: 0.5, start: 1, warm_in: 3, layers: 2, filters: 8}",
)  # fmt: skip
SETTINGS = pytest.mark.parametrize("sets", [PLAIN, EVERYTHING], ids=["plain", "everything"])

# Many small chunks, so that there are many moments to stop at; 24 x 12 frames are 6 of them, the last one partial.
CHUNKS = ("cache.chunk_frames=50", "cache.batch_frames=32")


def assert_same_training(ours, theirs, what: str, story: ModuleType) -> None:
    """All tensors of the last checkpoint and all logged losses are equal."""
    files = story.tree(theirs.checkpoint(what))
    found = story.tree(ours.checkpoint(what))
    assert found.keys() == files.keys()
    assert {"model.safetensors", "optimizer.safetensors"} <= files.keys()
    for name in files.keys() - {"state.json"}:  # which has the path of the store
        assert found[name] == files[name], f"{name} differs"
    logs = [story.timeless(story.read_log(place, what)) for place in (ours, theirs)]
    if what == "flow" and (ours.runs / "autoencoder").exists() != (theirs.runs / "autoencoder").exists():
        for record in logs[0] + logs[1]:  # only one of them could decode what it predicted
            record.pop("validation_sample_psnr", None)
    assert logs[0] == logs[1]


@pytest.fixture
def with_store(trained, tmp_path: Path):
    """Places that have the store and nothing else."""
    return lambda name, sets: trained.copy(tmp_path / name, "latents").with_sets(*sets)


@pytest.mark.parametrize(
    ("sets", "number"), [(PLAIN, signal.SIGINT), (EVERYTHING, signal.SIGTERM)], ids=["plain", "everything"]
)
def test_flow_stopped_by_a_signal(with_store, story: ModuleType, monkeypatch, sets, number) -> None:
    whole, halves = with_store("whole", sets), with_store("halves", sets)
    whole.run("train-flow").ok()
    # Step 5 is neither logged nor a multiple of checkpoint_every.
    story.send_at(monkeypatch, FlowTrainer, "train_step", call=5, number=number)
    halves.run("train-flow").refused(128 + number, "stopped at step 5", "step_00000005")
    assert halves.checkpoint("flow").name == "step_00000005"
    outcome = halves.run("train-flow").ok()
    assert "steps 5 to 8" in outcome.out
    assert_same_training(halves, whole, "flow", story)
    files = story.tree(halves.checkpoint("flow"))
    assert ("ema.safetensors" in files) == (sets is EVERYTHING)


# Chunks of 16 frames, and room for two windows of four of them: 8 steps of 64 pairs see two epochs.
SMALL_CHUNKS = ("cache.chunk_frames=16",)
STREAMED = ("cache.residency=stream", "cache.memory_budget=24 KiB", "flow.training.batch_size=64")


@pytest.fixture
def streamed(trained, tmp_path: Path):
    """A place whose latents are larger than the memory budget."""
    place = trained.copy(tmp_path / "streamed", "runs").with_sets(*SMALL_CHUNKS)
    shutil.rmtree(place.runs / "flow")
    place.run("encode").ok()
    return place.with_sets(*STREAMED)


def test_flow_that_streams_its_latents(streamed, tmp_path: Path, story: ModuleType, monkeypatch) -> None:
    halves = streamed.copy(tmp_path / "halves", "latents")
    outcome = streamed.run("train-flow").ok()
    assert "batch 64 of 240 targets" in outcome.out
    assert "streamed through 0 MB of host memory, 5 windows per epoch, 1 chunks per group" in outcome.out
    assert "validation_loss" in story.read_log(streamed, "flow")[-1]
    story.send_at(monkeypatch, FlowTrainer, "train_step", call=5)
    halves.run("train-flow").refused(143, "stopped at step 5")
    other = halves.copy(tmp_path / "other", "runs", "latents").run("train-flow", sets=["cache.residency=auto"]).ok()
    assert "another order from here on (drawn from the whole split instead of streamed in windows of" in other.err
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("latents")]
    rest = halves.run("train-flow").ok()
    assert "steps 5 to 8" in rest.out
    assert "another order" not in rest.err
    assert_same_training(halves, streamed, "flow", story)


def test_streaming_with_too_little_memory(streamed) -> None:
    needed = 2 * 4 * (16 + 7) * 128
    streamed.run("train-flow", sets=["cache.memory_budget=10000 B"]).refused(
        2, "cache.memory_budget is 10000 bytes", f"at least {needed}", "cache.memory_budget='1 MiB' or more"
    )


@SETTINGS
def test_autoencoder_stopped_by_a_signal(place, tmp_path: Path, story: ModuleType, monkeypatch, sets) -> None:
    whole, halves = place.with_sets(*sets), story.Place(tmp_path / "halves", sets)
    whole.run("train-autoencoder").ok()
    story.send_at(monkeypatch, AutoencoderTrainer, "train_step", call=3)
    halves.run("train-autoencoder").refused(143, "stopped at step 3")
    outcome = halves.run("train-autoencoder").ok()
    assert "steps 3 to 6" in outcome.out
    assert_same_training(halves, whole, "autoencoder", story)
    assert ("ema.safetensors" in story.tree(halves.checkpoint("autoencoder"))) == (sets is EVERYTHING)


def test_signal_in_the_last_step_still_stops_what_follows(place, story: ModuleType, monkeypatch) -> None:
    story.send_at(monkeypatch, AutoencoderTrainer, "train_step", call=6)
    place.run("demo").refused(143, "stopped at step 6")
    assert not place.store.exists()
    assert "autoencoder: done, 6 steps" in place.run("train-autoencoder").ok().out


@pytest.mark.slow
def test_demo_resumes_in_each_stage_where_it_was_stopped(trained, place, story: ModuleType, monkeypatch) -> None:
    for owner, name in ((AutoencoderTrainer, "train_step"), (ChunkTask, "encode"), (FlowTrainer, "train_step")):
        with monkeypatch.context() as patch:
            story.send_at(patch, owner, name, call=2)
            place.run("demo").refused(143, "stopped")
    place.run("demo").ok()
    assert story.tree(place.store) == story.tree(trained.store)
    assert_same_training(place, trained, "autoencoder", story)
    assert_same_training(place, trained, "flow", story)


@pytest.mark.slow
def test_flow_stopped_from_outside(with_store, story: ModuleType) -> None:
    sets = ("flow.training.steps=60", "flow.training.checkpoint_every=1000", "flow.training.validate_every=1000")
    whole, halves = with_store("whole", sets), with_store("halves", sets)
    process = halves.start("train-flow", prelude="import os, time\n" + SLOW_STEPS)
    log = halves.runs / "flow" / "log.jsonl"
    for _ in range(600):
        if log.exists() and log.read_text().count("\n") >= 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, (out, err)
    assert "SIGTERM: saving after this step" in err
    assert "Traceback" not in err
    assert 4 <= int(halves.checkpoint("flow").name.removeprefix("step_")) < 60
    halves.run("train-flow").ok()
    whole.run("train-flow").ok()
    assert_same_training(halves, whole, "flow", story)


# A step of the tiny flow takes a few milliseconds: too few to send a signal in.
SLOW_STEPS = """
import torch; torch.set_num_threads(1)
from pipelines.training.flow_trainer import FlowTrainer
step = FlowTrainer.train_step
def slow(*arguments):
    time.sleep(0.2)
    return step(*arguments)
FlowTrainer.train_step = slow
"""

KILL_AT_STEP_6 = """
import os, signal, torch; torch.set_num_threads(1)
from pipelines.training.flow_trainer import FlowTrainer
step = FlowTrainer.train_step
def killed(self, number):
    if number == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number)
FlowTrainer.train_step = killed
"""


@pytest.mark.slow
def test_training_killed_after_a_checkpoint(trained, with_store, story: ModuleType) -> None:
    place = with_store("killed", PLAIN)
    process = place.start("train-flow", prelude=KILL_AT_STEP_6)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert "steps 4 to 8" in place.run("train-flow").ok().out
    assert_same_training(place, trained, "flow", story)


@pytest.mark.parametrize("files", [0, 1])
def test_training_that_dies_while_it_saves(with_store, trained, story: ModuleType, monkeypatch, files: int) -> None:
    """The last checkpoint is half written: the one before is in force, and nothing of the half one stays."""
    import pipelines.runtime.checkpoints as checkpoints

    place, save, calls = with_store("dies", PLAIN), checkpoints.save_file, [0]

    def dies(*arguments: object) -> None:
        calls[0] += 1
        if calls[0] > 2 + files:  # two files a checkpoint: model and optimizer
            raise OSError(28, "No space left on device")
        save(*arguments)

    monkeypatch.setattr(checkpoints, "save_file", dies)
    place.run("train-flow").refused(1, "No space left on device")
    monkeypatch.setattr(checkpoints, "save_file", save)
    place.run("train-flow").ok()
    assert_same_training(place, trained, "flow", story)
    assert not list(place.runs.rglob("*.tmp"))


def test_killed_between_checkpoint_and_pointer(copied, trained, story: ModuleType) -> None:
    (copied.runs / "flow" / "checkpoints" / "latest").write_text("step_00000004")
    assert "flow: done, 8 steps" in copied.run("train-flow").ok().out
    assert CheckpointFolder(copied.runs / "flow" / "checkpoints").latest().step == 8


@pytest.mark.parametrize("how", ["step", "folder"])
def test_going_on_from_a_named_checkpoint(copied, trained, story: ModuleType, how: str) -> None:
    named = copied.runs / "flow" / "checkpoints" / "step_00000004"
    assert "flow: done, 8 steps" in copied.run("train-flow").ok().out
    outcome = copied.run("train-flow", "--resume", "4" if how == "step" else str(named)).ok()
    assert "steps 4 to 8" in outcome.out
    (aside,) = (copied.runs / "flow").glob("checkpoints.*")
    assert f"later checkpoints are kept in {aside}" in outcome.out
    assert (aside / "step_00000008" / "model.safetensors").exists()
    assert_same_training(copied, trained, "flow", story)


def test_a_damaged_newest_checkpoint(copied, trained, story: ModuleType) -> None:
    """`auto` passes it over and says so; who names it is told."""
    newest = copied.checkpoint("flow") / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    copied.run("train-flow", "--resume", "8").refused(
        2, "--resume 8", "step_00000008 is not a whole checkpoint", "optimizer.safetensors", "--resume auto"
    )
    assert not list((copied.runs / "flow").glob("checkpoints.*"))
    outcome = copied.run("train-flow", "--resume", "auto").ok()
    assert "step_00000008: not a whole checkpoint" in outcome.err
    assert "steps 4 to 8" in outcome.out
    assert_same_training(copied, trained, "flow", story)


def test_a_named_checkpoint_that_is_not_there(copied) -> None:
    copied.run("train-flow", "--resume", "6").refused(2, "--resume 6", "step_00000006", "4, 8")
    copied.run("train-flow", "--resume", "runs/nowhere").refused(2, "--resume runs/nowhere", "4, 8")
    copied.run("train-flow", "--resume", "4", "--restart").refused(2, "--resume 4", "--restart")


def test_an_autoencoder_goes_on_from_a_named_checkpoint(copied, trained, story: ModuleType) -> None:
    outcome = copied.run("train-autoencoder", "--resume", "3").ok()
    assert "steps 3 to 6" in outcome.out
    assert_same_training(copied, trained, "autoencoder", story)


def test_settings_that_changed_are_told_apart(copied) -> None:
    """Those that decide the result refuse; those that don't are named and gone on with."""
    harmless = ["flow.training.keep_checkpoints=3", "flow.training.max_bad_steps=7"]
    outcome = copied.run("train-flow", sets=[*harmless, "flow.training.batch_size=16"]).refused(
        2, "step_00000008", "  flow.training.batch_size: 8 -> 16\n", "  flow.training.keep_checkpoints: 2 -> 3\n",
        "  flow.training.max_bad_steps: 10 -> 7",
    )  # fmt: skip
    outcome = copied.run("train-flow", sets=[*harmless, "flow.training.steps=10"]).ok()
    assert re.search(r"step_00000008 .*keep_checkpoints: 2 -> 3; flow.training.max_bad_steps: 10 -> 7", outcome.out)
    assert "steps 8 to 10" in outcome.out


def encoder_of(trained, folder: Path):
    """A place that has the autoencoder and nothing else, and encodes to many chunks."""
    place = type(trained)(folder, CHUNKS)
    shutil.copytree(trained.runs / "autoencoder", place.runs / "autoencoder")
    return place


@pytest.fixture
def encoder_place(trained, tmp_path: Path):
    return lambda name: encoder_of(trained, tmp_path / name)


@pytest.fixture(scope="module")
def uninterrupted(trained, story: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store of an encoding that was never stopped."""
    place = encoder_of(trained, tmp_path_factory.mktemp("encoded") / "uninterrupted")
    place.run("encode").ok()
    files = story.tree(place.store)
    assert sum(name.startswith("train/latents/c/") for name in files) == 6
    return files


def test_encode_stopped_at_each_batch(encoder_place, uninterrupted, story: ModuleType, monkeypatch) -> None:
    for call in (2, 8):  # one batch a chunk
        place = encoder_place(f"stopped_{call}")
        with monkeypatch.context() as patch:
            story.send_at(patch, ChunkTask, "encode", call)
            place.run("encode").refused(143, "stopped", str(place.store))
        assert not latent_cache.is_complete(place.store)
        done = len(list((place.store / ".encoding").rglob("*.json")))
        with monkeypatch.context() as patch:
            written = story.count_calls(patch, ChunkWriter, "write")
            place.run("encode").ok()
        assert written[0] == 8 - done  # what was finished is not done again
        assert story.tree(place.store) == uninterrupted


@pytest.mark.parametrize(("owner", "name"), [(ChunkWriter, "write"), (StoreWriter, "finish")])
def test_encode_stopped_before_a_write(encoder_place, uninterrupted, story, monkeypatch, owner, name) -> None:
    place = encoder_place("stopped")
    with monkeypatch.context() as patch:
        story.send_at(patch, owner, name, call=1)
        place.run("encode").refused(143, "stopped")
    place.run("encode").ok()
    assert story.tree(place.store) == uninterrupted


@pytest.mark.parametrize(("owner", "name", "call"), [
    (ChunkWriter, "write", 4), (ChunkMarker, "write", 1), (ChunkMarker, "write", 7), (StoreWriter, "finish", 1),
])  # fmt: skip
def test_encode_that_fails_midway(encoder_place, uninterrupted, story, monkeypatch, owner, name, call) -> None:
    place, method, calls = encoder_place("fails"), getattr(owner, name), [0]

    def fails(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == call:
            raise OSError(5, "Input/output error")
        return method(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        place.run("encode").refused(1, "Input/output error")
    assert not latent_cache.is_complete(place.store)
    place.run("encode").ok()
    assert story.tree(place.store) == uninterrupted


@pytest.mark.parametrize("call", [1, 5, 12, 30])
def test_encode_onto_a_full_disk(encoder_place, uninterrupted, story, monkeypatch, call) -> None:
    place, calls = encoder_place("full"), [0]
    flush = os.fsync

    def full(descriptor: int) -> None:
        file = os.readlink(f"/proc/self/fd/{descriptor}")
        calls[0] += str(place.store) in file
        if calls[0] >= call and str(place.store) in file and ".partial" in file:
            raise OSError(28, "No space left on device")
        flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        patch.setattr("latent_cache.writing.disk.flush_tree", lambda root: None)
        patch.setattr("latent_cache.writing.writer.flush_tree", lambda root: None)
        outcome = place.run("encode").refused(1, "no space left for chunk", "free")
    done = len(list((place.store / ".encoding").rglob("*.json")))
    pending = 8 - done
    assert 0 < pending <= 8
    shape = json.loads((place.store / "train/latents/zarr.json").read_text())["shape"][1:]
    assert f"; {size_text(pending * 50 * 2 * math.prod(shape))} of latents" in outcome.err
    assert not list(place.store.rglob("*.partial"))
    place.run("encode").ok()
    assert story.tree(place.store) == uninterrupted


def test_a_disk_that_is_too_small_is_told_at_once(encoder_place, monkeypatch) -> None:
    usage = shutil.disk_usage(encoder_place("small").folder.parent)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    place = encoder_place("smaller")
    place.run("encode").refused(1, "its disk has 0.0 MB left", "paths.latents")
    assert not latent_cache.is_complete(place.store)


def test_a_disk_that_may_be_too_small_for_the_previews(encoder_place, monkeypatch) -> None:
    """Their compression is unknown: they may fit."""
    usage = shutil.disk_usage(encoder_place("small").folder.parent)
    place = encoder_place("smaller")
    with monkeypatch.context() as patch:
        latents, previews = 8 * 50 * 4 * 4 * 4 * 2, 8 * 50 * 16 * 16 * 3  # of 8 chunks of 50 frames
        patch.setattr("shutil.disk_usage", lambda path: usage._replace(free=latents + previews - 1))
        assert "preview" not in place.run("encode").ok().err
        told = place.run("encode", "--overwrite", sets=["cache.preview=16"]).ok().err
    for text in (size_text(latents), size_text(previews), str(place.store), "cache.preview"):
        assert text in told
    assert "preview" not in place.run("encode", "--overwrite", sets=["cache.preview=16"]).ok().err


KILL_WHILE_MARKING = """
import os, signal, torch; torch.set_num_threads(1)
from latent_cache.writing.markers import ChunkMarker
write, calls = ChunkMarker.write, []
def killed(*arguments):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)
ChunkMarker.write = killed
"""


@pytest.mark.slow
def test_encode_killed(encoder_place, uninterrupted, story: ModuleType) -> None:
    place = encoder_place("killed")
    process = place.start("encode", prelude=KILL_WHILE_MARKING)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not latent_cache.is_complete(place.store)
    assert re.search(r"not complete(.|\n)*[23] of 6 chunks", place.run("inspect").ok().out)
    outcome = place.run("encode").ok()
    # Two chunks are in the making at once: the one beside the fourth may have been done or not.
    assert re.search("[23] of 6 chunks", outcome.out)
    assert story.tree(place.store) == uninterrupted


def test_train_flow_finishes_a_half_done_store_first(encoder_place, uninterrupted, story, monkeypatch) -> None:
    place = encoder_place("half")
    with monkeypatch.context() as patch:
        story.send_at(patch, ChunkTask, "encode", 5)
        place.run("train-flow").refused(143, "stopped")
    assert not (place.runs / "flow" / "checkpoints").exists()
    place.run("train-flow").ok()
    assert story.tree(place.store) == uninterrupted
    assert os.listdir(place.runs / "flow" / "checkpoints")
