"""The fast decoder's training: from the store and the autoencoder alone to a small network that decodes as it does."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import latent_cache
from latent_cache import LatentCache, step_generator
from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.evaluation.measures.metrics import psnr
from pipelines.loading import autoencoder_digest, find_autoencoder, load_trained_autoencoder
from pipelines.prediction.pictures import save_reconstructions
from pipelines.runtime.checkpoints import Checkpoint
from pipelines.runtime.context import RunContext, computing_in, in_full_precision, training_in
from pipelines.runtime.distributed import ALONE, Processes
from pipelines.runtime.progress import say
from pipelines.runtime.status import Status
from pipelines.runtime.train_state import TrainState
from pipelines.training.training_loop import LoopSettings, StepResult, Trainer, TrainingAmount
from pipelines.training.training_run import TrainingPlan, of_all_runs, plan_training, train, training_status
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.fast_decoder import FastDecoder
from stage1_autoencoder.training import learning_rate_factor

# Frames per call of the networks in validation.
FRAMES_AT_ONCE = 32


def train_decoder(config: RiverConfig, run_context: RunContext) -> Checkpoint:
    """Train the fast decoder to its last step, or recognise that this was done.

    Returns:
        The checkpoint to use: the best by validation if one was measured, else the last.
    Raises:
        UserError: no autoencoder; a checkpoint that conflicts with the configuration or the autoencoder; gradients that
            are not finite.
        StoreError: no complete store.
        StoppedBySignal: after a signal, with a checkpoint saved.
    """
    config = of_all_runs("decoder", config)
    processes, plan = run_context.processes, decoder_plan(config)

    def open_trainer(
        config: RiverConfig, found: Checkpoint | None, held: ExitStack
    ) -> tuple[Trainer, LoopSettings, str]:
        training, checkpoint = config.decoder.training, find_autoencoder(config.run_path)
        processes.check_batch(training.batch_size, 1, "decoder.training.batch_size")
        if checkpoint is None:
            raise UserError(
                f"{config.training_folder('autoencoder')}/checkpoints holds no checkpoint, and a fast decoder imitates "
                f"the autoencoder: restore the one that encoded {config.store_path}"
            )
        validated = processes.is_first and "val" in latent_cache.splits(config.store_path)
        held.enter_context(training_in(training.precision, measure_kernels=True))
        trainer = DecoderTrainer(
            config,
            run_context.device,
            load_trained_autoencoder(checkpoint, run_context.device),
            latent_cache.open(config.store_path, "train"),
            validation=latent_cache.open(config.store_path, "val") if validated else None,
            pictures=plan.folder / "reconstructions",
            state=plan.state,
            processes=processes,
        )
        sentence = (
            f"{trainer.model.parameter_count / 1e6:.2f} M parameters, batch {training.batch_size} of "
            f"{trainer.amount.frames} frames, {training.precision}"
        )
        return trainer, replace(plan.loop, best="validation_psnr" if validated else None), sentence

    return train(plan, config, run_context, open_trainer)


def decoder_status(config: RiverConfig) -> Status:
    """How far the fast decoder is: its newest checkpoint against the configuration and the autoencoder."""
    return training_status(decoder_plan(config))


def decoder_plan(config: RiverConfig) -> TrainingPlan:
    """The training of this configuration for its autoencoder, whatever store the latents come from."""
    autoencoder = find_autoencoder(config.shared.run_path)
    inputs = {} if autoencoder is None else {"autoencoder": autoencoder_digest(autoencoder)}
    return plan_training("decoder", of_all_runs("decoder", config), inputs=inputs)


class StoredFrames:
    """Latents of single frames of a split, in memory if they fit into the budget, else read one by one."""

    def __init__(self, cache: LatentCache, memory: int) -> None:
        self.cache, self.count = cache, cache.frames
        self._latents = cache.load() if cache.nbytes <= memory else None

    def read(self, frames: Tensor) -> Tensor:
        """Frames [b] int64, counted over the whole split, as [b, c, y, x] float32 raw latents on the CPU.

        Raises:
            CorruptStoreError: damaged latents; names their chunk.
        """
        if self._latents is not None:
            return self._latents[frames].float()
        one_by_one = [self.cache.latent_reader.read(frame, frame + 1) for frame in frames.tolist()]
        return torch.cat([torch.from_numpy(latents) for latents in one_by_one]).float()


class DecoderTrainer(Trainer):
    """The fast decoder, its optimizers and averaged copy. Targets are decoded by the autoencoder in each step."""

    def __init__(
        self,
        config: RiverConfig,
        device: torch.device,
        autoencoder: Autoencoder,
        latents: LatentCache,
        *,
        validation: LatentCache | None = None,
        pictures: Path | None = None,
        state: dict[str, Any] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """Initialize everything from the configuration's seed.

        Args:
            autoencoder: to imitate, in eval mode on the device.
            latents: the training split.
            validation: the validation split, in rank 0.
            pictures: folder for its frames, decoded both ways.
            state: further JSON of the checkpoints.
        """
        self.config, self.training, self.device = config, config.decoder.training, device
        self.autoencoder, self.checkpoint_state, self.processes = autoencoder, state or {}, processes
        self.pictures = pictures
        self.frames = StoredFrames(latents, config.cache.memory_budget_bytes)
        self.validation = None
        if validation is not None:
            count = min(self.training.validation_frames, validation.frames)
            chosen = torch.linspace(0, validation.frames - 1, count, dtype=torch.float64).round().long()
            self.validation = self._examples(StoredFrames(validation, 0).read(chosen))
        torch.manual_seed(config.seed)
        self.model = FastDecoder(config.decoder.model, autoencoder.config)
        self.model.to(device, memory_format=torch.channels_last)
        self.train_state = TrainState(self.model, self.training, self.model.boundary_parameters())
        self.network = processes.distribute(self.model, device)

    def set_steps(self, steps: int) -> None:
        self.training = self.training.model_copy(update={"steps": steps})

    @property
    def amount(self) -> TrainingAmount:
        return TrainingAmount(self.frames.count, self.training.batch_size)

    def train_step(self, step: int) -> StepResult:
        """One update on this process's rows of the step's frames."""
        training, rows = self.training, self.processes.rows(self.training.batch_size)
        quantized, wanted = self._examples(self._shifted(self.frames.read(self._draw(step)), step)[rows])
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            decoded = self.network(quantized)
        terms = {"l1": F.l1_loss(decoded.float(), wanted), "l2": F.mse_loss(decoded.float(), wanted)}
        loss = terms["l1"] + training.l2_weight * terms["l2"]
        loss.backward()
        norm = self.train_state.gradient_norm()
        finite = self.processes.all_true(norm.isfinite() & loss.detach().isfinite())
        factor = learning_rate_factor(step, warmup=training.warmup, total=training.steps)
        self.train_state.update(step, factor, norm, finite)
        return StepResult({"loss": loss, **terms, "gradient_norm": norm}, finite)

    def _shifted(self, latents: Tensor, step: int) -> Tensor:
        """Latents [b, c, y, x], each shifted by a vector of its own, of at most about a channel's deviation.

        Predictions, and videos in another light, have codes side by side that no training frame has.
        """
        generator = step_generator(self.config.seed, step, stream="decoder shifts")
        most = torch.rand(len(latents), 1, 1, 1, generator=generator) * latents.std((0, 2, 3), keepdim=True)
        return latents + most * torch.randn(most.shape, generator=generator)

    def _draw(self, step: int) -> Tensor:
        generator = step_generator(self.config.seed, step, stream="decoder frames")
        return torch.randint(self.frames.count, (self.training.batch_size,), generator=generator)

    @torch.no_grad()
    def _examples(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Raw latents [n, c, y, x] as inputs [n, c, y, x] and targets [n, 3, h, w]: nearest codes, and their images."""
        with computing_in("fp32", self.device):
            quantized = self.autoencoder.quantize(latents.to(self.device))[0]
            images = [self.autoencoder.decode_quantized(part) for part in quantized.split(FRAMES_AT_ONCE)]
        return quantized, torch.cat(images)

    def describe_batch(self, step: int) -> str:
        return f"frames {', '.join(map(str, self._draw(step)[:8].tolist()))}, ... of the train split"

    @torch.no_grad()
    @in_full_precision
    def validate(self, step: int) -> dict[str, float]:
        """PSNR of fixed frames against those of the full decoder."""
        if self.validation is None:
            return {}
        model = self.train_state.best_model.eval()
        quantized, wanted = self.validation
        decoded, wanted = torch.cat([model(part) for part in quantized.split(FRAMES_AT_ONCE)]), wanted.clamp(-1, 1)
        value = psnr(decoded, wanted).mean().item()
        words = f"PSNR {value:.2f} dB, to the full decoder"
        if self.pictures is not None:
            path, title = self.pictures / f"step_{step:08d}.png", f"{self.config.dataset.name}, step {step}: {words}"
            save_reconstructions(path, wanted, decoded, title, ("full decoder", "fast decoder"))
        say(f"decoder: step {step}: validation {words}")
        return {"validation_psnr": value}

    def state(self) -> dict[str, Any]:
        return self.checkpoint_state | {"model": self.config.decoder.model.model_dump(mode="json")}
