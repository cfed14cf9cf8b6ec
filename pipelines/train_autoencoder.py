"""`train-autoencoder`: stage 1, from videos to an autoencoder's checkpoint."""

import hashlib
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from latent_cache import step_generator
from pipelines.config import RiverConfig
from pipelines.errors import StoppedBySignal, UserError
from pipelines.metrics import psnr
from pipelines.prepare import open_videos
from pipelines.runtime.checkpoints import Checkpoint, CheckpointFolder
from pipelines.runtime.learner import Learner
from pipelines.runtime.logs import StepTimer, TrainingLog
from pipelines.runtime.progress import duration, progress, say
from pipelines.runtime.runs import only_training_of, resumable_checkpoint, training_identity, write_run_files
from pipelines.runtime.session import Session, image_memory_format
from pipelines.runtime.signals import StopRequest
from pipelines.sizes import parse_size
from stage1_autoencoder.augmentation import augment
from stage1_autoencoder.autoencoder import Autoencoder, image_to_unit
from stage1_autoencoder.config import parse_model_config
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.frames import FramePool
from stage1_autoencoder.training import CodebookCare, autoencoder_loss, learning_rate_factor
from stage1_autoencoder.videos.base import BrokenVideoError, VideoSource


def autoencoder_identity(config: RiverConfig) -> dict[str, Any]:
    """What the trained autoencoder depends on, as plain data."""
    dataset = config.dataset.model_dump(mode="json", exclude={"name", "root"})
    return training_identity(
        {"seed": config.seed, "autoencoder": config.autoencoder.model_dump(mode="json"), "dataset": dataset}
    )


def train_autoencoder(config: RiverConfig, session: Session) -> Checkpoint:
    """Train the autoencoder to its last step, or recognise that this was done.

    Returns:
        The final checkpoint.
    Raises:
        UserError: no videos; a checkpoint that contradicts the configuration; a loss that is not finite.
        StoppedBySignal: after SIGINT or SIGTERM, with a checkpoint saved.
    """
    training = config.autoencoder.training
    folder = config.run_path / "autoencoder"
    identity = autoencoder_identity(config)
    checkpoints, found = resumable_checkpoint(
        folder, identity, keep=training.keep_checkpoints, restart=session.restart, what="autoencoder"
    )
    if found is not None and found.step >= training.steps:
        say(f"autoencoder: done, {found.step} steps, {found.path}")
        return found

    splits = open_videos(config, session)
    write_run_files(config, session.device)
    trainer = AutoencoderTrainer(config, session.device)
    first_step = 0
    if found is not None:
        trainer.load(found)
        first_step = found.step
    say(
        f"autoencoder: {trainer.model.parameter_count / 1e6:.1f} M parameters, steps {first_step} to {training.steps}, "
        f"batch {training.batch_size}, {session.device}, {training.precision} -> {folder}"
    )
    pool = FramePool(
        splits["train"],
        batch_size=training.batch_size,
        steps=training.steps,
        memory=parse_size(training.pool_memory),
        seed=config.seed,
        on_broken=lambda error: session.skip(error.video_id, error.reason),
    )
    with (
        only_training_of(folder),
        closing(pool),
        closing(TrainingLog(folder, config, "autoencoder", first_step)) as log,
    ):
        validation_images = _validation_images(config, session, splits.get("val"))
        _loop(config, trainer, pool, validation_images, log, checkpoints, identity, first_step)
    return checkpoints.latest()


def _loop(
    config: RiverConfig,
    trainer: "AutoencoderTrainer",
    pool: FramePool,
    validation_images: torch.Tensor | None,
    log: TrainingLog,
    checkpoints: CheckpointFolder,
    identity: dict[str, Any],
    first_step: int,
) -> None:
    training = config.autoencoder.training
    timer = StepTimer()
    bar = progress(total=training.steps, initial=first_step, description="autoencoder", unit="step")
    with StopRequest() as stop, bar:
        for step in range(first_step, training.steps):
            losses = trainer.train_step(step, pool.batch(step))
            timer.step()
            bar.update()
            done = step + 1
            last = done == training.steps
            saves = done % training.checkpoint_every == 0 or last or bool(stop)
            validates = validation_images is not None and (done % training.validate_every == 0 or last)
            logs = done % config.logging.every == 0 or validates or last
            # The only places where the host waits for the device. What is saved was looked at first.
            if (logs or saves) and not all(map(torch.isfinite, losses.values())):
                terms = ", ".join(f"{name} {value.item():g}" for name, value in losses.items())
                raise UserError(
                    f"autoencoder: the loss is not finite at step {done} ({terms}); the last checkpoint is kept. Lower "
                    "autoencoder.training.learning_rate, set autoencoder.training.grad_clip, or take precision fp32"
                )
            if logs:
                record = {"step": done, **{name: value.item() for name, value in losses.items()}}
                rate = timer.rate()
                record |= {"learning_rate": trainer.learner.learning_rate, "steps_per_second": rate}
                if done - first_step <= config.logging.every:
                    say(f"autoencoder: {rate:.2f} steps/s, about {duration((training.steps - done) / rate)} to go")
                if validates:
                    record |= trainer.validate(validation_images)
                    say(f"autoencoder: step {done}: validation PSNR {record['validation_psnr']:.2f} dB, "
                        f"{record['validation_codes']} codes in use")  # fmt: skip
                log.write(record)
                bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
            if saves:
                path = checkpoints.save(done, trainer.files(), {"identity": identity, "model": trainer.model_state()})
                if stop:
                    raise StoppedBySignal(
                        stop.signal_number, f"stopped at step {done}, saved {path}; the same command goes on from there"
                    )


class AutoencoderTrainer:
    """Model and codebook care; one call a step."""

    def __init__(self, config: RiverConfig, device: torch.device) -> None:
        self.config, self.training, self.device = config, config.autoencoder.training, device
        torch.manual_seed(config.seed)
        self.model = build_autoencoder(config.autoencoder.model).to(device, memory_format=image_memory_format(device))
        self.care = CodebookCare(self.model, self.training.restart_every)
        self.learner = Learner(self.model, self.training, self.model.boundary_parameters())

    def train_step(self, step: int, frames: Any) -> dict[str, torch.Tensor]:
        """One update from frames [b, h, w, 3] uint8; gives the loss terms without waiting for the device."""
        images = image_to_unit(torch.from_numpy(frames).to(self.device, non_blocking=True))
        if not self.training.color_jitter.changes_nothing or self.training.flip:
            draws = step_generator(self.config.seed, step, self.device, "augmentation")
            images = augment(
                images, jitter=self.training.color_jitter.brightness, flip=self.training.flip, generator=draws
            )
        images = images.contiguous(memory_format=image_memory_format(self.device))
        generator = step_generator(self.config.seed, step, self.device, "codes")
        torch.manual_seed(step_generator(self.config.seed, step, stream="dropout").initial_seed())
        self.model.train()
        if step == 0:
            with torch.no_grad():
                self.care.start(self.model.encode(images), generator)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.training.precision == "bf16"):
            output = self.model(images)
        loss = autoencoder_loss(output, images, self.training)
        factor = learning_rate_factor(step, warmup=self.training.warmup_steps, total=self.training.steps)
        self.learner.update(loss.total, factor)
        self.care.after_step(step, output, generator)
        return {
            "loss": loss.total.detach(),
            "l1": loss.l1.detach(),
            "l2": loss.l2.detach(),
            "codebook": loss.codebook.detach(),
        }

    @torch.no_grad()
    def validate(self, images: torch.Tensor) -> dict[str, float]:
        """PSNR of reconstructions of images [n, 3, h, w] in [-1, 1], and how many codes they use."""
        model = self.learner.best_model.eval()
        values, codes = [], []
        for part in images.split(32):
            latents = model.encode(part.to(self.device))
            quantized, chosen = model.quantize(latents)
            values.append(psnr(model.decode_quantized(quantized).cpu(), part))
            codes.append(chosen.flatten())
        return {
            "validation_psnr": torch.cat(values).mean().item(),
            "validation_codes": len(torch.cat(codes).unique()),
        }

    def files(self) -> dict[str, dict[str, torch.Tensor]]:
        """Everything that resuming needs, and everything that using the autoencoder needs."""
        return self.learner.files() | {"codebook": self.care.state()}

    def model_state(self) -> dict[str, Any]:
        return self.config.autoencoder.model.model_dump(mode="json")

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same configuration."""
        self.learner.load(checkpoint, self.device)
        self.care.load_state(checkpoint.tensors("codebook", self.device))


def load_trained_autoencoder(checkpoint: Checkpoint, device: torch.device) -> Autoencoder:
    """The autoencoder of a checkpoint, in eval mode: the averaged weights where there are any."""
    name = "ema" if checkpoint.has("ema") else "model"
    try:
        model = build_autoencoder(parse_model_config(checkpoint.state["model"]))
        model.load_state_dict(checkpoint.tensors(name))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{checkpoint.path}: weights don't fit the sizes in state.json: {error}") from None
    return model.to(device, memory_format=image_memory_format(device)).eval().requires_grad_(False)


def weights_digest(model: torch.nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all weights: what tells autoencoders apart."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def find_autoencoder(run_path: Path) -> Checkpoint | None:
    """The newest autoencoder checkpoint of a run."""
    return CheckpointFolder(run_path / "autoencoder" / "checkpoints").latest()


def _validation_images(config: RiverConfig, session: Session, source: VideoSource | None) -> torch.Tensor | None:
    """A fixed draw of validation frames [n, 3, h, w], one a video in turn; without those of videos that break."""
    if source is None or not source.videos:
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
            session.skip(error.video_id, error.reason)
    return image_to_unit(torch.cat(frames)) if frames else None
