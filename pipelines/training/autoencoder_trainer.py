"""What changes while an autoencoder is trained: the model, its codebook, its discriminator; one call a step."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latent_cache import step_generator
from pipelines.config import RiverConfig
from pipelines.evaluation.metrics import psnr, ssim
from pipelines.prediction.pictures import reconstruction_sheet
from pipelines.runtime.checkpoints import Checkpoint, Tensors
from pipelines.runtime.context import image_memory_format
from pipelines.runtime.distributed import ALONE, Processes
from pipelines.runtime.progress import say, warn
from pipelines.runtime.train_state import TrainState
from pipelines.training.training_loop import StepResult, Trainer
from stage1_autoencoder.augmentation import augment
from stage1_autoencoder.autoencoder import image_to_unit
from stage1_autoencoder.codebook import CodebookCare, forget
from stage1_autoencoder.config import AutoencoderTrainingConfig
from stage1_autoencoder.discriminator import DiscriminatorWatch, PatchDiscriminator, adversarial_weight
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.frame_pool import FramePool
from stage1_autoencoder.training import DiscriminatorStep, backward, learning_rate_factor

# Latent vectors a code that the codebook is started on.
VECTORS_A_CODE = 4
# Frames that are shown on a sheet, and that go through the network at once in validation.
SHEET_FRAMES = 16
FRAMES_AT_ONCE = 32


@dataclass(frozen=True)
class Validation:
    """What is looked at over and over while an autoencoder is trained.

    Attributes:
        images: [n, 3, h, w] in [-1, 1] on the CPU.
        folder: where a sheet of reconstructions goes each time.
    """

    images: Tensor
    folder: Path


class AutoencoderTrainer(Trainer):
    """Autoencoder, discriminator where there is one, averaged copy, and the care of the codebook."""

    def __init__(
        self,
        config: RiverConfig,
        device: torch.device,
        pool: FramePool,
        *,
        perceptual: nn.Module | None = None,
        validation: Validation | None = None,
        identity: dict[str, Any] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """Make everything anew, from the configuration's seed.

        Args:
            pool: where frames come from.
            perceptual: LPIPS on the device, or None.
            validation: of the first process.
            identity: what the training depends on, for its checkpoints.
        """
        self.config, self.training, self.device = config, config.autoencoder.training, device
        self.pool, self.perceptual, self.validation = pool, perceptual, validation
        self.identity, self.processes = identity or {}, processes
        self.layout = image_memory_format(device)
        torch.manual_seed(config.seed)
        self.model = self._placed(build_autoencoder(config.autoencoder.model))
        self.train_state = TrainState(self.model, self.training, self.model.boundary_parameters())
        self.adversary = self._make_adversary() if self.training.adversarial.weight > 0 else None
        self.watch = DiscriminatorWatch()
        average = self.train_state.average
        self.care = CodebookCare(
            self.model.quantizer,
            start=self.training.codebook_start,
            restart_every=self.training.restart_every,
            window=math.ceil(int(pool.lengths.sum()) / self.training.batch_size),
            average=None if average is None else average.module.quantizer,
            reduce=processes.sum_,
            gather=processes.gather,
        )
        if self.training.compile:
            self.model.compile_networks()
        self.network = processes.distribute(self.model, device)

    @property
    def learning_rate(self) -> float:
        return self.train_state.learning_rate

    def train_step(self, step: int) -> StepResult:
        """One update of the autoencoder, and one of the discriminator from its start on."""
        training = self.training
        if step == 0:
            self._start_codebook()
        images = self._images(step)
        self.model.train()
        torch.manual_seed(step_generator(self.config.seed, step, stream="dropout").initial_seed() + self.processes.rank)
        parts = images.chunk(training.accumulate)
        judged = self.adversary is not None and step >= training.adversarial.start
        terms, passes = [], []
        for number, part in enumerate(parts):
            not_last = number < len(parts) - 1
            with self.processes.without_exchange(self.network, not_last):
                with self._autocast():
                    output = self.network(part)
                terms.append(
                    backward(
                        output,
                        part,
                        training,
                        last_layer=self.model.last_layer.weight,
                        perceptual=self._autocasting(self.perceptual),
                        discriminator=self._autocasting(self.adversary.discriminator) if judged else None,
                        adversarial_weight=adversarial_weight(step, training.adversarial),
                        average=self.processes.mean_,
                        scale=1 / len(parts),
                    )
                )
            passes.append((output.codes, output.latents.detach(), output.images.detach().float()))
        factor = learning_rate_factor(step, warmup=training.warmup_steps, total=training.steps)
        finite = self.train_state.apply(factor)
        codes, latents, reconstructed = (torch.cat(tensors) for tensors in zip(*passes, strict=True))
        if judged:
            judgement, told_apart = self.adversary.train_step(images, reconstructed, factor, self._autocast)
            terms = [part | judgement for part in terms]
            finite = finite & told_apart
        moved = self.care.after_step(step, codes, latents, self._draws(step, "codes"))
        if moved is not None:
            for optimizer in self.train_state.optimizers:
                forget(optimizer, self.model.quantizer.embedding.weight, moved)
        means = {name: torch.stack([part[name] for part in terms]).mean() for name in terms[0]}
        return StepResult(means, finite)

    def describe_batch(self, step: int) -> str:
        return self.pool.describe(step)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """PSNR, SSIM and LPIPS of reconstructions, how many codes they use, and a sheet to look at."""
        if self.validation is None:
            return {}
        model = self.train_state.best_model.eval()
        reconstructed, chosen = [], []
        for part in self.validation.images.split(FRAMES_AT_ONCE):
            quantized, codes = model.quantize(model.encode(part.to(self.device)))
            reconstructed.append(model.decode_quantized(quantized).clamp(-1, 1).cpu())
            chosen.append(codes.flatten())
        frequencies = torch.bincount(torch.cat(chosen)).double()
        frequencies = frequencies[frequencies > 0] / frequencies.sum()
        measured = self._distances(torch.cat(reconstructed))
        measured["validation_codes"] = len(frequencies)
        measured["validation_perplexity"] = float((-(frequencies * frequencies.log()).sum()).exp())
        # Spread over the videos, whose frames lie beside each other.
        shown = torch.linspace(0, len(self.validation.images) - 1, SHEET_FRAMES).round().long().unique()
        title = f"{self.config.dataset.name}, step {step}: {_in_words(measured)}"
        sheet = reconstruction_sheet(self.validation.images[shown], torch.cat(reconstructed)[shown], title)
        self.validation.folder.mkdir(parents=True, exist_ok=True)
        sheet.save(self.validation.folder / f"step_{step:08d}.png")
        say(f"autoencoder: step {step}: validation {_in_words(measured)}")
        return measured

    def _distances(self, reconstructed: Tensor) -> dict[str, float]:
        """Mean metrics of reconstructed validation images [n, 3, h, w]."""
        values: dict[str, list[Tensor]] = {"psnr": [], "ssim": []}
        parts = zip(reconstructed.split(FRAMES_AT_ONCE), self.validation.images.split(FRAMES_AT_ONCE), strict=True)
        for images, truth in parts:
            values["psnr"].append(psnr(images, truth))
            values["ssim"].append(ssim(images, truth))
            if self.perceptual is not None:
                lpips = self.perceptual(images.to(self.device), truth.to(self.device))
                values.setdefault("lpips", []).append(lpips.cpu())
        return {f"validation_{name}": torch.cat(each).mean().item() for name, each in values.items()}

    def metrics(self, step: int, terms: dict[str, float], steps_per_second: float) -> dict[str, float]:
        """Use of the codes over an epoch; a warning at the first sign of trouble with the discriminator."""
        usage = self.care.usage()
        if self.adversary is not None:
            level = terms.get("perceptual", terms["l1"])
            weight = adversarial_weight(step - 1, self.training.adversarial)
            warning = self.watch.read(step, level, terms.get("logits_real", 0.0), terms.get("logits_fake", 0.0), weight)
            if warning is not None and self.processes.is_first:
                warn(warning)
        return {"codes_used": usage.used, "code_perplexity": usage.perplexity}

    def files(self) -> dict[str, Tensors]:
        """Everything that resuming needs, and everything that using the autoencoder needs."""
        files = self.train_state.files() | {"codebook": self.care.state()}
        return files if self.adversary is None else files | self.adversary.train_state.files()

    def state(self) -> dict[str, Any]:
        model = self.config.autoencoder.model.model_dump(mode="json")
        return {"identity": self.identity, "model": model, "watch": self.watch.state()}

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same configuration."""
        self.train_state.load(checkpoint, self.device)
        self.care.load_state(checkpoint.tensors("codebook", self.device))
        if self.adversary is not None:
            self.adversary.train_state.load(checkpoint, self.device)
            self.watch.load_state(checkpoint.state["watch"])

    def _images(self, step: int) -> Tensor:
        """This process's rows of a step's batch, augmented: [b, 3, h, w] in [-1, 1]."""
        rows = self.processes.rows(self.training.batch_size)
        frames = torch.from_numpy(self.pool.batch(step, rows))
        if self.device.type == "cuda":
            frames = frames.pin_memory()  # else the host would wait for the copy
        frames = frames.to(self.device, non_blocking=True)
        images = augment(
            image_to_unit(frames),
            jitter=self.training.color_jitter,
            flip=self.training.flip,
            generator=self._draws(step, "augmentation"),
            batch=self.training.batch_size,
            rows=rows,
        )
        return images.contiguous(memory_format=self.layout)

    @torch.no_grad()
    def _start_codebook(self) -> None:
        """Put the codes where the first batches' latents lie."""
        if self.training.codebook_start == "uniform":
            return
        side = self.config.dataset.image_size // self.model.downsampling
        wanted = VECTORS_A_CODE * self.config.autoencoder.model.codes
        batches = min(self.training.steps, math.ceil(wanted / (self.training.batch_size * side * side)))
        self.model.eval()  # looking must not change BatchNorm's statistics
        parts = [self.model.encode(part) for i in range(batches) for part in self._images(i).split(FRAMES_AT_ONCE)]
        latents = torch.cat(parts)
        vectors = len(latents) * side * side * self.processes.count
        if vectors < self.config.autoencoder.model.codes and self.processes.is_first:
            warn(
                f"autoencoder: {vectors} latent vectors are all that the training begins with, for "
                f"{self.config.autoencoder.model.codes} codes (autoencoder.model.codes): many will stay unused"
            )
        self.care.start(latents, self._draws(0, "codebook start"))

    def _make_adversary(self) -> "_Adversary":
        adversarial = self.training.adversarial
        discriminator = self._placed(PatchDiscriminator(adversarial.filters, adversarial.layers))
        return _Adversary(discriminator, self.training, self.device, self.processes)

    def _placed(self, module: nn.Module) -> nn.Module:
        if self.processes.count > 1 and self.device.type == "cuda":
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return module.to(self.device, memory_format=self.layout)

    def _draws(self, step: int, stream: str) -> torch.Generator:
        return step_generator(self.config.seed, step, self.device, stream)

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.training.precision == "bf16")

    def _autocasting(self, module: nn.Module | None) -> Callable[..., Tensor] | None:
        if module is None:
            return None

        def call(*images: Tensor) -> Tensor:
            with self._autocast():
                return module(*images)

        return call


class _Adversary:
    """The discriminator, its optimizer and its step."""

    def __init__(
        self,
        discriminator: PatchDiscriminator,
        training: AutoencoderTrainingConfig,
        device: torch.device,
        processes: Processes,
    ) -> None:
        self.discriminator, self.accumulate, self.processes = discriminator, training.accumulate, processes
        settings = training.model_copy(
            update={
                "optimizer": "adamw",
                "learning_rate": training.adversarial.learning_rate,
                "betas": training.adversarial.betas,
                "weight_decay": 0.0,
                "ema_decay": None,
            }
        )
        self.train_state = TrainState(discriminator, settings, [], name="discriminator")
        self.step = processes.distribute(DiscriminatorStep(discriminator), device)

    def train_step(
        self, images: Tensor, reconstructed: Tensor, factor: float, autocast: Callable[[], AbstractContextManager[None]]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Learn to tell images from reconstructions; gives terms for the log, and whether gradients were finite."""
        self.discriminator.train()
        parts = list(zip(images.chunk(self.accumulate), reconstructed.chunk(self.accumulate), strict=True))
        seen = []
        for number, part in enumerate(parts):
            with self.processes.without_exchange(self.step, number < len(parts) - 1):
                with autocast():
                    loss, real, fake = self.step(*part)
                (loss / len(parts)).backward()
            seen.append(torch.stack([loss.detach(), real, fake]))
        finite = self.train_state.apply(factor)
        names = ("discriminator", "logits_real", "logits_fake")
        return dict(zip(names, torch.stack(seen).mean(0), strict=True)), finite


def _in_words(measured: dict[str, float]) -> str:
    words = [f"PSNR {measured['validation_psnr']:.2f} dB", f"SSIM {measured['validation_ssim']:.3f}"]
    if "validation_lpips" in measured:
        words.append(f"LPIPS {measured['validation_lpips']:.3f}")
    return ", ".join([*words, f"{measured['validation_codes']} codes in use"])
