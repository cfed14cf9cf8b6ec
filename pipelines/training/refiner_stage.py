"""`train-refiner`: the optional refinement network, from the store and the raw videos."""

from contextlib import ExitStack, closing
from typing import Any

import torch

import latent_cache
from pipelines.config import RiverConfig, differences
from pipelines.data.datasets import open_videos
from pipelines.encoding.encode_store import ensure_store
from pipelines.encoding.store_checks import check_sources
from pipelines.errors import UserError
from pipelines.evaluation.networks import VideoNetwork
from pipelines.loading import find_autoencoder, load_trained_autoencoder, weights_digest
from pipelines.runtime.checkpoints import Checkpoint, CheckpointFolder
from pipelines.runtime.context import RunContext, use_precision
from pipelines.runtime.logs import TrainingLog
from pipelines.runtime.progress import say
from pipelines.runtime.runs import (
    describe_progress,
    is_finished,
    only_training_of,
    resumable_checkpoint,
    training_identity,
    write_run_files,
)
from pipelines.training.refiner_clips import ClipBatch, RefinerClips
from pipelines.training.refiner_trainer import RefinerTrainer
from pipelines.training.training_loop import LoopSettings, run_training
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.videos.source import VideoSource

# Settings of a training that don't change what it computes, beyond those of all trainings.
COSMETIC = {"validation_clips", "perceptual_network", "accumulate"}


def refiner_identity(config: RiverConfig, autoencoder_digest: str) -> dict[str, Any]:
    """What the trained refiner depends on besides the store, as plain data."""
    refiner = config.refiner.model_dump(mode="json", exclude={"training": COSMETIC})
    perceptual = config.refiner.training.perceptual_network is not None
    return training_identity(
        {"seed": config.seed, "refiner": refiner, "perceptual": perceptual, "autoencoder": autoencoder_digest}
    )


def train_refiner(config: RiverConfig, run_context: RunContext) -> Checkpoint:
    """Train the refiner to its last step, or recognise that this was done; makes the store first when it lacks.

    Returns:
        The checkpoint to use: the best by validation where one was measured, else the last.
    Raises:
        UserError: a checkpoint that contradicts the configuration, the autoencoder or the store; videos that are not
            those of the store, or all too short; gradients that are not finite.
        StoppedBySignal: after SIGINT or SIGTERM, with a checkpoint saved.
    """
    training, processes = config.refiner.training, run_context.processes
    folder = config.run_path / "refiner"
    before = CheckpointFolder(folder / "checkpoints").latest()
    done = before is not None and is_finished(before, training.steps) and not run_context.restart
    if not done:
        ensure_store(config, run_context)
    autoencoder = _autoencoder(config, run_context.device)
    digest = weights_digest(autoencoder)
    identity = refiner_identity(config, digest)
    with processes.first_before_others():
        checkpoints, found = resumable_checkpoint(
            folder,
            identity,
            keep=training.keep_checkpoints,
            run_context=run_context,
            what="refiner",
        )
        if done:
            say(f"refiner: done, {describe_progress(found)}, {found.path}")
            return _chosen(checkpoints)
        processes.check_batch(training.batch_size, training.accumulate, "refiner.training.batch_size")
        splits = open_videos(config, run_context)
    check_sources(config, splits)
    perceptual = None
    if training.perceptual_network is not None:
        perceptual = VideoNetwork(
            training.perceptual_network, run_context.device, "refiner.training.perceptual_network"
        )
    state = {
        "identity": identity,
        "autoencoder": digest,
        "store": {"fingerprint": latent_cache.open(config.store_path, "train").fingerprint},
        "perceptual": None if perceptual is None else {"sha256": perceptual.sha256},
    }
    if found is not None:
        _check_same_inputs(found, state)
    with closing(_clips(config, run_context, splits["train"], "train")) as clips, ExitStack() as held:
        validation, log = None, None
        if processes.is_first:
            write_run_files(config, run_context.device)
            held.enter_context(only_training_of(folder))
            validation = _validation(config, run_context, splits.get("val"))
        use_precision(training.precision)
        trainer = RefinerTrainer(
            config,
            run_context.device,
            autoencoder,
            clips,
            perceptual=perceptual,
            validation=validation,
            state=state,
            processes=processes,
        )
        first_step = 0
        if found is not None:
            trainer.load(found)
            first_step = found.step
        say(
            f"refiner: {trainer.model.parameter_count / 1e6:.2f} M parameters, steps {first_step} to {training.steps}, "
            f"batch {training.batch_size} of {clips.count} clips of {training.clip_frames} frames, {run_context.device}"
            f"{f' x {processes.count}' if processes.count > 1 else ''}, {training.precision} -> {folder}"
        )
        if processes.is_first:
            log = held.enter_context(closing(TrainingLog(folder, config, "refiner", first_step)))
        run_training(trainer, _loop_settings(config, validation), log, checkpoints, first_step, processes)
    return _chosen(checkpoints)


def _chosen(checkpoints: CheckpointFolder) -> Checkpoint | None:
    return checkpoints.best() or checkpoints.latest()


def _autoencoder(config: RiverConfig, device: torch.device) -> Autoencoder:
    checkpoint = find_autoencoder(config.run_path)
    if checkpoint is None:
        raise UserError(
            f"{config.run_path}/autoencoder/checkpoints holds no checkpoint, and a refiner is trained on what the "
            f"autoencoder decodes: bring the one back that encoded {config.store_path}, or train one and encode again "
            "(`train-autoencoder`, `encode --overwrite`)"
        )
    return load_trained_autoencoder(checkpoint, device)


def _loop_settings(config: RiverConfig, validation: ClipBatch | None) -> LoopSettings:
    training = config.refiner.training
    return LoopSettings(
        name="refiner",
        steps=training.steps,
        checkpoint_every=training.checkpoint_every,
        validate_every=training.validate_every,
        log_every=config.logging.every,
        best=None if validation is None else "validation_psnr",
        advice="Lower refiner.training.learning_rate, set refiner.training.grad_clip=1, or take precision fp32",
    )


def _check_same_inputs(found: Checkpoint, state: dict[str, Any]) -> None:
    """Refuse to go on with another store or another perceptual network."""
    keys = ("store", "perceptual")
    changed = differences({key: state[key] for key in keys}, {key: found.state[key] for key in keys})
    if changed:
        raise UserError(
            f"{found.path} was trained with other inputs than there are now:\n  " + "\n  ".join(changed)
            + "\ntrain anew with `train-refiner --restart` (the old run is set aside), or bring the old ones back"
        )  # fmt: skip


def _clips(config: RiverConfig, run_context: RunContext, source: VideoSource, split: str) -> RefinerClips:
    training, train = config.refiner.training, split == "train"
    return RefinerClips(
        source,
        latent_cache.open(config.store_path, split),
        clip_frames=training.clip_frames,
        batch_size=training.batch_size if train else training.validation_clips,
        steps=training.steps if train else 1,
        seed=config.seed,
        memory=config.cache.memory_budget_bytes if train else 0,
        on_broken=lambda error: run_context.skip(error.video_id, error.reason),
    )


def _validation(config: RiverConfig, run_context: RunContext, source: VideoSource | None) -> ClipBatch | None:
    """The clips that every validation looks at; none where the split has no video that is long enough."""
    if source is None or "val" not in latent_cache.splits(config.store_path):
        return None
    if latent_cache.open(config.store_path, "val").lengths.max() < config.refiner.training.clip_frames:
        say("refiner: no validation: all videos of the val split are shorter than a clip")
        return None
    with closing(_clips(config, run_context, source, "val")) as clips:
        return clips.batch(0)
