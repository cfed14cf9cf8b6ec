"""How many steps a training takes if nobody says: what its time allows, or what suits the amount of data."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from pipelines.training.autoencoder_trainer import AutoencoderTrainer
from pipelines.training.flow_trainer import FlowTrainer
from pipelines.training.refiner_trainer import RefinerTrainer
from pipelines.training.training_loop import TrainingAmount
from pipelines.training.training_run import suitable_steps

EVERYTHING = {
    "flow": (
        "flow.model.dropout=0.2", "flow.model.head=bn", "flow.training.ema_decay=0.9", "flow.training.optimizer=muon",
        "flow.training.validate_every=20", "flow.training.checkpoint_every=10", "flow.training.validation_samples=0",
    ),
    "autoencoder": (
        "autoencoder.model.dropout=0.2", "autoencoder.training.ema_decay=0.9", "autoencoder.training.optimizer=muon",
        "autoencoder.training.flip=true", "autoencoder.training.validate_every=10",
        "autoencoder.training.adversarial={weight: 0.5, start: 1, warm_in: 3, layers: 2, filters: 8}",
    ),
    "refiner": (
        "refiner.model={groups: 1, blocks: 1, features: 4, reduction: 2}", "refiner.training.clip_frames=5",
        "refiner.training.batch_size=4", "refiner.training.ema_decay=0.9", "refiner.training.validate_every=10",
        "refiner.training.validation_clips=3",
    ),
}  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """A clock on which a step takes five seconds, two of the flow, and everything else next to nothing."""
    now = [0.0]

    def tick(seconds: float = 1e-6) -> float:
        now[0] += seconds
        return now[0]

    def slowly(method, seconds: float):
        def step(self, number):
            tick(seconds)
            return method(self, number)

        return step

    monkeypatch.setattr("time.perf_counter", tick)
    for owner, seconds in ((AutoencoderTrainer, 5.0), (FlowTrainer, 2.0), (RefinerTrainer, 5.0)):
        monkeypatch.setattr(owner, "train_step", slowly(owner.train_step, seconds))


def recorded(place, what: str) -> dict:
    """Of the newest checkpoint."""
    return json.loads((place.checkpoint(what) / "state.json").read_text())


def steps_of(place, what: str) -> int:
    return recorded(place, what)["settings"][what]["training"]["steps"]


def assert_same(ours, theirs, what: str, story: ModuleType) -> None:
    """All tensors of the last checkpoint, and all logged losses."""
    ours_files, theirs_files = (story.tree(place.checkpoint(what)) for place in (ours, theirs))
    assert ours_files.keys() == theirs_files.keys()
    assert not [name for name in ours_files if name != "state.json" and ours_files[name] != theirs_files[name]]
    logs = [story.timeless(story.read_log(place, what)) for place in (ours, theirs)]
    assert logs[0] == logs[1]


def test_a_flow_by_the_clock_is_that_of_its_steps(trained, tmp_path: Path, story, clock, monkeypatch) -> None:
    sets = EVERYTHING["flow"]
    place, explicit = (trained.copy(tmp_path / name, "latents").with_sets(*sets) for name in ("clock", "steps"))
    with monkeypatch.context() as patch:
        story.send_at(patch, FlowTrainer, "train_step", call=13)
        place.run("train-flow", "--minutes", "1").refused(143, "saved")
    steps, stopped_at = steps_of(place, "flow"), recorded(place, "flow")["step"]
    assert 0 < stopped_at < steps == pytest.approx((60 - 16) / 2, abs=2)  # it measures eight steps
    place.run("train-flow", "--minutes", "1").ok()
    assert recorded(place, "flow")["step"] == steps
    assert recorded(place, "flow")["minutes"] == 1
    explicit.run("train-flow", sets=[f"flow.training.steps={steps}"]).ok()
    assert_same(place, explicit, "flow", story)
    # A later command keeps to it, and more time is asked for in other ways.
    assert f"flow: done, {steps} steps" in place.run("train-flow").ok().out
    assert f"flow: done, {steps} steps" in place.run("train-flow", "--minutes", "1").ok().out
    place.run("train-flow", "--minutes", "3").refused(2, "--minutes 3", "--minutes 1", "--restart", "--fine-tune")
    explicit.run("train-flow", "--minutes", "1").refused(2, "--minutes 1", f"{steps} steps", "--restart")


@pytest.mark.parametrize("what", ["autoencoder", "refiner"])
def test_other_trainings_by_the_clock_are_those_of_their_steps(trained, tmp_path: Path, story, clock, what) -> None:
    parts = {"autoencoder": (), "refiner": ("latents", "runs")}[what]
    sets = EVERYTHING[what]
    place, explicit = (trained.copy(tmp_path / name, *parts).with_sets(*sets) for name in ("clock", "steps"))
    place.run(f"train-{what}", "--minutes", "1").ok()
    steps = recorded(place, what)["step"]
    assert steps == pytest.approx((60 - 20) / 5, abs=1)  # measured in no more than a quarter of the time
    explicit.run(f"train-{what}", sets=[f"{what}.training.steps={steps}"]).ok()
    assert_same(place, explicit, what, story)


def test_a_fine_tuning_by_the_clock(copied, story, clock, monkeypatch) -> None:
    copied = copied.with_sets("flow.training.validation_samples=0", "flow.training.validate_every=100")
    words = ("train-flow", "--fine-tune", "--minutes", "1")
    with monkeypatch.context() as patch:
        story.send_at(patch, FlowTrainer, "train_step", call=4)
        copied.run(*words).refused(143, "nothing is trained")
    assert recorded(copied, "flow")["step"] == 0
    assert "0 steps of fine-tuning" in copied.run("runs").ok().out
    with monkeypatch.context() as patch:
        story.send_at(patch, FlowTrainer, "train_step", call=20)
        copied.run(*words).refused(143, "saved")
    steps = steps_of(copied, "flow")
    assert steps == pytest.approx((60 - 16) / 2, abs=2)
    copied.run(*words).ok()
    assert recorded(copied, "flow")["step"] == steps
    assert recorded(copied, "flow")["fine_tuned_from"]["step"] == 8


def test_minutes_that_cannot_be(trained, tmp_path: Path) -> None:
    place = trained.copy(tmp_path / "refused", "latents")
    place.run("train-flow", "--minutes", "5", sets=["flow.training.steps=9"]).refused(2, "--minutes 5", "steps=9")
    for minutes in ("0", "-1", "nan", "inf", "1e9", "an hour"):
        place.run("train-flow", "--minutes", minutes).refused(2, "--minutes", repr(minutes))
    assert not place.runs.exists()


def test_steps_that_suit_the_data_are_found_once(place, story, monkeypatch) -> None:
    words = place.arguments("train-autoencoder")
    file = place.folder / "tiny.yaml"
    file.write_text(file.read_text().replace("steps: 6", "steps: null"))
    with monkeypatch.context() as patch:
        story.send_at(patch, AutoencoderTrainer, "train_step", call=2)
        outcome = story.run_main(words).refused(143, "step_00000002")
    assert "288 frames" in outcome.out  # 24 videos of 12
    steps = suitable_steps("autoencoder", TrainingAmount(frames=288, frames_per_step=4))
    assert steps_of(place, "autoencoder") == steps
    # What was found stays, whatever it would be today, and is no difference from the file.
    monkeypatch.setattr("pipelines.training.training_run.LEAST_STEPS", 4)
    for step, sets in ((4, []), (6, ["autoencoder.training.steps=null"])):
        with monkeypatch.context() as patch:
            story.send_at(patch, AutoencoderTrainer, "train_step", call=2)
            outcome = place.run("train-autoencoder", sets=sets).refused(143, f"step_{step:08d}")
        assert f"steps {step - 2} to {steps}" in outcome.out
        assert "288 frames" not in outcome.out
        assert "autoencoder.training.steps" not in outcome.out


@pytest.mark.parametrize(
    ("name", "frames", "per_step", "expected"),
    [
        ("flow", 240, 32, 5000),  # one short clip
        ("flow", 231_000, 16, 288_750),  # KTH, of which the paper's training has 300 000
        ("flow", 10_000_000, 32, 300_000),
        ("autoencoder", 2400, 16, 5000),
        ("autoencoder", 64_000, 16, 80_000),
        ("autoencoder", 108_000, 16, 100_000),
        ("refiner", 300_000, 24 * 16, 15_625),
    ],
)
def test_steps_suit_the_amount_of_data(name: str, frames: int, per_step: int, expected: int) -> None:
    assert suitable_steps(name, TrainingAmount(frames, per_step)) == expected
