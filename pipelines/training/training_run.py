"""One training from what its folder holds to its last step: how far it is, resuming, lock, log, loop."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipelines.config import RiverConfig, differences, result_settings, with_defaults
from pipelines.errors import UserError
from pipelines.runtime.checkpoints import Checkpoint, CheckpointFolder
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import remove_leftovers
from pipelines.runtime.logs import TrainingLog
from pipelines.runtime.progress import say
from pipelines.runtime.run_folder import (
    another_name,
    chosen_checkpoint,
    describe_progress,
    has_only_weights,
    is_imported,
    move_to_backup,
    only_training_of,
    recorded_steps,
    write_run_files,
)
from pipelines.runtime.status import Status
from pipelines.training.training_loop import (
    UNKNOWN_STEPS,
    LoopSettings,
    Trainer,
    TrainingAmount,
    explain_out_of_memory,
    run_training,
    steps_until,
)

# The steps of a training whose configuration leaves them open let it see each frame this many times, as often as the
# paper's on KTH, but at least as many as random weights need however little there is to learn, and no more than those
# of the paper's sizes do.
PASSES = 20
LEAST_STEPS = 5000
MOST_STEPS = {"autoencoder": 100_000, "flow": 300_000, "refiner": 20_000, "decoder": 2000}


@dataclass(frozen=True)
class TrainingPlan:
    """What a training is, before anything of it is built.

    Attributes:
        folder: `runs/<name>/flow`.
        loop: settings of the loop; `best` is left to the trainer.
        keep: number of checkpoints to keep.
        identity: the settings that its result depends on, as a checkpoint's `identity` has them.
        settings: all its settings, as a checkpoint's `settings` has them.
        sections: of the configuration, of which `identity` and `settings` hold values, by name. What a checkpoint holds
            nothing of, because the key is newer, has its default.
        inputs: what else it depends on, under the names of the checkpoint's state, such as the store's fingerprint.
            Missing inputs are not compared.
        way_out: a further way out of a conflict, a phrase that ends in a comma.
        command: that trains it.
    """

    folder: Path
    loop: LoopSettings
    keep: int
    identity: dict[str, Any]
    settings: dict[str, Any]
    sections: dict[str, BaseModel] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    way_out: str = ""
    command: str = ""

    @property
    def name(self) -> str:
        """`autoencoder`, `decoder`, `flow`, `refiner`: a section of the configuration, and a folder of the run."""
        return self.loop.name

    @property
    def steps(self) -> int | None:
        """Of the whole training; None: not known before it begins."""
        return self.loop.steps

    def with_steps(self, steps: int) -> "TrainingPlan":
        """The plan with this number of steps."""
        section = self.settings.get(self.name, {})
        section = section | {"training": section.get("training", {}) | {"steps": steps}}
        return replace(self, loop=replace(self.loop, steps=steps), settings=self.settings | {self.name: section})

    def known_from(self, found: Checkpoint | None) -> "TrainingPlan":
        """The plan with the steps of a checkpoint's training, unless it has some or that training has not begun."""
        if self.steps is not None or found is None or not found.step:
            return self
        steps = recorded_steps(found, self.name)
        return self if steps is None else self.with_steps(steps)

    @property
    def state(self) -> dict[str, Any]:
        """What each checkpoint records of the plan."""
        return {"identity": self.identity, "settings": self.settings, **self.inputs}


def plan_training(
    name: str,
    config: RiverConfig,
    *,
    also: Sequence[str] = (),
    inputs: dict[str, Any] | None = None,
    less_memory: str = "",
    way_out: str = "",
    command: str | None = None,
) -> TrainingPlan:
    """The plan of the training that a section of the configuration describes.

    Args:
        name: of the section.
        also: other sections that the result depends on.
        inputs, way_out: see `TrainingPlan`.
        command: that trains it; None: `train-<name>`.
        less_memory: see `LoopSettings`.
    """
    sections = {each: getattr(config, each) for each in (name, *also)}
    section = sections[name]
    training = section.training
    loop = LoopSettings(
        name=name,
        steps=training.steps,
        checkpoint_every=training.checkpoint_every,
        validate_every=training.validate_every,
        log_every=config.logging.every,
        max_bad_steps=training.max_bad_steps,
        less_memory=less_memory,
    )
    return TrainingPlan(
        folder=config.run_path / name,
        loop=loop,
        keep=training.keep_checkpoints,
        identity={"seed": config.seed, **{each: result_settings(part) for each, part in sections.items()}},
        settings={"seed": config.seed, name: section.model_dump(mode="json")},
        sections=sections,
        inputs=inputs or {},
        way_out=way_out,
        command=command or f"train-{name}",
    )


def of_all_runs(name: str, config: RiverConfig) -> RiverConfig:
    """The configuration of a training that a run shares with others, whatever seed its flow has."""
    newest = CheckpointFolder(config.training_folder(name) / "checkpoints").latest(warns=False)
    if config.run is None or newest is None:
        return config.shared
    return config.shared.model_copy(update={"seed": newest.state.get("identity", {}).get("seed", config.seed)})


# Configuration with a number of steps, checkpoint to resume from, resources to close -> trainer, the plan's loop with
# `best`, a line about the training.
OpenTrainer = Callable[[RiverConfig, Checkpoint | None, ExitStack], tuple[Trainer, LoopSettings, str]]


def training_status(plan: TrainingPlan) -> Status:
    """How far a training is, by its newest whole checkpoint."""
    return _status_of(plan, CheckpointFolder(plan.folder / "checkpoints").latest())


def train(plan: TrainingPlan, config: RiverConfig, run_context: RunContext, open_trainer: OpenTrainer) -> Checkpoint:
    """Run a training from where it is to its last step; do nothing when it is done.

    Where the configuration leaves the number of steps open, it is that of the checkpoints, or for a training that
    begins follows from `run_context.training_minutes`, which end with it, or from the amount of data.

    Returns:
        The checkpoint to use: the best by validation if one was measured, else the last.
    Raises:
        UserError: the checkpoint conflicts with the configuration or the inputs; another process trains in the folder;
            losses that are not finite; out of memory.
        StoppedBySignal: after a signal, with a checkpoint saved.
    """
    processes, started = run_context.processes, time.perf_counter()
    with processes.first_before_others():
        checkpoints, found = resume(plan, run_context)
    plan = plan.known_from(found)
    if found is not None and _status_of(plan, found).is_done:
        say(f"{plan.name}: done, {describe_progress(found)}, {found.path}")
        if processes.is_first:
            remove_leftovers(checkpoints.folder)  # of one that was killed when all but a pointer was written
        return chosen_checkpoint(plan.folder)
    with ExitStack() as held, explain_out_of_memory(plan.loop):
        lock = held.enter_context(ExitStack())
        if processes.is_first:
            lock.enter_context(only_training_of(plan.folder))
        steps = UNKNOWN_STEPS if plan.steps is None else plan.steps
        trainer, loop, sentence = open_trainer(with_steps(config, plan.name, steps), found, held)
        # Only now are files changed: what is refused changes nothing.
        if processes.is_first and run_context.restart and checkpoints.has_any():
            lock.close()  # its file moves with the folder
            move_to_backup(plan.folder, plan.name)
            lock.enter_context(only_training_of(plan.folder))
        first_step = 0
        if found is not None:
            trainer.load(found)
            first_step = found.step
        minutes = None if found is None else found.state.get("minutes")
        if plan.steps is None:
            minutes = run_context.training_minutes
            if minutes is None:
                steps = suitable_steps(plan.name, trainer.amount)
                say(
                    f"{plan.name}: {trainer.amount.frames} frames to learn from: {steps} steps "
                    f"({plan.name}.training.steps sets another number, --minutes a time)"
                )
            else:
                say(f"{plan.name}: measuring how many steps take {minutes:g} minutes")
                steps = steps_until(started + 60 * minutes, trainer, loop, checkpoints, processes)
            trainer.set_steps(steps)
            plan = plan.with_steps(steps)
        config, loop = with_steps(config, plan.name, steps), replace(loop, steps=steps)
        trainer.checkpoint_state["settings"] = plan.settings
        if minutes is not None:
            trainer.checkpoint_state["minutes"] = minutes
        if processes.is_first:
            # The fast decoder is added to a run, perhaps by another one that shares it: what that samples with stays.
            if plan.name != "decoder" or not (config.run_path / "config.yaml").exists():
                write_run_files(config, run_context.device)
            if run_context.resume != "auto" and (backup := checkpoints.move_later_to_backup(first_step)) is not None:
                say(f"{plan.name}: --resume {run_context.resume}; later checkpoints are kept in {backup}")
        many = f" x {processes.count}" if processes.count > 1 else ""
        say(f"{plan.name}: {sentence}, steps {first_step} to {plan.steps}, {run_context.device}{many} -> {plan.folder}")
        log = None
        if processes.is_first:
            if found is not None and first_step == 0 and minutes is None:  # by the clock, that was measured
                trainer.validate(0)  # of a fine-tuning: measures the weights that it starts from
            state = None if found is None else found.state
            log = held.enter_context(closing(TrainingLog(plan.folder, config, plan.name, first_step, state)))
        processes.wait()
        run_training(trainer, loop, log, checkpoints, found, processes)
    return chosen_checkpoint(plan.folder)


def with_steps(config: RiverConfig, name: str, steps: int) -> RiverConfig:
    """The configuration with this number of steps of a training."""
    section = getattr(config, name)
    training = section.training.model_copy(update={"steps": steps})
    return config.model_copy(update={name: section.model_copy(update={"training": training})})


def suitable_steps(name: str, amount: TrainingAmount) -> int:
    """The number of steps of a training that suits the amount of data."""
    passes = math.ceil(PASSES * amount.frames / amount.frames_per_step)
    return min(max(passes, LEAST_STEPS), MOST_STEPS[name])


def resume(plan: TrainingPlan, run_context: RunContext) -> tuple[CheckpointFolder, Checkpoint | None]:
    """Find the checkpoint to resume from: the newest, or the one that `run_context.resume` names; none on a restart.

    Raises:
        UserError: the checkpoint conflicts with the plan; the named one is missing or damaged.
    """
    name = run_context.resume
    checkpoints = CheckpointFolder(plan.folder / "checkpoints", plan.keep)
    if name != "auto" and run_context.restart:
        raise UserError(f"--resume {name} continues a training and --restart begins a new one: use one of them")
    found = checkpoints.latest() if name == "auto" else checkpoints.named(name)
    if run_context.restart:
        return checkpoints, None
    plan = plan.known_from(found)
    status = _status_of(plan, found)
    if status.state == "conflicting":
        raise UserError(status.detail)
    if found is None:
        return checkpoints, None
    if name != "auto" and has_only_weights(found):
        raise UserError(_not_resumable(plan, found))
    if run_context.training_minutes not in (None, found.state.get("minutes")) and (found.step or is_imported(found)):
        raise UserError(_too_late(plan, found, run_context.training_minutes))
    if harmless := _changed_settings(plan, found):
        say(f"{plan.name}: resuming from {found.path.name} with changed settings: {'; '.join(harmless)}")
    planned = recorded_steps(found, plan.name)
    if found.step and planned is not None and planned < plan.steps:
        say(
            f"{plan.name}: its learning rate was to end at step {planned}: it rises again, and falls until step "
            f"{plan.steps}" + ("; `train-flow --fine-tune` begins a schedule of its own" if plan.name == "flow" else "")
        )
    return checkpoints, found


def _too_late(plan: TrainingPlan, found: Checkpoint, minutes: float) -> str:
    before, steps = found.state.get("minutes"), recorded_steps(found, plan.name)
    begun = describe_progress(found) + ("" if steps is None else f", to end at step {steps}")
    tunes = plan.command == "train-flow"
    further = " or, when it is done, `train-flow --fine-tune` to train its weights further" if tunes else ""
    return (
        f"--minutes {minutes:g} is for a training that begins, and {found.path} has begun ({begun}"
        + ("" if before is None else f", by --minutes {before:g}")
        + f"): leave it out to finish that training, or add --restart to begin again{further}"
    )


def _status_of(plan: TrainingPlan, found: Checkpoint | None) -> Status:
    plan = plan.known_from(found)
    if found is None and CheckpointFolder(plan.folder / "checkpoints").has_any():
        return Status("conflicting", _none_whole(plan), plan.folder)
    if found is None:
        if plan.steps is not None:
            return Status("missing", f"0 of {plan.steps} steps", plan.folder)
        most = MOST_STEPS[plan.name]
        amount = f"0 of {most} steps" if most <= LEAST_STEPS else "0 steps; as many as suit the amount of data"
        return Status("missing", f"{amount}, or as --minutes says", plan.folder)
    before, ours = found.state.get("identity", {}), plan.identity
    if has_only_weights(found):
        ours = _shared_part(ours, before)
    if changed := differences(ours, _with_defaults(before, ours, plan)):
        return Status("conflicting", _refusal(plan, found, changed), plan.folder)
    if is_imported(found):
        return Status("done", describe_progress(found), plan.folder, standalone=True)
    if has_only_weights(found):
        if plan.steps is not None and plan.steps > (recorded_steps(found, plan.name) or found.step):
            return Status("conflicting", _not_resumable(plan, found), plan.folder)
        return Status("done", describe_progress(found), plan.folder, standalone=True)
    if changed := differences(plan.inputs, _shared_part(found.state, plan.inputs)):
        return Status("conflicting", _refusal(plan, found, changed), plan.folder)
    if plan.steps is not None and found.step >= plan.steps:
        return Status("done", describe_progress(found), plan.folder)
    total = "" if plan.steps is None else f" of {plan.steps}"
    return Status("partial", f"{found.step}{total} steps", plan.folder)


def _not_resumable(plan: TrainingPlan, found: Checkpoint) -> str:
    tunes = "train the weights further with `train-flow --fine-tune`, " if plan.command == "train-flow" else ""
    return (
        f"{found.path} has only weights, as released runs do, and no state of the optimizer to resume from: {tunes}"
        f"train again with `{plan.command} --restart` (the existing training is moved to a backup), or "
        f"{another_name(plan.folder)}"
    )


def _none_whole(plan: TrainingPlan) -> str:
    return (
        f"{plan.folder}/checkpoints: none of them is whole: restore one, or train again with `{plan.command} "
        "--restart` (they are moved to a backup)"
    )


def _refusal(plan: TrainingPlan, found: Checkpoint, changed: list[str]) -> str:
    how = f"imported from {found.state['imported']['file']}" if is_imported(found) else "trained"
    harmless = [line for line in _changed_settings(plan, found) if line not in changed]
    return (
        f"{found.path} was {how} with other settings or inputs:\n  "
        + "\n  ".join(changed)
        + ("\nalso changed, without effect on the result:\n  " + "\n  ".join(harmless) if harmless else "")
        + f"\nrestore the old values, train again with `{plan.command} --restart` (the existing training is moved "
        f"to a backup), {plan.way_out}or {another_name(plan.folder)}"
    )


def _changed_settings(plan: TrainingPlan, found: Checkpoint) -> list[str]:
    before = None if has_only_weights(found) else found.state.get("settings")
    return [] if before is None else differences(plan.settings, _with_defaults(before, plan.settings, plan))


def _with_defaults(recorded: dict[str, Any], ours: dict[str, Any], plan: TrainingPlan) -> dict[str, Any]:
    sections = {name: section for name, section in plan.sections.items() if name in recorded and name in ours}
    return recorded | {name: with_defaults(recorded[name], ours[name], part) for name, part in sections.items()}


def _shared_part(identity: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """The values of `identity` under the keys that `like` has as well."""
    return {
        name: _shared_part(identity[name], value) if isinstance(value, dict) else identity[name]
        for name, value in like.items()
        if name in identity
    }
