"""The story as data: which stages there are, what each needs, how far it is, and how it is run."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from pipelines.config import RiverConfig
from pipelines.data.datasets import prepare_data, videos_status
from pipelines.encoding.store_checks import store_status
from pipelines.encoding.store_encoder import encode
from pipelines.errors import UserError
from pipelines.evaluation.study.sampler_study import choose_sampler, sampler_status
from pipelines.loading import find_autoencoder
from pipelines.prediction.clips import check_clips
from pipelines.runtime.context import RunContext
from pipelines.runtime.progress import say
from pipelines.runtime.run_folder import describe_progress, describe_run
from pipelines.runtime.status import Status
from pipelines.training.autoencoder_trainer import autoencoder_status, train_autoencoder
from pipelines.training.decoder_trainer import decoder_status, train_decoder
from pipelines.training.flow_trainer import check_flow, flow_status, train_flow, with_precision
from pipelines.training.refiner_trainer import refiner_status, train_refiner
from pipelines.training.step_memory import autoencoder_costs, flow_costs, refiner_costs
from pipelines.training.student_trainer import (
    check_teacher,
    distill,
    find_student,
    find_teacher,
    segments_of,
    settings_of_student,
    student_config,
)
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.fast_decoder import FastDecoder
from stage1_autoencoder.rcan import RCAN
from stage2_flow.vector_field import VectorField


@dataclass(frozen=True)
class Stage:
    """One step of the story.

    Attributes:
        name: as `run_to` takes it.
        needs: stages that must be done before this one can run.
        status: how far it is; raises nothing, writes nothing.
        run: does what is left to do, and says so when nothing is.
        check: refuses what `run` would refuse anyway, before what it needs is built.
    """

    name: str
    needs: tuple[str, ...]
    status: Callable[[RiverConfig], Status]
    run: Callable[[RiverConfig, RunContext], object]
    check: Callable[[RiverConfig, RunContext], object] | None = None


def _check_shared(config: RiverConfig, run_context: RunContext) -> None:
    """Refuse to replace, in the name of one run, what all runs of the data set are made from."""
    if config.run is not None and run_context.asks_for_more:
        raise UserError(
            f"--run {config.run}: all runs of {config.dataset.name} share one autoencoder, its "
            "fast decoder, and one store: leave out "
            "--run to replace these for all of them, or use others with --set dataset.name=..."
        )


def _encode(config: RiverConfig, run_context: RunContext) -> Path:
    if run_context.processes.count > 1:
        raise UserError(f"{config.store_path}: no complete store; run `encode` first, in one process")
    return encode(config, run_context, find_autoencoder(config.shared.run_path))


# Raw videos are fetched only when somebody asks for it (`data`, or --mirror): no stage needs theirs.
STAGES = {
    stage.name: stage
    for stage in (
        Stage("videos", (), videos_status, prepare_data),
        Stage("autoencoder", (), autoencoder_status, train_autoencoder, _check_shared),
        Stage("store", ("autoencoder",), store_status, _encode, _check_shared),
        Stage("flow", ("store",), flow_status, train_flow, check_flow),
        Stage("sampler", ("flow",), sampler_status, choose_sampler),
        Stage("decoder", ("store",), decoder_status, train_decoder, _check_shared),
        Stage("refiner", ("store",), refiner_status, train_refiner),
    )
}


def run_to(name: str, config: RiverConfig, run_context: RunContext) -> None:
    """Run a stage, after everything that it needs and that is not done.

    What is done is recognised, what is partial is resumed. `run_context` asks for more (restart, overwrite, resume,
    fine-tune) of this stage alone, not of what it needs.

    Raises:
        UserError: the stage, or one that it needs, conflicts with the configuration; says both sides and the way out.
    """
    stage, status = STAGES[name], STAGES[name].status(config)
    needs = {need: STAGES[need].status(config) for need in stage.needs}
    for needed in needs.values():
        if needed.state == "conflicting" and not status.standalone:
            raise UserError(needed.detail)
    if status.state == "conflicting" and not run_context.asks_for_more:
        raise UserError(status.detail)
    if not status.is_done or run_context.asks_for_more:
        if stage.check is not None:
            stage.check(config, run_context)
        for need, needed in needs.items():
            if not needed.is_done:
                run_to(need, config, run_context.for_prerequisites())
    stage.run(config, run_context)


# Settings of a teacher by section -> the configuration of its student.
BeginStudent = Callable[[dict[str, Any]], RiverConfig]


def run_to_student(config: RiverConfig, teacher: RiverConfig, begin: BeginStudent, run_context: RunContext) -> None:
    """Distill a student, after its teacher is trained and the teacher's sampler chosen.

    Args:
        config: of the student's run.
        teacher: of its teacher's run.
        begin: for a student that begins.

    Raises:
        UserError: the run has a flow that is no student; the teacher is another one than that which the student began
            with; others as `run_to`.
    """
    _check_names(config, teacher)
    found = None if run_context.restart else find_student(config)
    if found is None:
        if not teacher.sampling.leaves_sampler_open:
            segments_of(config, teacher.sampling)  # refuses, before the teacher is trained
        for name in ("flow", "sampler"):
            run_to(name, teacher, run_context.for_prerequisites())
        known = find_teacher(teacher)
        assert known is not None
        config = begin(settings_of_student(config, teacher, known.flow))
    else:
        known = find_teacher(teacher)
        if known is None and STAGES["flow"].status(config).is_done:
            say(f"distill: done, {describe_progress(found)}, {found.path}")
            return
        known = check_teacher(teacher, found, known)
    distill(config, known, run_context)


def preview_student(
    config: RiverConfig, teacher: RiverConfig, begin: BeginStudent, run_context: RunContext
) -> tuple[RiverConfig, str]:
    """The configuration of the student of `run_to_student`, and how far its teacher is, in words."""
    _check_names(config, teacher)
    known, status = find_teacher(teacher), STAGES["flow"].status(teacher)
    if known is not None and (run_context.restart or find_student(config) is None):
        config = student_config(begin(settings_of_student(config, teacher, known.flow)), known)
    return config, f"{'teacher':12} {status.state:12} {describe_run(teacher.run)}; {status.detail}"


def _check_names(config: RiverConfig, teacher: RiverConfig) -> None:
    if config.run == teacher.run:
        raise UserError(
            f"distillation.teacher: {describe_run(teacher.run)} can't be its own teacher: name another with --teacher, "
            "or the student with --run"
        )


def run_to_prediction(
    config: RiverConfig,
    run_context: RunContext,
    refine: bool = False,
    of_clips: bool = False,
    choose: bool = True,
) -> None:
    """Run all stages that predictions of pixels need.

    Args:
        choose: choose their sampler, too.
        of_clips: predictions will be of the protocol's clips; videos without any are refused before anything is made.

    Raises:
        UserError: the autoencoder of a store or flow that is there is missing, before anything is trained; others as
            `run_to`.
    """
    made = [STAGES[name].status(config) for name in ("store", "flow")]
    if find_autoencoder(config.shared.run_path) is None and any(status.is_done for status in made):
        raise UserError(
            f"{config.training_folder('autoencoder')}/checkpoints holds no checkpoint, and predictions need the "
            f"autoencoder that encoded {config.store_path}: restore it there (imported weights: "
            "`import-official`), or encode another store (--set paths.latents=...)"
        )
    if of_clips and not made[1].is_done and run_context.mirror is None:  # with a mirror the videos come later
        check_clips(config)
    run_to("flow", config, run_context)
    if config.sampling.decoder == "fast" and not refine:
        run_to("decoder", config, run_context)
    if choose:
        run_to("sampler", config, run_context)
    if refine:
        run_to("refiner", config, run_context)


def describe(config: RiverConfig, device: torch.device) -> str:
    """The text of a dry run: sizes of the networks, how far each stage is, what a training step of each takes."""
    with torch.device("meta"):
        autoencoder = build_autoencoder(config.autoencoder.model)
        field = VectorField(config.flow.model, config.autoencoder.model.latent_channels)
        decoder = FastDecoder(config.decoder.model, config.autoencoder.model)
        refiner = RCAN(config.refiner.model)
    h, w = config.dataset.frame_size
    latent_shape = config.autoencoder.model.latent_shape((h, w))
    latents = "x".join(map(str, latent_shape))
    sizes = {
        "videos": f"source {config.dataset.source}",
        "autoencoder": f"{autoencoder.parameter_count / 1e6:.1f} M parameters, frames of {w}x{h} -> latents {latents}",
        "store": str(config.store_path),
        "flow": f"{field.parameter_count / 1e6:.1f} M parameters, {prod(latent_shape[1:]) + 1} tokens",
        "sampler": "solver and evaluations per frame",
        "decoder": f"{decoder.parameter_count / 1e6:.2f} M parameters, optional",
        "refiner": f"{refiner.parameter_count / 1e6:.2f} M parameters, optional",
    }
    costs = {
        "autoencoder": autoencoder_costs(config, device),
        "flow": flow_costs(with_precision(config, device), latent_shape, device),
        "refiner": refiner_costs(config, device),
    }
    lines = []
    for stage in STAGES.values():
        status = stage.status(config)
        lines.append(f"{stage.name:12} {status.state:12} {sizes[stage.name]}; {status.detail}")
        lines += [f"{'':25} {line}" for line in costs.get(stage.name, [])]
    return "\n".join(lines)
