"""Distillation's training: a student of a few evaluations per frame, from the store and a teacher's flow."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import latent_cache
from latent_cache import FlowBatch
from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.loading import find_flow, flow_digest, load_trained_field, standardization_in, with_chosen_sampler
from pipelines.runtime.checkpoints import Checkpoint, CheckpointFolder
from pipelines.runtime.context import RunContext, computing_in
from pipelines.runtime.progress import say
from pipelines.runtime.run_folder import describe_run, is_student
from pipelines.training.fine_tuning import takes_raw_latents
from pipelines.training.flow_trainer import FlowTrainer, student_plan, train_field, with_precision
from pipelines.training.flow_validation import FlowValidation, open_flow_validation
from stage2_flow.config import SAMPLER_KEYS, SamplingConfig
from stage2_flow.distillation import (
    DistillationDraws,
    Segments,
    distillation_loss,
    distillation_sample,
    draw_distillation,
    spread_own_frames,
    with_own_past,
)
from stage2_flow.path import PathSample
from stage2_flow.rollout import evaluation_mode
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.standardization import Standardization
from stage2_flow.vector_field import VectorField


@dataclass(frozen=True)
class Teacher:
    """A trained flow, and the sampler that its predictions use.

    Attributes:
        run: its name; None: the default run.
        flow: the checkpoint.
        weights: its digest.
        sampling: solver and evaluations.
    """

    run: str | None
    flow: Checkpoint
    weights: str
    sampling: SamplingConfig

    @property
    def state(self) -> dict[str, Any]:
        """What each checkpoint of its student records."""
        sampler = self.sampling.model_dump(mode="json", include=set(SAMPLER_KEYS))
        return {"run": self.run, "step": self.flow.step, "weights": self.weights, "sampler": sampler}

    @property
    def plan(self) -> SamplingPlan:
        return SamplingPlan.from_config(self.sampling)


def find_teacher(config: RiverConfig) -> Teacher | None:
    """The flow of a run as a teacher; None: it has none.

    Args:
        config: of the teacher's run.
    """
    flow = find_flow(config.run_path)
    if flow is None:
        return None
    sampling, _ = with_chosen_sampler(config.run_path, flow, config.sampling)
    return Teacher(config.run, flow, flow_digest(flow, sampling.weights), sampling)


def find_student(config: RiverConfig) -> Checkpoint | None:
    """The newest checkpoint of the run's student; None: nothing is trained there.

    Raises:
        UserError: the run has a flow of another kind.
    """
    newest = CheckpointFolder(config.run_path / "flow" / "checkpoints").latest()
    if newest is not None and not is_student(newest):
        raise UserError(
            f"{config.run_path} has a flow that is no student: name another run with --run, or replace it with "
            "--restart (it is moved to a backup)"
        )
    return newest


def settings_of_student(config: RiverConfig, teacher: RiverConfig, flow: Checkpoint) -> dict[str, Any]:
    """The settings that a new student takes from its teacher, by section of the configuration.

    Args:
        config: of the student's run; only its shares are used.
        teacher: the configuration of the teacher's run.
        flow: the teacher's checkpoint.
    """
    shares, training = config.distillation, teacher.flow.training

    def of_steps(number: int) -> int:
        return math.ceil(shares.steps_share * number)

    changed = {
        "steps": None if training.steps is None else of_steps(training.steps),
        "learning_rate": shares.learning_rate_share * training.learning_rate,
        "muon_learning_rate": shares.learning_rate_share * training.muon_learning_rate,
        "checkpoint_every": of_steps(training.checkpoint_every),
        "validate_every": of_steps(training.validate_every),
        "standardize": not takes_raw_latents(flow),  # imported weights do, whatever the configuration says
    }
    if config.flow.training.precision == "auto":  # the teacher's is that of the machine that it was trained on
        changed["precision"] = "auto"
    return {"flow": {"model": flow.state["model"], "training": training.model_dump(mode="json") | changed}}


def segments_of(config: RiverConfig, sampling: SamplingConfig) -> Segments:
    """The steps of a teacher's sampler, divided by the evaluations of the student.

    Args:
        config: of the student's run.
        sampling: of the teacher.
    Raises:
        UserError: they can't be divided.
    """
    evaluations = config.distillation.evaluations
    try:
        return Segments(SamplingPlan.from_config(sampling), evaluations)
    except ValueError as error:
        raise UserError(
            f"distillation.evaluations: {evaluations}: {error}: use fewer evaluations, or another sampler of the "
            "teacher (for example --set sampling.solver=euler --set sampling.nfe=8)"
        ) from None


def student_config(config: RiverConfig, teacher: Teacher) -> RiverConfig:
    """The configuration with the one sampler that a student of this teacher learns.

    Raises:
        UserError: the teacher's steps can't be divided.
    """
    student = segments_of(config, teacher.sampling).student
    sampler = {
        "preset": "default", "solver": student.solver.name, "steps": None, "nfe": student.steps,
        "warm_start": student.warm_start, "condition": teacher.sampling.condition,
    }  # fmt: skip
    return config.model_copy(update={"sampling": config.sampling.model_copy(update=sampler)})


def check_teacher(config: RiverConfig, student: Checkpoint, teacher: Teacher | None) -> Teacher:
    """The teacher that a student began with, with the sampler of then.

    Args:
        config: of the teacher's run.
        teacher: its flow now; None: it has none.
    Raises:
        UserError: it is another one; says the way out.
    """
    began = student.state["teacher"]
    if teacher is None or teacher.weights != began["weights"]:
        has = "has no flow now" if teacher is None else f"is {teacher.weights[:12]}... now"
        raise UserError(
            f"{student.path} learned from flow {began['weights'][:12]}... of {describe_run(began['run'])}, and that of "
            f"{config.run_path} {has}: restore it, or begin again with `distill --restart` (the student is moved to a "
            "backup; without that, it predicts as before)"
        )
    then = replace(teacher, sampling=SamplingConfig(**teacher.sampling.model_dump() | began["sampler"]))
    if then.plan != teacher.plan:
        say(
            f"distill: the teacher's sampler is {teacher.plan.describe()} now; this student goes on with "
            f"{then.plan.describe()} (--restart takes the new one)"
        )
    return then


def distill(config: RiverConfig, teacher: Teacher, run_context: RunContext) -> Checkpoint:
    """Train a student to its last step, or recognise that this was done.

    Args:
        config: of the student's run, see `settings_of_student`.
    Returns:
        The checkpoint to use: the best by validation if one was measured, else the last.
    Raises:
        UserError: as `train_flow`; a teacher of another autoencoder's latents, or whose steps can't be divided.
        StoreError: no complete store.
        StoppedBySignal: after a signal, with a checkpoint saved.
    """
    segments = segments_of(config, teacher.sampling)
    _check_latents(config, teacher)
    wanted_precision = config.flow.training.precision
    config = with_precision(config, run_context.device, anew=run_context.restart)
    config = student_config(config, teacher)
    device, plan = run_context.device, student_plan(config)
    cost = forward_passes(segments, config.distillation.own_past * (1 + config.distillation.own_frames) / 2) / 3
    say(
        f"distill: {describe_run(teacher.run)}, step {teacher.flow.step}, {segments.teacher.describe()} -> "
        f"{segments.student.describe()}; a step costs {cost:.1f} times that of `train-flow`"
    )
    standardization = standardization_in(teacher.flow)

    @cache
    def field() -> VectorField:
        return load_trained_field(teacher.flow, device, teacher.sampling.weights)

    def open_validation(*where: Any) -> StudentValidation | None:
        return open_student_validation(*where, field(), segments, standardization.to(device))

    def build(*arguments: Any, **options: Any) -> StudentTrainer:
        return StudentTrainer(*arguments, teacher=field(), segments=segments, **options)

    sampler = config.sampling.model_dump(mode="json", include=set(SAMPLER_KEYS))
    return train_field(
        plan,
        config,
        run_context,
        wanted_precision,
        standardization=standardization,
        state={"teacher": teacher.state, "sampler": sampler},
        build=build,
        open_validation=open_validation,
    )


def _check_latents(config: RiverConfig, teacher: Teacher) -> None:
    knows = teacher.flow.state["store"]["autoencoder"]
    stored = latent_cache.open_metadata(config.store_path).autoencoder["sha256"]
    if knows != stored:
        raise UserError(
            f"{config.store_path} was encoded by autoencoder {stored[:12]}..., and {teacher.flow.path} was trained on "
            f"latents of {knows[:12]}...: encode again with that autoencoder (`encode --overwrite`)"
        )


def forward_passes(segments: Segments, own_frames: float) -> float:
    """Forward passes of a training step, of which a backward pass takes two.

    Args:
        own_frames: mean number per sample.
    """
    return 3 + segments.teacher.evaluations + own_frames * segments.count


class StudentTrainer(FlowTrainer):
    """A field that learns a teacher's mean velocities.

    Attributes:
        teacher: on the device, in evaluation mode.
        segments: the teacher's steps, and the student's.
    """

    def __init__(self, *arguments: Any, teacher: nn.Module, segments: Segments, **options: Any) -> None:
        """Begin with the teacher's weights; other arguments as for `FlowTrainer`."""
        super().__init__(*arguments, weights=teacher.state_dict(), **options)
        self.teacher, self.segments = teacher, segments
        settings, rows = self.config.distillation, self.training.batch_size
        self.own_frames = spread_own_frames(rows, settings.own_past, settings.own_frames)
        self.step_flops *= forward_passes(segments, sum(self.own_frames) / rows) / 3
        self._teach: Callable[..., Tensor] = teacher
        self._predict: Callable[..., Tensor] = self.train_state.best_model
        if self.compile_mode is not None:
            self._teach = torch.compile(teacher, dynamic=False)
            self._predict = torch.compile(self.train_state.best_model, dynamic=False)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> DistillationDraws:
        return draw_distillation(shape, self.segments.count, self.own_frames, generator, self.device)

    def objective(self, batch: FlowBatch, draws: DistillationDraws) -> Callable[[nn.Module], Tensor]:
        longest, student = self.checkpoint_state["longest_distance"], self.train_state.best_model
        if max(draws.own_frames):
            with evaluation_mode(student):
                batch = with_own_past(self._predict, batch, draws, self.segments.student, longest)
        sample = distillation_sample(self._teach, batch, draws.noise, draws.segment, self.segments)
        return partial(distillation_loss, batch=batch, sample=sample)


@dataclass(frozen=True, eq=False)
class StudentValidation(FlowValidation):
    """The distance from a teacher's solution on fixed pairs and noise of the val split, and clips.

    Attributes:
        learned: the points and mean velocities of the pairs, on the CPU.
    """

    learned: PathSample | None = None

    def sample(self, target: Tensor, rows: slice) -> PathSample:
        assert self.learned is not None
        return PathSample(self.learned.x_t[rows].to(self.device), self.learned.velocity[rows].to(self.device))


def open_student_validation(
    config: RiverConfig,
    cache_url: str | Path,
    device: torch.device,
    teacher: nn.Module,
    segments: Segments,
    standardization: Standardization,
) -> StudentValidation | None:
    """As `open_flow_validation`; the teacher's solutions are computed here, once.

    Args:
        standardization: on the device, of teacher and student.
    """
    of_flow = open_flow_validation(config, cache_url, device)
    if of_flow is None:
        return None
    batch, noise = of_flow.batch, of_flow.draws.noise
    segment = (of_flow.draws.t * segments.count).long()  # stratified, as the times are
    parts = []
    with computing_in("fp32", device):
        for first in range(0, len(noise), of_flow.pairs_at_once):
            rows = slice(first, first + of_flow.pairs_at_once)
            frames = (
                standardization.to_final(x[rows].to(device)) for x in (batch.target, batch.reference, batch.condition)
            )
            part = FlowBatch(*frames, batch.distance[rows].to(device))
            parts.append(distillation_sample(teacher, part, noise[rows].to(device), segment[rows].to(device), segments))
    x_t, velocity, t = (torch.cat([getattr(part, name).cpu() for part in parts]) for name in ("x_t", "velocity", "t"))
    clips = of_flow.clips
    if clips is not None:
        sampling = clips.sampling.model_copy(
            update={"steps": segments.count, "warm_start": segments.student.warm_start}
        )
        clips = replace(clips, sampling=sampling)
    return StudentValidation(
        batch=batch,
        draws=replace(of_flow.draws, t=t),
        device=device,
        pairs_at_once=of_flow.pairs_at_once,
        clips=clips,
        learned=PathSample(x_t, velocity),
    )
