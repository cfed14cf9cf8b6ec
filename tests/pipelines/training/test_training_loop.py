"""The loop of every training: what is logged, measured, saved and kept, and when it ends."""

import json
import os
import shutil
import signal
from typing import Any

import pytest
import torch

from pipelines.config import parse_config
from pipelines.errors import StoppedBySignal, UserError
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.distributed import Processes
from pipelines.runtime.logs import TrainingLog
from pipelines.training.training_loop import (
    LoopSettings,
    StepResult,
    Trainer,
    TrainingAmount,
    explain_out_of_memory,
    run_training,
    steps_until,
)


class Counter(Trainer):
    """Its loss is the step's number; it notes what it is asked for."""

    def __init__(
        self, scores: dict[int, float] | None = None, breaks_at: int | None = None, stops_at: int = -1
    ) -> None:
        self.scores, self.breaks_at, self.stops_at = scores or {}, breaks_at, stops_at
        self.steps: list[int] = []
        self.validated: list[int] = []

    learning_rate = 0.5
    device = torch.device("cpu")
    amount = TrainingAmount(frames=100, frames_per_step=10)

    def set_steps(self, steps: int) -> None:
        pass

    def train_step(self, step: int) -> StepResult:
        self.steps.append(step)
        if step == self.stops_at:
            os.kill(os.getpid(), signal.SIGTERM)
        broken = step == self.breaks_at
        return StepResult({"loss": torch.tensor(float("nan") if broken else float(step))}, torch.tensor(not broken))

    def describe_batch(self, step: int) -> str:
        return f"the frames of step {step}"

    def validate(self, step: int) -> dict[str, float]:
        self.validated.append(step)
        return {"score": self.scores.get(step, 0.0)} if self.scores else {}

    def metrics(self, step: int, terms: dict[str, float], steps_per_second: float) -> dict[str, float]:
        return {"twice": 2 * terms["loss"]}

    def files(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"model": {"steps": torch.tensor(len(self.steps))}}

    def state(self) -> dict[str, Any]:
        return {"identity": "a counter"}


@pytest.fixture
def train(tmp_path):
    """Run a trainer; gives the checkpoints and the log's lines."""
    config = parse_config({"dataset": {"name": "toy", "source": "shapes", "image_size": 16}}, "test")

    def run(trainer: Trainer, resume: bool = False, keep: int = 2, **settings: Any):
        values = {"steps": 10, "checkpoint_every": 4, "validate_every": 3, "log_every": 5} | settings
        checkpoints = CheckpointFolder(tmp_path / "checkpoints", keep)
        found = checkpoints.latest() if resume else None
        log = TrainingLog(tmp_path, config, "counter", 0 if found is None else found.step)
        try:
            run_training(trainer, LoopSettings(name="counter", **values), log, checkpoints, found)
        finally:
            log.close()
        lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        for line in lines:
            del line["crc32"]
        return checkpoints, lines

    return run


def steps_of(checkpoints: CheckpointFolder) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in checkpoints.folder.glob("step_*"))


def test_all_happens_when_it_should(train):
    trainer = Counter()
    checkpoints, lines = train(trainer, keep=9)
    assert trainer.steps == list(range(10))
    assert trainer.validated == [3, 6, 9, 10]
    assert steps_of(checkpoints) == [4, 8, 10]
    assert [line["step"] for line in lines] == [3, 5, 6, 9, 10]
    assert lines[0] | {"steps_per_second": 0} == {
        "step": 3, "loss": 1.0, "learning_rate": 0.5, "twice": 2.0, "steps_per_second": 0, "skipped_steps": 0,
    }  # fmt: skip
    # Each line has the mean since the one before.
    assert [line["loss"] for line in lines] == [1.0, 3.5, 5.0, 7.0, 9.0]
    assert checkpoints.best() is None


@pytest.mark.parametrize(
    ("scores", "lowest", "expected"),
    [
        ({3: 2.0, 6: 5.0, 9: 1.0, 10: 3.0}, False, 6),
        ({3: 2.0, 6: 5.0, 9: 1.0, 10: 3.0}, True, 9),
        ({3: 1.0, 6: 1.0, 9: 1.0, 10: 1.0}, False, 3),  # an equal one is not better
        ({3: float("nan"), 6: 2.0, 9: float("nan"), 10: 1.0}, False, 6),
    ],
)
def test_the_best_is_kept_beside_the_last_ones(train, scores, lowest, expected):
    checkpoints, _ = train(Counter(scores), keep=1, best="score", lowest=lowest)
    assert checkpoints.best().step == expected
    assert checkpoints.best().state["best"] == {"score": scores[expected]}
    assert checkpoints.latest().step == 10
    assert steps_of(checkpoints) == [expected, 10]


def test_a_resumed_training_remembers_the_best(train):
    train(Counter({3: 5.0, 6: 2.0}), steps=6, best="score")
    checkpoints, lines = train(Counter({9: 4.0, 10: 3.0}), resume=True, best="score")
    assert checkpoints.best().step == 3
    assert [line["step"] for line in lines] == [3, 5, 6, 9, 10]


def test_a_loss_that_is_not_finite_ends_it_before_it_is_saved(train, tmp_path):
    trainer = Counter(breaks_at=7)
    with pytest.raises(UserError, match=r"counter: .* not finite at step 8 \(loss nan\), on the frames of step 7\. "):
        train(trainer)
    assert trainer.steps[-1] == 7
    assert steps_of(CheckpointFolder(tmp_path / "checkpoints")) == [4]


@pytest.mark.parametrize(
    ("breaks_at", "settings", "last_step"),
    [
        (6, {"log_every": 100, "validate_every": 100, "checkpoint_every": 100}, 7),  # one more had begun
        (7, {}, 7),  # checked before it is saved
        (9, {}, 9),
        (4, {"validate_every": 100, "checkpoint_every": 100}, 4),  # checked before it is logged
    ],
)
def test_on_a_gpu_a_step_is_checked_while_the_next_one_runs(train, monkeypatch, breaks_at, settings, last_step):
    """Simulated by a flag that claims to be on a GPU."""
    monkeypatch.setattr("pipelines.training.training_loop.start_reading", lambda flag: lambda: bool(flag))

    class OnGPU(torch.Tensor):
        is_cuda = True

    class Lagging(Counter):
        def train_step(self, step: int) -> StepResult:
            result = super().train_step(step)
            return StepResult(result.terms, result.finite.as_subclass(OnGPU))

    trainer = Lagging(breaks_at=breaks_at)
    with pytest.raises(UserError, match=f"not finite at step {breaks_at + 1} "):
        train(trainer, **settings)
    assert trainer.steps[-1] == last_step


def test_a_signal_saves_and_names_the_checkpoint(train, tmp_path):
    with pytest.raises(StoppedBySignal, match=r"stopped at step 6, saved .*step_00000006") as stopped:
        train(Counter(stops_at=5))
    assert stopped.value.signal_number == signal.SIGTERM
    assert CheckpointFolder(tmp_path / "checkpoints").latest().step == 6


def test_a_bad_step_counts_once_where_it_is_logged_and_saved(train, capsys):
    _, lines = train(Counter(breaks_at=4), max_bad_steps=2, checkpoint_every=5)
    assert [line["step"] for line in lines] == [3, 5, 6, 9, 10]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1, 1]
    assert [line["loss"] for line in lines] == [1.0, 3.0, 5.0, 7.0, 9.0]
    assert capsys.readouterr().err.count("1 such steps in a row, 2 end the training") == 1


def test_after_a_resume_the_log_is_that_of_an_uninterrupted_training(train, tmp_path):
    """Also where a checkpoint lies between two lines, and terms appear in the course of the training."""

    class Growing(Counter):
        def train_step(self, step: int) -> StepResult:
            result = super().train_step(step)
            late = {"late": torch.tensor(0.1 * step)} if step >= 2 else {}
            return StepResult({"loss": result.terms["loss"] / 3} | late, result.finite)

    settings = {"log_every": 7, "validate_every": 7, "checkpoint_every": 5, "max_bad_steps": 2, "steps": 14}

    def values(lines: list[dict[str, Any]]) -> list[tuple[float, ...]]:
        return [tuple(line[name] for name in ("step", "loss", "late", "skipped_steps")) for line in lines]

    _, whole = train(Growing(breaks_at=1), **settings)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(StoppedBySignal):
        train(Growing(breaks_at=1, stops_at=3), **settings)
    _, lines = train(Growing(), resume=True, **settings)
    assert len(lines) == 2
    assert values(lines) == values(whole)


class Second(Processes):
    """The second of two processes, of which the first is away."""

    def any_asks(self, number: int) -> int:
        return number

    def mean_(self, tensor: torch.Tensor) -> None:
        pass

    def wait(self) -> None:
        pass


def test_a_second_process_is_silent_and_writes_nothing(tmp_path, capsys):
    trainer, settings = Counter(breaks_at=4), LoopSettings("counter", 10, 4, 3, 5, max_bad_steps=2)
    run_training(trainer, settings, None, CheckpointFolder(tmp_path / "checkpoints"), None, Second(1, 2))
    assert trainer.steps == list(range(10))
    assert trainer.validated == []
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "checkpoints").exists()


def test_speed_is_that_of_steps_alone(train, monkeypatch, capsys):
    """Neither the first one, which compiles, nor validation is in it."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    class Timed(Counter):
        def train_step(self, step: int) -> StepResult:
            now[0] += 0.5 if step else 100.0
            return super().train_step(step)

        def validate(self, step: int) -> dict[str, float]:
            now[0] += 50.0
            return super().validate(step)

    _, lines = train(Timed())
    assert [line["steps_per_second"] for line in lines] == [2.0] * 5
    assert "counter: 2.00 steps/s, about 4 s " in capsys.readouterr().out  # 7 steps, after the third


@pytest.mark.parametrize("has_terminal", [False, True])
def test_without_a_bar_lines_say_how_far_it_is_less_and_less_often(train, monkeypatch, capsys, has_terminal):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: has_terminal)

    class Slow(Counter):
        def train_step(self, step: int) -> StepResult:
            now[0] += 20.0
            return super().train_step(step)

    train(Slow(), steps=300, log_every=1, validate_every=1000, checkpoint_every=1000)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("counter: ")]
    steps = [int(line.split()[2]) for line in told[1:]]
    if has_terminal:
        assert steps == []
    else:
        # A minute after the first word, then after twice the time before, and in the end every ten minutes.
        assert steps == [4, 10, 22, 46, *range(76, 300, 30)]
        assert all(word in told[2] for word in ("of 300", "loss 9.0000", "0.05 steps/s", "1.6 h left"))


class ByTheClock(Counter):
    """Takes its time on a clock of its own: 2 s a step, 30 s more for the first, 5 s a validation, 3 s a checkpoint."""

    def __init__(self, now: list[float], stops_at: int = -1) -> None:
        super().__init__(stops_at=stops_at)
        self.now, self.first = now, 30.0

    def train_step(self, step: int) -> StepResult:
        self.now[0] += 2.0 + self.first
        self.first = 0.0
        return super().train_step(step)

    def validate(self, step: int) -> dict[str, float]:
        self.now[0] += 5.0
        return super().validate(step)

    def files(self) -> dict[str, dict[str, torch.Tensor]]:
        self.now[0] += 3.0
        return super().files()

    def load(self, checkpoint: Any) -> None:
        del self.steps[int(checkpoint.tensors("model")["steps"]) :]


@pytest.mark.parametrize(
    ("minutes", "every"), [(60, {}), (10, {"validate_every": 10, "checkpoint_every": 20}), (4, {}), (2, {})]
)
def test_a_training_by_the_clock_ends_with_its_time(train, tmp_path, monkeypatch, minutes: int, every) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    trainer, seconds = ByTheClock(now), 60 * minutes
    settings = LoopSettings("counter", None, **{"checkpoint_every": 100, "validate_every": 50, "log_every": 50} | every)
    steps = steps_until(now[0] + seconds, trainer, settings, CheckpointFolder(tmp_path / "checkpoints"))
    assert now[0] - 1000 < max(90, 0.03 * seconds)  # the first step takes 32 s
    assert trainer.steps == []
    assert list((tmp_path / "checkpoints").iterdir()) == []
    train(trainer, steps=steps, checkpoint_every=settings.checkpoint_every, validate_every=settings.validate_every)
    assert trainer.steps == list(range(steps))
    # A part of an interval between two validations has none.
    assert seconds - 15 <= now[0] - 1000 <= seconds


def test_a_time_that_is_over_is_one_step(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    trainer, settings = ByTheClock(now), LoopSettings("counter", None, 100, 100, 100)
    assert steps_until(1.0, trainer, settings, CheckpointFolder(tmp_path)) == 1


def test_a_signal_while_the_steps_are_counted(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    trainer, settings = ByTheClock(now, stops_at=4), LoopSettings("counter", None, 100, 100, 100)
    with pytest.raises(StoppedBySignal, match="nothing is trained"):
        steps_until(3600.0, trainer, settings, CheckpointFolder(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        torch.OutOfMemoryError("no room\nfor it"),
        RuntimeError("DefaultCPU: can't allocate memory"),
    ],
)
def test_out_of_memory_comes_with_advice(error):
    with pytest.raises(
        UserError, match=r"^counter: out of memory \(.*\).*counter\.training\.batch_size.*, or ask less$"
    ):
        with explain_out_of_memory(LoopSettings("counter", 1, 1, 1, 1, less_memory=", or ask less")):
            raise error
