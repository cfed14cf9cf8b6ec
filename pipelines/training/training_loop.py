"""The loop of every training: steps, log, validation, checkpoints, stopping; what a step does is the trainer's."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.errors import StoppedBySignal, UserError
from pipelines.runtime.checkpoints import CheckpointFolder, Tensors
from pipelines.runtime.distributed import ALONE, Processes
from pipelines.runtime.logs import StepTimer, TrainingLog
from pipelines.runtime.progress import duration, progress, say, warn
from pipelines.runtime.signals import StopRequest

# After so long it is said how fast a training is, even where the first line of its log is far.
FIRST_WORD_SECONDS = 10.0


@dataclass(frozen=True)
class StepResult:
    """What one step gives, without waiting for the device.

    Attributes:
        terms: of the loss, scalars of this process; `loss` is their sum as it is trained on.
        finite: scalar bool: whether the gradients were, and so the update was made.
    """

    terms: dict[str, Tensor]
    finite: Tensor


class Trainer(ABC):
    """A model and all that changes while it is trained."""

    @property
    @abstractmethod
    def learning_rate(self) -> float:
        """Of the last step."""

    @abstractmethod
    def train_step(self, step: int) -> StepResult:
        """One update; `step` counts from 0, and with the seed decides all draws."""

    @abstractmethod
    def describe_batch(self, step: int) -> str:
        """What a step was trained on, for the message about a step that failed."""

    @abstractmethod
    def files(self) -> dict[str, Tensors]:
        """Everything that resuming needs, and everything that using the model needs."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """The JSON that goes with the files."""

    def validate(self, step: int) -> dict[str, float]:
        """Measure the model after so many steps. Called in the first process; empty where there is nothing to see."""
        return {}

    def metrics(self, step: int, terms: dict[str, float], steps_per_second: float) -> dict[str, float]:
        """Further numbers for the log's line after so many steps, given its mean loss terms and its rate."""
        return {}


@dataclass(frozen=True)
class LoopSettings:
    """How a training is run.

    Attributes:
        name: `autoencoder`, `flow`, `refiner`.
        steps, checkpoint_every, validate_every, log_every: in steps.
        best: the validated number that tells the best checkpoint; None: none is kept as such.
        lowest: whether less of it is better.
        advice: what to do about a loss that is not finite.
        max_bad_steps: steps in a row with such a loss, each without an update, that end the training.
        less_memory: what to do when memory is out.
    """

    name: str
    steps: int
    checkpoint_every: int
    validate_every: int
    log_every: int
    best: str | None = None
    lowest: bool = False
    advice: str = "Lower the learning rate, clip gradients, or take precision fp32"
    max_bad_steps: int = 1
    less_memory: str = "Take a smaller batch"


def run_training(
    trainer: Trainer,
    settings: LoopSettings,
    log: TrainingLog | None,
    checkpoints: CheckpointFolder,
    first_step: int,
    processes: Processes = ALONE,
) -> None:
    """Train from `first_step` to the last one.

    Args:
        log: of the first process; None in the others.
    Raises:
        UserError: a loss or gradients that are not finite, `max_bad_steps` times in a row; nothing was updated by them.
            No memory left.
        StoppedBySignal: after SIGINT or SIGTERM, with a checkpoint saved.
    """
    timer, guard = StepTimer(), _FiniteGuard(trainer, settings, processes)
    announced = False
    bar = progress(total=settings.steps, initial=first_step, description=settings.name, unit="step")
    with StopRequest() as stop, explain_out_of_memory(settings.name, settings.less_memory), bar:
        for step in range(first_step, settings.steps):
            result = trainer.train_step(step)
            guard.look_at(step, result)
            timer.step()
            bar.update()
            done = step + 1
            last = done == settings.steps
            stopped_by = processes.any_asks(stop.signal_number)
            saves = done % settings.checkpoint_every == 0 or last or stopped_by != 0
            validates = done % settings.validate_every == 0 or last
            logs = done % settings.log_every == 0 or validates or last
            # The only places where the host waits for the device. What is saved was looked at first.
            if logs or saves:
                guard.settle()
            if step == first_step and not logs:
                timer.rate()  # the first step compiles, allocates and warms up
            rate = timer.rate() if logs else None if announced else timer.rate_after(FIRST_WORD_SECONDS)
            if rate and not announced:
                say(f"{settings.name}: {rate:.2f} steps/s, about {duration((settings.steps - done) / rate)} to go")
                announced = True
            measured: dict[str, float] = {}
            if logs:
                terms = _mean_over(processes, result.terms)
                record = {"step": done, **terms, "learning_rate": trainer.learning_rate, "steps_per_second": rate}
                record |= trainer.metrics(done, terms, rate)
                if processes.is_first and validates:
                    measured = trainer.validate(done)
                    timer.rate()  # steps that follow are not slower for it
                if log is not None:
                    log.write(record | measured)
                bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
            if processes.is_first:
                best = settings.best in measured and checkpoints.is_best(
                    settings.best, measured[settings.best], lowest=settings.lowest
                )
                if saves or best:
                    value = {settings.best: measured[settings.best]} if best else None
                    path = checkpoints.save(done, trainer.files(), trainer.state(), best=value)
            if saves or validates:
                processes.wait()
            if stopped_by:
                where = f", saved {path}" if processes.is_first else ""
                raise StoppedBySignal(stopped_by, f"stopped at step {done}{where}; the same command goes on from there")


class _FiniteGuard:
    """Counts steps whose gradients are not finite, without making the host wait for the step that it has begun.

    On a CPU a step is looked at as soon as it is done; on a GPU when the next one is under way.
    """

    def __init__(self, trainer: Trainer, settings: LoopSettings, processes: Processes) -> None:
        self.trainer, self.settings, self.processes = trainer, settings, processes
        self.pending: tuple[int, StepResult, Callable[[], bool]] | None = None
        self.bad_steps = 0

    def look_at(self, step: int, result: StepResult) -> None:
        if result.finite.is_cuda:
            self.settle()
            self.pending = (step, result, start_reading(result.finite))
        else:
            self.pending = (step, result, lambda: bool(result.finite))
            self.settle()

    def settle(self) -> None:
        """Look at the last step that was not looked at yet.

        Raises:
            UserError: its loss or its gradients are not finite, and it is one too many in a row.
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
            f"{self.trainer.describe_batch(step)}. Nothing was updated"
        )
        if self.bad_steps < most:
            if self.processes.is_first:
                warn(f"{message}; it goes on ({self.bad_steps} such steps in a row, {most} end it)")
            return
        row = f", {most} steps in a row" if most > 1 else ""
        raise UserError(f"{message}{row}, and the last checkpoint is kept. {self.settings.advice}")


def start_reading(flag: Tensor) -> Callable[[], bool]:
    """Copy a flag from a GPU behind the kernels that are queued now; reading it later waits for these alone."""
    copied, arrived = flag.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record()

    def read() -> bool:
        arrived.synchronize()
        return bool(copied)

    return read


@contextmanager
def explain_out_of_memory(name: str, advice: str) -> Iterator[None]:
    """Turn an error about memory that could not be had into one that says what to lower.

    Raises:
        UserError: memory of the device or of the host is out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        first_line = str(error).partition("\n")[0]
        # On a CPU it is a plain RuntimeError of the allocator's.
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in first_line:
            raise
        raise UserError(f"{name}: out of memory ({first_line}). {advice}; the last checkpoint is kept") from None


def _mean_over(processes: Processes, terms: dict[str, Tensor]) -> dict[str, float]:
    values = torch.stack([value.detach().float() for value in terms.values()])
    processes.mean_(values)
    return dict(zip(terms, values.tolist(), strict=True))
