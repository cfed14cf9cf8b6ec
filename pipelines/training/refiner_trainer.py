"""The refiner's training: from the store and the raw videos to a network that refines decoded frames."""

from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

import latent_cache
from latent_cache import StoreError
from pipelines.config import RiverConfig, result_settings
from pipelines.data.datasets import open_videos
from pipelines.encoding.store_checks import check_sources
from pipelines.errors import UserError
from pipelines.evaluation.metrics import psnr
from pipelines.evaluation.networks import VideoNetwork
from pipelines.loading import find_autoencoder, load_trained_autoencoder, weights_digest
from pipelines.prediction.rollouts import refine_frames
from pipelines.runtime.checkpoints import Checkpoint, Tensors
from pipelines.runtime.context import RunContext, image_memory_format, use_precision
from pipelines.runtime.distributed import ALONE, Processes
from pipelines.runtime.files import file_sha256
from pipelines.runtime.progress import say
from pipelines.runtime.status import Status
from pipelines.runtime.train_state import TrainState
from pipelines.training.refiner_clips import ClipBatch, RefinerClips
from pipelines.training.training_loop import LoopSettings, StepResult, Trainer
from pipelines.training.training_run import TrainingPlan, train, training_status
from stage1_autoencoder.autoencoder import Autoencoder, image_to_unit
from stage1_autoencoder.rcan import RCAN
from stage1_autoencoder.training import learning_rate_factor
from stage1_autoencoder.videos.source import VideoSource

# Batch sizes: frames through the autoencoder, clips in validation.
FRAMES_AT_ONCE = 64
CLIPS_AT_ONCE = 4


def train_refiner(config: RiverConfig, run_context: RunContext) -> Checkpoint:
    """Train the refiner to its last step, or recognise that this was done.

    Returns:
        The checkpoint to use: the best by validation if one was measured, else the last.
    Raises:
        UserError: no autoencoder; a checkpoint that conflicts with the configuration, the autoencoder or the store;
            videos that are not those of the store, or all too short; gradients that are not finite.
        StoreError: no complete store.
        StoppedBySignal: after SIGINT or SIGTERM, with a checkpoint saved.
    """
    processes, plan = run_context.processes, refiner_plan(config)

    def open_trainer(found: Checkpoint | None, held: ExitStack) -> tuple[Trainer, LoopSettings, str]:
        training = config.refiner.training
        processes.check_batch(training.batch_size, training.accumulate, "refiner.training.batch_size")
        autoencoder = _load_autoencoder(config, run_context.device)
        with processes.first_before_others():
            splits = open_videos(config, run_context)
        check_sources(config, splits)
        perceptual = None
        if training.perceptual_network is not None:
            perceptual = VideoNetwork(
                training.perceptual_network, run_context.device, "refiner.training.perceptual_network"
            )
        clips = held.enter_context(closing(_open_clips(config, run_context, splits["train"], "train")))
        validation = _open_validation(config, run_context, splits.get("val")) if processes.is_first else None
        use_precision(training.precision)
        trainer = RefinerTrainer(
            config,
            run_context.device,
            autoencoder,
            clips,
            perceptual=perceptual,
            validation=validation,
            state=plan.state,
            processes=processes,
        )
        sentence = (
            f"{trainer.model.parameter_count / 1e6:.2f} M parameters, batch {training.batch_size} of {clips.count} "
            f"clips of {training.clip_frames} frames, {training.precision}"
        )
        return trainer, loop_settings(config, validation is not None), sentence

    return train(plan, config, run_context, open_trainer)


def refiner_status(config: RiverConfig) -> Status:
    """How far the refiner is: its newest checkpoint against the configuration, the autoencoder and the store."""
    return training_status(refiner_plan(config))


def refiner_plan(config: RiverConfig) -> TrainingPlan:
    """The training of this configuration on this store. What is missing of the inputs is not compared."""
    training, inputs = config.refiner.training, {}
    autoencoder = find_autoencoder(config.run_path)
    if autoencoder is not None:
        inputs["autoencoder"] = weights_digest(load_trained_autoencoder(autoencoder, torch.device("cpu")))
    try:
        if latent_cache.is_complete(config.store_path):
            inputs["store"] = {"fingerprint": latent_cache.open(config.store_path, "train").fingerprint}
    except StoreError:  # which the store's own status tells
        pass
    if training.perceptual_network is None:
        inputs["perceptual"] = None
    elif (file := Path(training.perceptual_network).expanduser()).is_file():
        inputs["perceptual"] = {"sha256": file_sha256(file)}
    return TrainingPlan(
        name="refiner",
        folder=config.run_path / "refiner",
        steps=training.steps,
        keep=training.keep_checkpoints,
        identity={"seed": config.seed, "refiner": result_settings(config.refiner)},
        settings={"seed": config.seed, "refiner": config.refiner.model_dump(mode="json")},
        inputs=inputs,
        less_memory="Compute each batch in parts (refiner.training.accumulate=2), or lower refiner.training.batch_size",
    )


def loop_settings(config: RiverConfig, validated: bool) -> LoopSettings:
    """How the refiner's loop runs; `validated`: whether there are validation clips."""
    training = config.refiner.training
    return LoopSettings(
        name="refiner",
        steps=training.steps,
        checkpoint_every=training.checkpoint_every,
        validate_every=training.validate_every,
        log_every=config.logging.every,
        best="validation_psnr" if validated else None,
        advice="Lower refiner.training.learning_rate, set refiner.training.grad_clip=1, or take precision fp32",
    )


@dataclass(frozen=True)
class RefinerExample:
    """Clips as the refiner sees them in training, n = t - 1 frames each.

    Attributes:
        previous: [b, n, 3, h, w] in [-1, 1], the true previous frame of each.
        decoded: [b, n, 3, h, w], the decoded stored latent of each, not clamped.
        truth: [b, n, 3, h, w] in [-1, 1], the targets.
    """

    previous: Tensor
    decoded: Tensor
    truth: Tensor


class RefinerTrainer(Trainer):
    """The refiner, its optimizers and averaged copy."""

    def __init__(
        self,
        config: RiverConfig,
        device: torch.device,
        autoencoder: Autoencoder,
        clips: RefinerClips,
        *,
        perceptual: VideoNetwork | None = None,
        validation: ClipBatch | None = None,
        state: dict[str, Any] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """Initialize everything from the configuration's seed.

        Args:
            autoencoder: in eval mode on the device; decodes the clips' latents.
            clips: source of the training clips.
            perceptual: network of the perceptual loss term, if any.
            validation: clips to validate on, in rank 0.
            state: further JSON of the checkpoints.
        """
        self.config, self.training, self.device = config, config.refiner.training, device
        self.autoencoder, self.clips, self.perceptual = autoencoder, clips, perceptual
        self.validation, self.checkpoint_state, self.processes = validation, state or {}, processes
        torch.manual_seed(config.seed)
        self.model = RCAN(config.refiner.model)
        if self.training.start == "copy":
            self.model.start_as_copy()
        self.model.to(device, memory_format=image_memory_format(device))
        settings = self.training.model_copy(update={"learning_rate": self.training.peak_learning_rate})
        self.train_state = TrainState(self.model, settings, self.model.boundary_parameters())
        self.network = processes.distribute(self.model, device)

    @property
    def learning_rate(self) -> float:
        return self.train_state.learning_rate

    def train_step(self, step: int) -> StepResult:
        """One update on this process's rows of the step's clips."""
        batch = self.clips.batch(step, self.processes.rows(self.training.batch_size))
        count = self.training.accumulate
        parts = zip(batch.pixels.chunk(count), batch.latents.chunk(count), strict=True)
        self.model.train()
        terms = []
        for number, (pixels, latents) in enumerate(parts):
            example = make_example(self.autoencoder, pixels.to(self.device), latents.to(self.device))
            with self.processes.without_exchange(self.network, number < count - 1):
                terms.append(self._backward(example, 1 / count))
        training = self.training
        finite = self.train_state.apply(learning_rate_factor(step, warmup=training.warmup, total=training.steps))
        return StepResult({name: torch.stack([part[name] for part in terms]).mean() for name in terms[0]}, finite)

    def _backward(self, example: RefinerExample, scale: float) -> dict[str, Tensor]:
        """Backward pass of the loss times `scale`; returns its terms."""
        clips = len(example.truth)
        previous, decoded = (rearrange(x, "b n c h w -> (b n) c h w") for x in (example.previous, example.decoded))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.training.precision == "bf16"):
            refined = self.network(previous, decoded)
        refined = rearrange(refined.float(), "(b n) c h w -> b n c h w", b=clips)
        distance = F.mse_loss if self.training.loss == "mse" else F.l1_loss
        terms = {self.training.loss: distance(refined, example.truth)}
        loss = terms[self.training.loss]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual.distance(refined, example.truth)
            loss = loss + self.training.perceptual_weight * terms["perceptual"]
        (scale * loss).backward()
        return {name: term.detach() for name, term in ({"loss": loss} | terms).items()}

    def describe_batch(self, step: int) -> str:
        return self.clips.describe(step)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """PSNR of fixed clips refined as in use (each frame given the refined previous one), and unrefined."""
        if self.validation is None:
            return {}
        model = self.train_state.best_model.eval()
        refined, unrefined = [], []
        clips = zip(self.validation.pixels.split(CLIPS_AT_ONCE), self.validation.latents.split(CLIPS_AT_ONCE),
                    strict=True)  # fmt: skip
        for pixels, latents in clips:
            example = make_example(self.autoencoder, pixels.to(self.device), latents.to(self.device))
            truth = example.truth.flatten(0, 1)
            frames = refine_frames(model, example.previous[:, 0], example.decoded)
            refined.append(psnr(frames.flatten(0, 1), truth))
            unrefined.append(psnr(example.decoded.flatten(0, 1), truth))
        measured = {
            "validation_psnr": torch.cat(refined).mean().item(),
            "validation_psnr_unrefined": torch.cat(unrefined).mean().item(),
        }
        say(
            f"refiner: step {step}: validation PSNR {measured['validation_psnr']:.2f} dB refined, "
            f"{measured['validation_psnr_unrefined']:.2f} dB unrefined"
        )
        return measured

    def files(self) -> dict[str, Tensors]:
        """The tensors of a checkpoint: what resuming and refining need."""
        return self.train_state.files()

    def state(self) -> dict[str, Any]:
        return self.checkpoint_state | {"model": self.config.refiner.model.model_dump(mode="json")}

    def load(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint of the same configuration."""
        self.train_state.load(checkpoint, self.device)


@torch.no_grad()
def make_example(autoencoder: Autoencoder, pixels: Tensor, latents: Tensor) -> RefinerExample:
    """Decode clips' latents as prediction does: quantized to their nearest codes first.

    Args:
        pixels: [b, t, h, w, 3] uint8; `latents`: [b, t, c, y, x] of the same frames; both on the autoencoder's device.
    """
    frames = image_to_unit(pixels)
    wanted = rearrange(latents[:, 1:], "b n c y x -> (b n) c y x")
    decoded = torch.cat([autoencoder.decode(part) for part in wanted.split(FRAMES_AT_ONCE)])
    return RefinerExample(
        previous=frames[:, :-1],
        decoded=rearrange(decoded, "(b n) c h w -> b n c h w", b=len(frames)),
        truth=frames[:, 1:],
    )


def _load_autoencoder(config: RiverConfig, device: torch.device) -> Autoencoder:
    checkpoint = find_autoencoder(config.run_path)
    if checkpoint is None:
        raise UserError(
            f"{config.run_path}/autoencoder/checkpoints holds no checkpoint, and a refiner is trained on what the "
            f"autoencoder decodes: bring the one back that encoded {config.store_path}, or train one and encode again "
            "(`train-autoencoder`, `encode --overwrite`)"
        )
    return load_trained_autoencoder(checkpoint, device)


def _open_clips(config: RiverConfig, run_context: RunContext, source: VideoSource, split: str) -> RefinerClips:
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


def _open_validation(config: RiverConfig, run_context: RunContext, source: VideoSource | None) -> ClipBatch | None:
    """The fixed clips of validation; None, with a message, if no video of the split is long enough."""
    if source is None or "val" not in latent_cache.splits(config.store_path):
        return None
    if latent_cache.open(config.store_path, "val").lengths.max() < config.refiner.training.clip_frames:
        say("refiner: no validation: all videos of the val split are shorter than refiner.training.clip_frames")
        return None
    with closing(_open_clips(config, run_context, source, "val")) as clips:
        return clips.batch(0)
