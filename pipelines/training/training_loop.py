"""The loop of every training: steps, log, validation, checkpoints, stopping. The trainer does the steps."""

import itertools
import math
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.errors import StoppedBySignal, UserError
from pipelines.runtime.checkpoints import Checkpoint, CheckpointFolder, Tensors
from pipelines.runtime.distributed import ALONE, Processes
from pipelines.runtime.logs import StepTimer, TrainingLog
from pipelines.runtime.progress import duration, progress, say, warn
from pipelines.runtime.signals import StopRequest
from pipelines.runtime.train_state import TrainState

# Report the first rate after this many seconds, however far the first line of the log is.
FIRST_WORD_SECONDS = 10.0
# Without a progress bar a line follows after this pause, and further ones after pauses that double up to the last one:
# a batch job's output tells how far it is, and stays short.
FIRST_PAUSE, LONGEST_PAUSE = 60.0, 600.0
# More steps than any training has: of one whose number of steps is not known yet.
UNKNOWN_STEPS = 10**9
# A training by the clock measures its rate in this share of its time, and in no more than these seconds, after its
# first steps, which compile and allocate, and in this many steps at least.
MEASURED_SHARE, MEASURED_SECONDS, FIRST_STEPS, MEASURED_STEPS = 0.03, 30.0, 3, 5
# Share of its time in which the least is measured if a step takes long.
MOST_MEASURED_SHARE = 0.25


@dataclass(frozen=True)
class StepResult:
    """Result of one step, on the device.

    Attributes:
        terms: what the log shows the mean of, scalars of this process: `loss`, the terms of which it is the weighted
            sum, and `gradient_norm`, the L2 norm before clipping.
        finite: scalar bool, equal in all processes: whether loss and gradients were finite, and so the update was made.
    """

    terms: dict[str, Tensor]
    finite: Tensor


@dataclass(frozen=True)
class TrainingAmount:
    """How much a training has to learn from, and how much of it a step sees.

    Attributes:
        frames: that can be learned, those of the training split.
        frames_per_step: over all processes.
    """

    frames: int
    frames_per_step: int


class Trainer(ABC):
    """A model and everything that changes while it is trained.

    Attributes:
        train_state: the model with its optimizers and averaged copy.
        device: of the model.
        checkpoint_state: the JSON that every checkpoint of this training has.
    """

    train_state: TrainState
    device: torch.device
    checkpoint_state: dict[str, Any]

    @property
    @abstractmethod
    def amount(self) -> TrainingAmount:
        """The data that it is trained on."""

    @abstractmethod
    def set_steps(self, steps: int) -> None:
        """Make this the number of steps of the whole training, before its first one."""

    @abstractmethod
    def train_step(self, step: int) -> StepResult:
        """One update; `step` counts from 0. All draws are functions of (seed, step)."""

    @abstractmethod
    def describe_batch(self, step: int) -> str:
        """The samples of a step, for the message about a failed step."""

    @property
    def learning_rate(self) -> float:
        """Of the last step."""
        return self.train_state.learning_rate

    def files(self) -> dict[str, Tensors]:
        """The tensors of a checkpoint, by file: what resuming and using the model need."""
        return self.train_state.files()

    def state(self) -> dict[str, Any]:
        """The JSON of a checkpoint."""
        return self.checkpoint_state

    def load(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint of the same configuration."""
        self.train_state.load(checkpoint, self.device)

    def validate(self, step: int) -> dict[str, float]:
        """Measure the model after `step` steps; called in rank 0. Empty without validation data."""
        return {}

    def metrics(self, step: int, terms: dict[str, float], steps_per_second: float) -> dict[str, float]:
        """Further values for the log line after `step` steps, given its mean loss terms and rate."""
        return {}


@dataclass(frozen=True)
class LoopSettings:
    """Settings of the loop.

    Attributes:
        name: `autoencoder`, `decoder`, `flow`, `refiner`.
        steps: of the whole training; None in the plan of one whose number is not known yet.
        checkpoint_every, validate_every, log_every: in steps.
        best: name of the validated value that selects the best checkpoint; None: no best checkpoint.
        lowest: whether lower is better.
        max_bad_steps: consecutive non-finite steps, which change nothing, that end the training.
        less_memory: a further way to use less memory, a phrase that begins with a comma.
    """

    name: str
    steps: int | None
    checkpoint_every: int
    validate_every: int
    log_every: int
    best: str | None = None
    lowest: bool = False
    max_bad_steps: int = 1
    less_memory: str = ""


class RunningMeans:
    """Means of a step's terms since the last line of the log; non-finite steps do not count.

    Sums stay on the device until they are read. They are part of a checkpoint, so that the log after a resume is that
    of an uninterrupted training.

    Attributes:
        skipped: non-finite steps of the whole training, as of the last `read`.
    """

    def __init__(self, state: dict[str, Any] | None = None, device: torch.device | None = None) -> None:
        """Start at zero, or from the result of `state`."""
        state = state or {"steps": 0, "skipped": 0, "sums": []}
        self._steps, self.skipped = state["steps"], state["skipped"]
        # Names of terms -> [names + 1] float64: their sums, then the number of steps. Terms appear during a training.
        self._sums = {
            tuple(part["names"]): torch.tensor(part["values"], dtype=torch.float64, device=device)
            for part in state["sums"]
        }

    def add(self, result: StepResult) -> None:
        """Count a step; the host does not wait for the device."""
        self._steps += 1
        values = torch.stack([value.detach().float() for value in result.terms.values()]).double()
        counted = torch.where(result.finite, torch.cat([values, torch.ones_like(values[:1])]), 0.0)
        names = tuple(result.terms)
        self._sums[names] = self._sums[names] + counted if names in self._sums else counted

    def share(self, processes: Processes) -> None:
        """Average the sums over all processes, which took the same steps."""
        for sums in self._sums.values():
            processes.mean_(sums)

    def read(self) -> dict[str, float]:
        """The means of all terms, NaN if every step was skipped; begin again at zero."""
        totals: dict[str, tuple[float, float]] = {}
        counted = 0.0
        for names, sums in self._sums.items():
            *values, count = sums.tolist()
            counted += count
            for name, value in zip(names, values, strict=True):
                before, steps = totals.get(name, (0.0, 0.0))
                totals[name] = before + value, steps + count
        self.skipped += self._steps - round(counted)
        self._steps, self._sums = 0, {}
        return {name: value / steps if steps else math.nan for name, (value, steps) in totals.items()}

    def state(self) -> dict[str, Any]:
        """What a resume needs, as JSON."""
        sums = [{"names": list(names), "values": values.tolist()} for names, values in self._sums.items()]
        return {"steps": self._steps, "skipped": self.skipped, "sums": sums}


def run_training(
    trainer: Trainer,
    settings: LoopSettings,
    log: TrainingLog | None,
    checkpoints: CheckpointFolder,
    found: Checkpoint | None = None,
    processes: Processes = ALONE,
) -> None:
    """Train to the last step.

    Args:
        log: of rank 0; None in the others.
        found: the checkpoint that the trainer was loaded from; None: it begins.
    Raises:
        UserError: non-finite loss or gradients, `max_bad_steps` times in a row, which changed nothing; out of memory.
        StoppedBySignal: after a signal, with a checkpoint saved.
    """
    first_step, logged = (0, None) if found is None else (found.step, found.state.get("logged"))
    means = RunningMeans(logged, trainer.device)
    timer, guard = StepTimer(), _FiniteGuard(trainer, settings, processes)
    announced, pause = None, FIRST_PAUSE
    bar = progress(total=settings.steps, initial=first_step, description=settings.name, unit="step")
    with StopRequest() as stop, explain_out_of_memory(settings), bar:
        for step in range(first_step, settings.steps):
            result = trainer.train_step(step)
            means.add(result)
            guard.check(step, result)
            timer.step()
            bar.update()
            done = step + 1
            last = done == settings.steps
            stopped_by = processes.any_asks(stop.signal_number)
            saves = done % settings.checkpoint_every == 0 or last or stopped_by != 0
            validates = done % settings.validate_every == 0 or last
            logs = done % settings.log_every == 0 or validates or last
            # The only places where the host waits for the device. A step is checked before it is saved.
            if logs or saves:
                guard.settle()
                means.share(processes)
            if step == first_step and not logs:
                timer.rate()  # the first step compiles, allocates and warms up
            rate = timer.rate() if logs else timer.rate_after(FIRST_WORD_SECONDS) if announced is None else None
            speed = f"{rate:.2f} steps/s, about {duration((settings.steps - done) / rate)} left" if rate else ""
            if rate and announced is None:
                say(f"{settings.name}: {speed}")
                announced = time.perf_counter()
            measured: dict[str, float] = {}
            if logs:
                terms = means.read()
                record = {"step": done, **terms, "learning_rate": trainer.learning_rate, "steps_per_second": rate}
                record |= {"skipped_steps": means.skipped} | trainer.metrics(done, terms, rate)
                if processes.is_first and validates:
                    measured = trainer.validate(done)
                    timer.rate()  # validation does not count
                if log is not None:
                    log.write(record | measured)
                bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
                if bar.disable and not last and time.perf_counter() - announced >= pause:
                    say(f"{settings.name}: step {done} of {settings.steps}, loss {record['loss']:.4f}, {speed}")
                    announced, pause = time.perf_counter(), min(2 * pause, LONGEST_PAUSE)
            if processes.is_first:
                best = settings.best in measured and checkpoints.is_best(
                    settings.best, measured[settings.best], lowest=settings.lowest
                )
                if saves or best:
                    if log is not None:
                        log.flush()
                    value = {settings.best: measured[settings.best]} if best else None
                    state = trainer.state() | ({} if log is None else log.state) | {"logged": means.state()}
                    path = checkpoints.save(done, trainer.files(), state, best=value)
            if saves or validates:
                processes.wait()
            if stopped_by:
                where = f", saved {path}" if processes.is_first else ""
                raise StoppedBySignal(stopped_by, f"stopped at step {done}{where}; the same command resumes from there")


@dataclass(frozen=True)
class _Snapshot(Checkpoint):
    """A checkpoint in memory."""

    files: dict[str, Tensors]

    def tensors(self, name: str, device: str | torch.device = "cpu") -> Tensors:
        return self.files[name]


def steps_until(
    end: float,
    trainer: Trainer,
    settings: LoopSettings,
    checkpoints: CheckpointFolder,
    processes: Processes = ALONE,
) -> int:
    """The number of steps that a training can take until a time, by its own rate; the same in all processes.

    Takes some steps, and measures a validation and a checkpoint, of which a training has several. The trainer is then
    as it was.

    Args:
        end: on the clock `time.perf_counter`.
        settings: of the loop; `steps` is not used.
    Raises:
        UserError: as `run_training`.
        StoppedBySignal: after a signal; nothing was trained.
    """
    started = time.perf_counter()
    before = _Snapshot(
        checkpoints.folder,
        trainer.state(),
        {name: {k: v.detach().clone() for k, v in tensors.items()} for name, tensors in trainer.files().items()},
    )
    trainer.set_steps(UNKNOWN_STEPS)
    validation = checkpoint = 0.0
    if processes.is_first:
        validating = time.perf_counter()
        trainer.validate(0)
        validation = time.perf_counter() - validating
    processes.wait()
    seconds = _seconds_per_step(end - started, trainer, settings, processes)
    if processes.is_first:
        saving = time.perf_counter()
        temporary = checkpoints.folder / ".step_measured.tmp"  # what a crash leaves of it, the next checkpoint removes
        CheckpointFolder(temporary).save(0, trainer.files(), trainer.state())
        shutil.rmtree(temporary)
        checkpoint = time.perf_counter() - saving
    trainer.load(before)
    seconds += validation / settings.validate_every + checkpoint / settings.checkpoint_every
    left = end - time.perf_counter() - validation - checkpoint  # the last step has both
    steps = processes.any_asks(max(1, int(left / seconds)) if processes.is_first else 0)
    say(f"{settings.name}: {duration(max(0.0, left))} at {1 / seconds:.3g} steps/s: {steps} steps")
    return steps


def _seconds_per_step(available: float, trainer: Trainer, settings: LoopSettings, processes: Processes) -> float:
    """Measure steps of a training that has these seconds."""
    guard = _FiniteGuard(trainer, settings, processes)
    begun = started = time.perf_counter()
    with StopRequest() as stop:
        for step in itertools.count():
            guard.check(step, trainer.train_step(step))
            if step + 1 == FIRST_STEPS:
                guard.settle()
                started = time.perf_counter()
            now, measured = time.perf_counter(), step + 1 - FIRST_STEPS
            wanted = min(MEASURED_SHARE * available, MEASURED_SECONDS)
            enough = measured >= MEASURED_STEPS and now - started >= wanted
            enough |= measured >= 1 and now - begun >= MOST_MEASURED_SHARE * available
            # Rank 0 decides; the numbers of the signals are larger than 1.
            asked = processes.any_asks(stop.signal_number or int(enough and processes.is_first))
            if asked > 1:
                raise StoppedBySignal(asked, f"{settings.name}: stopped before its first step, nothing is trained")
            if asked:
                guard.settle()
                return (time.perf_counter() - started) / measured
    raise AssertionError


class _FiniteGuard:
    """Counts consecutive non-finite steps without making the host wait for the current one.

    On a CPU a step is checked as soon as it is done; on a GPU while the next one runs.
    """

    def __init__(self, trainer: Trainer, settings: LoopSettings, processes: Processes) -> None:
        self.trainer, self.settings, self.processes = trainer, settings, processes
        self.pending: tuple[int, StepResult, Callable[[], bool]] | None = None
        self.bad_steps = 0

    def check(self, step: int, result: StepResult) -> None:
        if result.finite.is_cuda:
            self.settle()
            self.pending = (step, result, start_reading(result.finite))
        else:
            self.pending = (step, result, lambda: bool(result.finite))
            self.settle()

    def settle(self) -> None:
        """Check the last step that was not checked yet.

        Raises:
            UserError: it is the last allowed non-finite step in a row.
        """
        if self.pending is None:
            return
        (step, result, read), self.pending = self.pending, None
        if read():
            self.bad_steps = 0
            return
        self.bad_steps += 1
        terms = ", ".join(f"{name} {value.item():g}" for name, value in result.terms.items())
        most = self.settings.max_bad_steps
        message = (
            f"{self.settings.name}: the loss or its gradients are not finite at step {step + 1} ({terms}), on "
            f"{self.trainer.describe_batch(step)}. The step changed nothing"
        )
        if self.bad_steps < most:
            if self.processes.is_first:
                warn(f"{message}; continuing ({self.bad_steps} such steps in a row, {most} end the training)")
            return
        row = f", {most} steps in a row" if most > 1 else ""
        raise UserError(f"{message}{row}, and the last checkpoint is kept. {_advice(self.settings.name)}")


def start_reading(flag: Tensor) -> Callable[[], bool]:
    """Queue a copy of a GPU flag; the returned function waits only for kernels that were queued before."""
    copied, arrived = flag.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record()

    def read() -> bool:
        arrived.synchronize()
        return bool(copied)

    return read


@contextmanager
def explain_out_of_memory(settings: LoopSettings) -> Iterator[None]:
    """Turn an out-of-memory error into one that names the keys to change.

    Raises:
        UserError: out of memory on the device or the host.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        first_line = str(error).partition("\n")[0]
        # The CPU allocator raises a plain RuntimeError.
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in first_line:
            raise
        key = f"{settings.name}.training"
        raise UserError(
            f"{settings.name}: out of memory ({first_line}), and the last checkpoint is kept. Compute each batch in "
            f"parts ({key}.accumulate=2), lower {key}.batch_size, or use {key}.precision=bf16{settings.less_memory}"
        ) from None


def _advice(name: str) -> str:
    key = f"{name}.training"
    return f"Lower {key}.learning_rate, set {key}.grad_clip=1, or use {key}.precision=fp32"
