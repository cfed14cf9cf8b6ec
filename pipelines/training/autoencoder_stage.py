"""`train-autoencoder`: stage 1, from videos to an autoencoder's checkpoint."""

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from latent_cache import step_generator
from pipelines.config import RiverConfig, parse_size
from pipelines.data.datasets import open_videos
from pipelines.errors import UserError
from pipelines.evaluation.networks import load_lpips, missing_weights_message
from pipelines.loading import _chosen
from pipelines.runtime.checkpoints import Checkpoint, CheckpointFolder
from pipelines.runtime.context import RunContext, use_precision
from pipelines.runtime.logs import TrainingLog
from pipelines.runtime.progress import say, warn
from pipelines.runtime.runs import (
    describe_progress,
    is_finished,
    only_training_of,
    resumable_checkpoint,
    training_identity,
    write_run_files,
)
from pipelines.training.autoencoder_trainer import AutoencoderTrainer, Validation
from pipelines.training.training_loop import LoopSettings, run_training
from stage1_autoencoder.autoencoder import image_to_unit
from stage1_autoencoder.config import AutoencoderTrainingConfig
from stage1_autoencoder.frame_pool import FramePool
from stage1_autoencoder.lpips import LPIPS, SMALLEST_SIDE
from stage1_autoencoder.videos.source import BrokenVideoError, VideoSource


def autoencoder_identity(config: RiverConfig) -> dict[str, Any]:
    """What the trained autoencoder depends on, as plain data."""
    dataset = config.dataset.model_dump(mode="json", exclude={"name", "root"})
    return training_identity(
        {"seed": config.seed, "autoencoder": config.autoencoder.model_dump(mode="json"), "dataset": dataset}
    )


def train_autoencoder(config: RiverConfig, run_context: RunContext) -> Checkpoint:
    """Train the autoencoder to its last step, or recognise that this was done.

    Returns:
        The checkpoint to use: the best by validation where one was measured, else the last.
    Raises:
        UserError: no videos; a checkpoint that contradicts the configuration; gradients that are not finite.
        StoppedBySignal: after SIGINT or SIGTERM, with a checkpoint saved.
    """
    processes = run_context.processes
    folder = config.run_path / "autoencoder"
    with processes.first_before_others():
        config, perceptual = _with_perceptual_network(
            config, run_context, CheckpointFolder(folder / "checkpoints").latest()
        )
        training, identity = config.autoencoder.training, autoencoder_identity(config)
        checkpoints, found = resumable_checkpoint(
            folder,
            identity,
            keep=training.keep_checkpoints,
            run_context=run_context,
            what="autoencoder",
        )
        if found is not None and is_finished(found, training.steps):
            say(f"autoencoder: done, {describe_progress(found)}, {found.path}")
            return _chosen(checkpoints)
        processes.check_batch(training.batch_size, training.accumulate, "autoencoder.training.batch_size")
        splits = open_videos(config, run_context)
    pool = FramePool(
        splits["train"],
        batch_size=training.batch_size,
        steps=training.steps,
        memory=parse_size(training.pool_memory),
        seed=config.seed,
        on_broken=lambda error: run_context.skip(error.video_id, error.reason),
    )
    with closing(pool), ExitStack() as held:
        validation, log = None, None
        if processes.is_first:
            write_run_files(config, run_context.device)
            held.enter_context(only_training_of(folder))
            validation = _validation(config, run_context, splits.get("val"), folder)
        use_precision(training.precision)
        trainer = AutoencoderTrainer(
            config,
            run_context.device,
            pool,
            perceptual=perceptual,
            validation=validation,
            identity=identity,
            processes=processes,
        )
        first_step = 0
        if found is not None:
            trainer.load(found)
            first_step = found.step
        say(
            f"autoencoder: {trainer.model.parameter_count / 1e6:.1f} M parameters, steps {first_step} to "
            f"{training.steps}, batch {training.batch_size}, {describe_loss(training)}, {run_context.device}"
            f"{f' x {processes.count}' if processes.count > 1 else ''}, {training.precision} -> {folder}"
        )
        if processes.is_first:
            log = held.enter_context(closing(TrainingLog(folder, config, "autoencoder", first_step)))
        run_training(trainer, _loop_settings(config, validation), log, checkpoints, first_step, processes)
    return _chosen(checkpoints)


def describe_loss(training: AutoencoderTrainingConfig) -> str:
    """The terms of the loss in a few words, for people."""
    words = [name for name, weight in (("L1", training.l1_weight), ("L2", training.l2_weight)) if weight]
    if training.perceptual != "none" and training.perceptual_weight:
        words.append("LPIPS")
    words.append("codebook")
    if training.adversarial.weight:
        words.append(f"adversarial from step {training.adversarial.start}")
    return " + ".join(words)


def _loop_settings(config: RiverConfig, validation: Validation | None) -> LoopSettings:
    training = config.autoencoder.training
    best = training.best_by
    if best == "auto":
        # Adversarial training costs PSNR and is worth it: there PSNR alone would choose what came before it.
        by_psnr = "last" if training.adversarial.weight else "psnr"
        best = "lpips" if training.perceptual == "lpips" else by_psnr
    return LoopSettings(
        name="autoencoder",
        steps=training.steps,
        checkpoint_every=training.checkpoint_every,
        validate_every=training.validate_every,
        log_every=config.logging.every,
        best=None if best == "last" or validation is None else f"validation_{best}",
        lowest=best == "lpips",
        advice="Lower autoencoder.training.learning_rate, set autoencoder.training.grad_clip, or take precision fp32",
    )


def _with_perceptual_network(
    config: RiverConfig, run_context: RunContext, found: Checkpoint | None
) -> tuple[RiverConfig, LPIPS | None]:
    """LPIPS where the configuration wants it; where its weights lack, the configuration without it, and a warning.

    Raises:
        UserError: `best_by: lpips` without LPIPS; frames too small for it; weights that are named and can't be used.
    """
    training = config.autoencoder.training
    if training.perceptual == "lpips":
        if found is not None and is_finished(found, training.steps) and not run_context.restart:
            before = found.state.get("identity", {}).get("autoencoder", {}).get("training", {})
            if before.get("perceptual") == "none":
                say("autoencoder: it was trained without the perceptual loss, whose weights were not there")
                config = _without_perceptual(config)
            return config, None
        if config.dataset.image_size < SMALLEST_SIDE:
            raise UserError(
                f"autoencoder.training.perceptual: lpips compares images of at least {SMALLEST_SIDE} pixels a side, "
                f"and dataset.image_size is {config.dataset.image_size}: take none, or larger frames"
            )
        network = load_lpips(training.vgg_weights, run_context.device, download=run_context.download)
        if network is not None:
            return config, network
        if run_context.processes.is_first:
            warn(f"autoencoder: {missing_weights_message()}")
        config = _without_perceptual(config)
    if training.best_by == "lpips":
        raise UserError(
            "autoencoder.training.best_by: lpips needs the perceptual network: set autoencoder.training.perceptual to "
            "lpips and have its weights, or take best_by: psnr"
        )
    return config, None


def _without_perceptual(config: RiverConfig) -> RiverConfig:
    training = config.autoencoder.training.model_copy(update={"perceptual": "none"})
    return config.model_copy(update={"autoencoder": config.autoencoder.model_copy(update={"training": training})})


def _validation(
    config: RiverConfig, run_context: RunContext, source: VideoSource | None, folder: Path
) -> Validation | None:
    """A fixed draw of validation frames, one a video in turn; without those of videos that break."""
    if source is None or not source.videos:
        say("autoencoder: no validation videos (dataset.splits), so nothing is measured on the way")
        return None
    wanted = config.autoencoder.training.validation_frames
    generator = step_generator(config.seed, 0, stream="validation frames")
    picks: dict[int, list[int]] = {}
    for i in range(wanted):
        video = i % len(source.videos)
        picks.setdefault(video, []).append(int(torch.randint(source.videos[video].frames, (), generator=generator)))
    frames = []
    for video, positions in picks.items():
        try:
            frames.append(torch.from_numpy(source.read(video, positions)))
        except BrokenVideoError as error:
            run_context.skip(error.video_id, error.reason)
    if not frames:
        return None
    return Validation(image_to_unit(torch.cat(frames)), folder / "reconstructions")
