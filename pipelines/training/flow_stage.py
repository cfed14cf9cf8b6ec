"""`train-flow`: stage 2, from the store alone to a checkpoint of the vector field."""

from contextlib import ExitStack, closing
from pathlib import Path

import latent_cache
from latent_cache import LatentCache, Sampler, open_sampler
from pipelines.config import RiverConfig, differences
from pipelines.encoding.encode_store import ensure_store
from pipelines.encoding.store_checks import store_is_complete
from pipelines.errors import UserError
from pipelines.runtime.checkpoints import Checkpoint
from pipelines.runtime.context import RunContext, resolve_precision, use_precision
from pipelines.runtime.logs import TrainingLog
from pipelines.runtime.progress import say, warn
from pipelines.runtime.runs import (
    chosen_checkpoint,
    describe_progress,
    is_fine_tuned,
    is_finished,
    is_imported,
    only_training_of,
    resumable_checkpoint,
    write_run_files,
)
from pipelines.training.fine_tuning import fine_tune, finish_beginning
from pipelines.training.flow_trainer import (
    FlowTrainer,
    compiles,
    flow_identity,
    flow_settings,
    flow_state,
    records_steps,
    standardization_in,
)
from pipelines.training.flow_validation import open_flow_validation
from pipelines.training.training_loop import LoopSettings, explain_out_of_memory, run_training
from stage2_flow.vector_field import POSITIONS

LESS_MEMORY = (
    "Compute each batch in parts (flow.training.accumulate=2), lower flow.training.batch_size, take "
    "flow.training.precision=bf16, or keep the latents elsewhere (cache.residency=host)"
)


def train_flow(config: RiverConfig, run_context: RunContext) -> Checkpoint:
    """Train the vector field to its last step, or recognise that this was done; makes the store first when it lacks.

    With `run_context.fine_tune` the first weights are those of the flow that is there, see `fine_tuning`.

    Returns:
        The checkpoint to use: the best by validation where one was measured, else the last.
    Raises:
        UserError: a checkpoint that contradicts the configuration or the store; nothing to fine-tune; settings that
            fit neither store nor device; losses that are not finite; no memory left.
        StoppedBySignal: after SIGINT or SIGTERM, with a checkpoint saved.
    """
    training, processes = config.flow.training, run_context.processes
    folder = config.run_path / "flow"
    settings = flow_settings(config)
    with processes.first_before_others():
        finish_beginning(folder)
    if run_context.fine_tune:
        run_context = fine_tune(config, run_context)
    with processes.first_before_others():
        checkpoints, found = resumable_checkpoint(
            folder,
            flow_identity(config),
            keep=training.keep_checkpoints,
            run_context=run_context,
            what="flow",
            settings=settings,
            way_out="begin a fine-tuning with the weights that are there (`train-flow --fine-tune --restart`), ",
        )
    finished = found is not None and is_finished(found, training.steps)
    if found is not None and is_imported(found):  # it was trained elsewhere, on no store of ours
        _warn_of_another_store(found, config.store_path)
    elif not finished or config.store_path.exists():
        _check_settings(config, run_context)
        cache = latent_cache.open(ensure_store(config, run_context), "train")
        if found is not None:
            _check_same_store(found, cache)
    if finished:
        missing = "" if is_imported(found) or config.store_path.exists() else " (its store is not here)"
        say(f"flow: done, {describe_progress(found)}, {found.path}{missing}")
        if run_context.fine_tune:
            say("flow: to fine-tune it once more: `train-flow --fine-tune --restart`")
        return chosen_checkpoint(folder)

    sampler = _open_sampler(config, run_context, cache)
    with closing(sampler), ExitStack() as held, explain_out_of_memory("flow", LESS_MEMORY):
        _check_data(config, cache, sampler, found)
        validation, log = None, None
        if processes.is_first:
            write_run_files(config, run_context.device)
            held.enter_context(only_training_of(folder))
            validation = open_flow_validation(config, cache.url, run_context.device)
        use_precision(resolve_precision(training.precision, run_context.device))
        trainer = FlowTrainer(
            config,
            run_context.device,
            cache,
            sampler,
            validation=validation,
            samples=folder / "samples",
            standardization=None if found is None else standardization_in(found),
            processes=processes,
        )
        trainer.checkpoint_state = {"order": sampler.order, **flow_state(config, cache, trainer.standardization)}
        first_step = 0
        if found is not None:
            trainer.load(found)
            first_step = found.step
            if is_fine_tuned(found):
                trainer.checkpoint_state["fine_tuned_from"] = found.state["fine_tuned_from"]
            if found.state.get("settings", settings)["flow"]["training"]["steps"] != training.steps:
                say(f"flow: the learning rate takes the course of a training of {training.steps} steps from here on")
        say(_first_line(config, run_context, trainer, sampler, first_step, folder))
        if first_step == 0 and found is not None and validation is not None:
            before = validation.measure(trainer.train_state.best_model, trainer.standardization)["validation_loss"]
            say(f"flow: {describe_progress(found)}: validation loss {before:.4f}")
        if processes.is_first:
            log = held.enter_context(closing(TrainingLog(folder, config, "flow", first_step)))
        run_training(trainer, _loop_settings(config, validation is not None), log, checkpoints, first_step, processes)
    return chosen_checkpoint(folder)


def _loop_settings(config: RiverConfig, validated: bool) -> LoopSettings:
    training = config.flow.training
    return LoopSettings(
        name="flow",
        steps=training.steps,
        checkpoint_every=training.checkpoint_every,
        validate_every=training.validate_every,
        log_every=config.logging.every,
        best="validation_loss" if validated and training.best_by == "loss" else None,
        lowest=True,
        advice="Lower flow.training.learning_rate, set flow.training.grad_clip=1, or take precision fp32",
        max_bad_steps=training.max_bad_steps,
        less_memory=LESS_MEMORY,
    )


def _open_sampler(config: RiverConfig, run_context: RunContext, cache: LatentCache) -> Sampler:
    training = config.flow.training
    return open_sampler(
        cache,
        run_context.device,
        config.seed,
        training.batch_size,
        training.clip_frames,
        residency=config.cache.residency,
        memory_budget=config.cache.memory_budget_bytes,
        past_horizon=training.past_horizon,
    )


def _first_line(
    config: RiverConfig, run_context: RunContext, trainer: FlowTrainer, sampler: Sampler, first_step: int, folder: Path
) -> str:
    """What is trained, on what, where and how."""
    training, processes = config.flow.training, run_context.processes
    many = f" x {processes.count}" if processes.count > 1 else ""
    switches = [trainer.precision]
    switches += ["compiled"] if compiles(training, run_context.device) else []
    switches += ["CUDA graph"] if records_steps(training, run_context.device, processes) else []
    return (
        f"flow: {trainer.model.parameter_count / 1e6:.1f} M parameters, steps {first_step} to {training.steps}, "
        f"batch {training.batch_size} of {sampler.legal_targets} targets, {sampler.describe()}, "
        f"{run_context.device}{many}, {', '.join(switches)} -> {folder}"
    )


def _check_settings(config: RiverConfig, run_context: RunContext) -> None:
    """Refuse settings that don't fit the device or the number of processes.

    Raises:
        UserError: says which key to change.
    """
    training, processes = config.flow.training, run_context.processes
    processes.check_batch(training.batch_size, training.accumulate, "flow.training.batch_size")
    if (
        processes.count > 1
        and run_context.device.type == "cpu"
        and config.flow.model.head == "bn"
        and processes.is_first
    ):
        warn("flow.model.head: bn: on CPUs each process normalises with the statistics of its own rows")
    try:
        records_steps(training, run_context.device, processes)
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_data(config: RiverConfig, cache: LatentCache, sampler: Sampler, found: Checkpoint | None) -> None:
    """Refuse a store that the settings don't fit; say what is out of the ordinary.

    Raises:
        UserError: fewer targets than a batch has rows; latents of more places than the field has codes for.
    """
    training = config.flow.training
    if sampler.legal_targets < training.batch_size:
        raise UserError(
            f"{cache.url}, split 'train': {sampler.legal_targets} frames have two frames of their video before them "
            f"and can be a target, fewer than flow.training.batch_size {training.batch_size}: lower it, or encode more "
            "videos"
        )
    if max(cache.latent_shape[1:]) > POSITIONS:
        raise UserError(
            f"{cache.url}: latents of {cache.latent_shape[1]}x{cache.latent_shape[2]}, and the vector field has codes "
            f"for {POSITIONS} places a side: encode smaller frames (dataset.image_size)"
        )
    short, longest = int((cache.lengths < 3).sum()), int(cache.lengths.max())
    if short:
        say(f"flow: {short} of {len(cache.lengths)} videos have fewer than 3 frames and are not learned from")
    if longest < training.clip_frames:
        say(
            f"flow: clip_frames is {training.clip_frames}, and the longest video has {longest} frames: conditions lie "
            f"at most {longest - 2} frames before the reference"
        )
    horizon, sampled = training.past_horizon, config.sampling.past_horizon
    if horizon is not None and (sampled is None or sampled > horizon):
        warn(
            f"flow.training.past_horizon is {horizon}, and sampling.past_horizon {sampled}: predictions would take "
            f"conditions that the field never saw; set sampling.past_horizon={horizon}"
        )
    order = sampler.order if found is None else found.state.get("order", sampler.order)
    if order != sampler.order:
        warn(
            f"flow: from here on batches come in another order: {sampler.order}, and before {order}. That is as good, "
            "but not what an uninterrupted training would have seen; cache.residency and cache.memory_budget decide it"
        )


def _check_same_store(checkpoint: Checkpoint, cache: LatentCache) -> None:
    before = checkpoint.state["store"]
    if before["fingerprint"] == cache.fingerprint:
        return
    now = {"autoencoder": cache.metadata.autoencoder["sha256"], "fingerprint": cache.fingerprint}
    changed = "\n  ".join(differences(now, {key: before[key] for key in now}))
    raise UserError(
        f"{checkpoint.path} was trained on another store than {cache.url} is now:\n  {changed}\n"
        "train anew with `train-flow --restart` (the old run is set aside), or bring the old store back"
    )


def _warn_of_another_store(imported: Checkpoint, store: Path) -> None:
    """An imported flow predicts without a store; one that is there should have been encoded by its autoencoder."""
    if not store_is_complete(store):
        return
    theirs, ours = latent_cache.open_metadata(store).autoencoder["sha256"], imported.state["store"]["autoencoder"]
    if theirs != ours:
        warn(
            f"flow: {store} was encoded by autoencoder {theirs[:12]}..., and {imported.path} knows latents of "
            f"{ours[:12]}...: encode again with the imported one (`encode --overwrite`), or train a flow on this store "
            "(`train-flow --restart`; the imported one is set aside)"
        )
