"""Stage 1's training: from videos to a trained autoencoder."""

import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latent_cache import step_generator
from pipelines.config import SSIM_WINDOW, RiverConfig, parse_size
from pipelines.data.datasets import open_videos
from pipelines.errors import UserError
from pipelines.evaluation.measures.metrics import psnr, ssim
from pipelines.evaluation.measures.networks import NO_ST_LPIPS, NO_VGG16, find_st_lpips, load_lpips, load_st_lpips
from pipelines.prediction.pictures import save_reconstructions
from pipelines.runtime.checkpoints import Checkpoint, Tensors
from pipelines.runtime.context import RunContext, image_memory_format, in_full_precision, training_in
from pipelines.runtime.distributed import ALONE, Processes
from pipelines.runtime.progress import say, warn
from pipelines.runtime.status import Status
from pipelines.runtime.train_state import TrainState
from pipelines.training.training_loop import LoopSettings, StepResult, Trainer, TrainingAmount
from pipelines.training.training_run import TrainingPlan, of_all_runs, plan_training, train, training_status
from stage1_autoencoder.augmentation import augment
from stage1_autoencoder.autoencoder import image_to_unit
from stage1_autoencoder.codebook import CodebookCare, forget
from stage1_autoencoder.config import AutoencoderTrainingConfig
from stage1_autoencoder.discriminator import DiscriminatorWatch, PatchDiscriminator, adversarial_weight
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.frame_pool import FramePool
from stage1_autoencoder.lpips import LPIPS, FeatureDistance
from stage1_autoencoder.st_lpips import STLPIPS
from stage1_autoencoder.training import DiscriminatorStep, backward, learning_rate_factor
from stage1_autoencoder.videos.source import BrokenVideoError, VideoSource

# Latent vectors per code for the start of the codebook.
VECTORS_A_CODE = 4
# Share of the training, at its end, in which unused codes stay where they are: a moved one has to be trained.
UNTOUCHED_AT_THE_END = 0.1
# Batch size in validation.
FRAMES_AT_ONCE = 32


def train_autoencoder(config: RiverConfig, run_context: RunContext) -> Checkpoint:
    """Train the autoencoder to its last step, or recognise that this was done.

    Returns:
        The checkpoint to use: the best by validation if one was measured, else the last.
    Raises:
        UserError: no videos; a checkpoint that conflicts with the configuration; gradients that are not finite.
        StoppedBySignal: after a signal, with a checkpoint saved.
    """
    config = of_all_runs("autoencoder", config)
    processes, plan = run_context.processes, autoencoder_plan(config)

    def open_trainer(
        config: RiverConfig, found: Checkpoint | None, held: ExitStack
    ) -> tuple[Trainer, LoopSettings, str]:
        training = config.autoencoder.training
        processes.check_batch(training.batch_size, training.accumulate, "autoencoder.training.batch_size")
        with processes.first_before_others():
            perceptual = _perceptual_network(config, run_context, found)
            splits = open_videos(config, run_context)
        pool = FramePool(
            splits["train"],
            batch_size=training.batch_size,
            steps=training.steps,
            memory=parse_size(training.pool_memory),
            seed=config.seed,
            on_broken=lambda error: run_context.skip(error.video_id, error.reason),
        )
        held.enter_context(closing(pool))
        validation = (
            _open_validation(config, run_context, splits.get("val"), plan.folder) if processes.is_first else None
        )
        held.enter_context(training_in(training.precision, measure_kernels=True))
        trainer = AutoencoderTrainer(
            config,
            run_context.device,
            pool,
            perceptual=perceptual,
            validation=validation,
            state=plan.state | {"perceptual": "none" if perceptual is None else training.perceptual},
            processes=processes,
        )
        sentence = (
            f"{trainer.model.parameter_count / 1e6:.1f} M parameters, batch {training.batch_size}, "
            f"{_describe_loss(training, perceptual)}, {training.precision}"
        )
        best = None if validation is None else best_by(training, perceptual is not None)
        lowest = best in ("validation_lpips", "validation_st_lpips")
        return trainer, replace(plan.loop, best=best, lowest=lowest), sentence

    return train(plan, config, run_context, open_trainer)


def autoencoder_status(config: RiverConfig) -> Status:
    """How far the autoencoder is: its newest checkpoint against the configuration."""
    return training_status(autoencoder_plan(config))


def autoencoder_plan(config: RiverConfig) -> TrainingPlan:
    """The training of this configuration, for all its runs."""
    return plan_training("autoencoder", of_all_runs("autoencoder", config), also=("dataset",))


def best_by(training: AutoencoderTrainingConfig, perceptual: bool) -> str | None:
    """Name of the validated value that selects the best checkpoint; None: the last checkpoint is used.

    Args:
        perceptual: whether the network of the perceptual loss is available.
    """
    best = training.best_by
    if best == "auto":
        # Adversarial training lowers PSNR, though pictures get better: PSNR would select a checkpoint from before it.
        by_psnr = "last" if training.adversarial.weight else "psnr"
        best = training.perceptual if perceptual else by_psnr
    return None if best == "last" else f"validation_{best}"


@dataclass(frozen=True)
class Validation:
    """Validation data of an autoencoder in training.

    Attributes:
        images: [n, 3, h, w] in [-1, 1] on the CPU.
        folder: for the sheets of reconstructions.
    """

    images: Tensor
    folder: Path


class AutoencoderTrainer(Trainer):
    """The autoencoder, its optimizers, averaged copy, codebook care, and the optional discriminator."""

    def __init__(
        self,
        config: RiverConfig,
        device: torch.device,
        pool: FramePool,
        *,
        perceptual: nn.Module | None = None,
        validation: Validation | None = None,
        state: dict[str, Any] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """Initialize everything from the configuration's seed.

        Args:
            pool: source of the training frames.
            perceptual: LPIPS or ST-LPIPS on the device, or None.
            validation: in rank 0.
            state: further JSON of the checkpoints.
        """
        self.config, self.training, self.device = config, config.autoencoder.training, device
        self.pool, self.perceptual, self.validation = pool, perceptual, validation
        self.checkpoint_state, self.processes = state or {}, processes
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
            last_restart=_last_restart(self.training.steps),
            window=math.ceil(int(pool.lengths.sum()) / self.training.batch_size),
            average=None if average is None else average.module.quantizer,
            reduce=processes.sum_,
            gather=processes.gather,
        )
        if self.training.compile:
            self.model.compile_networks()
        self.network = processes.distribute(self.model, device)

    def set_steps(self, steps: int) -> None:
        self.training = self.training.model_copy(update={"steps": steps})
        self.care.last_restart = _last_restart(steps)
        self.pool.set_steps(steps)

    @property
    def amount(self) -> TrainingAmount:
        return TrainingAmount(int(self.pool.lengths.sum()), self.training.batch_size)

    def train_step(self, step: int) -> StepResult:
        """One update of the autoencoder, and from `adversarial.start` on one of the discriminator."""
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
            self.train_state.observe(lambda average, part=part: average(part))
        codes, latents, reconstructed = (torch.cat(tensors) for tensors in zip(*passes, strict=True))
        means = {name: torch.stack([part[name] for part in terms]).mean() for name in terms[0]}
        norms = {self.train_state: self.train_state.gradient_norm()}
        if judged:
            means |= self.adversary.backward(images, reconstructed, self._autocast)
            norms[self.adversary.train_state] = self.adversary.train_state.gradient_norm()
        finite = self.processes.all_true(torch.stack([means["loss"], *norms.values()]).isfinite().all())
        factor = learning_rate_factor(step, warmup=training.warmup, total=training.steps)
        for train_state, norm in norms.items():
            train_state.update(step, factor, norm, finite)
        moved = self.care.after_step(step, codes, latents, self._draws(step, "codes"), finite)
        if moved is not None:
            for optimizer in self.train_state.optimizers:
                forget(optimizer, self.model.quantizer.embedding.weight, moved)
        return StepResult(means | {"gradient_norm": norms[self.train_state]}, finite)

    def describe_batch(self, step: int) -> str:
        return self.pool.describe(step)

    @torch.no_grad()
    @in_full_precision
    def validate(self, step: int) -> dict[str, float]:
        """PSNR, SSIM and perceptual distance of reconstructions, number of codes in use, and a sheet of pictures."""
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
        title = f"{self.config.dataset.name}, step {step}: {_in_words(measured)}"
        path = self.validation.folder / f"step_{step:08d}.png"
        save_reconstructions(path, self.validation.images, torch.cat(reconstructed), title)
        say(f"autoencoder: step {step}: validation {_in_words(measured)}")
        return measured

    def _distances(self, reconstructed: Tensor) -> dict[str, float]:
        """Mean metrics of reconstructed validation images [n, 3, h, w]."""
        values = defaultdict[str, list[Tensor]](list)
        parts = zip(reconstructed.split(FRAMES_AT_ONCE), self.validation.images.split(FRAMES_AT_ONCE), strict=True)
        for images, truth in parts:
            values["psnr"].append(psnr(images, truth))
            if min(truth.shape[-2:]) >= SSIM_WINDOW:
                values["ssim"].append(ssim(images, truth))
            if self.perceptual is not None:
                distance = self.perceptual(images.to(self.device), truth.to(self.device))
                values[self.training.perceptual].append(distance.cpu())
        return {f"validation_{name}": torch.cat(each).mean().item() for name, each in values.items()}

    def metrics(self, step: int, terms: dict[str, float], steps_per_second: float) -> dict[str, float]:
        """Code usage over an epoch; warns at the first sign of an unstable discriminator."""
        usage = self.care.usage()
        if self.adversary is not None:
            level = terms.get("perceptual", terms["l1"])
            weight = adversarial_weight(step - 1, self.training.adversarial)
            warning = self.watch.update(
                step, level, terms.get("logits_real", 0.0), terms.get("logits_fake", 0.0), weight
            )
            if warning is not None and self.processes.is_first:
                warn(warning)
        return {"codes_used": usage.used, "code_perplexity": usage.perplexity}

    def files(self) -> dict[str, Tensors]:
        files = super().files() | {"codebook": self.care.state()}
        return files if self.adversary is None else files | self.adversary.train_state.files()

    def state(self) -> dict[str, Any]:
        model = self.config.autoencoder.model.model_dump(mode="json")
        return self.checkpoint_state | {"model": model, "watch": self.watch.state()}

    def load(self, checkpoint: Checkpoint) -> None:
        super().load(checkpoint)
        self.care.load_state(checkpoint.tensors("codebook", self.device))
        if self.adversary is not None:
            self.adversary.train_state.load(checkpoint, self.device)
            self.watch.load_state(checkpoint.state["watch"])

    def _images(self, step: int) -> Tensor:
        """This process's rows of a step's batch, augmented: [b, 3, h, w] in [-1, 1]."""
        rows = self.processes.rows(self.training.batch_size)
        frames = torch.from_numpy(self.pool.batch(step, rows))
        if self.device.type == "cuda":
            frames = frames.pin_memory()  # a copy from pageable memory blocks the host
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
        """Initialize the codebook from the latents of the first batches."""
        if self.training.codebook_start == "uniform":
            return
        model = self.config.autoencoder.model
        positions = math.prod(model.latent_shape(self.config.dataset.frame_size)[1:])
        wanted = VECTORS_A_CODE * model.codes
        batches = min(self.training.steps, math.ceil(wanted / (self.training.batch_size * positions)))
        self.model.eval()  # keeps the statistics of BatchNorm
        parts = [self.model.encode(part) for i in range(batches) for part in self._images(i).split(FRAMES_AT_ONCE)]
        latents = torch.cat(parts)
        vectors = len(latents) * positions * self.processes.count
        if vectors < model.codes and self.processes.is_first:
            warn(
                f"autoencoder: only {vectors} latent vectors to initialize {model.codes} codes "
                "(autoencoder.model.codes): many will stay unused"
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


def discriminator_settings(training: AutoencoderTrainingConfig) -> AutoencoderTrainingConfig:
    """How the discriminator is updated."""
    return training.model_copy(
        update={
            "optimizer": "adamw",
            "learning_rate": training.adversarial.learning_rate,
            "betas": training.adversarial.betas,
            "weight_decay": 0.0,
            "ema_decay": None,
        }
    )


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
        self.train_state = TrainState(discriminator, discriminator_settings(training), [], name="discriminator")
        self.step = processes.distribute(DiscriminatorStep(discriminator), device)

    def backward(
        self, images: Tensor, reconstructed: Tensor, autocast: Callable[[], AbstractContextManager[None]]
    ) -> dict[str, Tensor]:
        """Accumulate the gradients of the discriminator's loss; returns terms for the log."""
        self.discriminator.train()
        parts = list(zip(images.chunk(self.accumulate), reconstructed.chunk(self.accumulate), strict=True))
        seen = []
        for number, part in enumerate(parts):
            with self.processes.without_exchange(self.step, number < len(parts) - 1):
                with autocast():
                    loss, real, fake = self.step(*part)
                (loss / len(parts)).backward()
            seen.append(torch.stack([loss.detach(), real, fake]))
        names = ("discriminator", "logits_real", "logits_fake")
        return dict(zip(names, torch.stack(seen).mean(0), strict=True))


def _last_restart(steps: int) -> int:
    """The last step of a training at which unused codes are moved."""
    return steps - math.ceil(steps * UNTOUCHED_AT_THE_END)


def _in_words(measured: dict[str, float]) -> str:
    words = [f"PSNR {measured['validation_psnr']:.2f} dB"]
    others = {"SSIM": "validation_ssim", "LPIPS": "validation_lpips", "ST-LPIPS": "validation_st_lpips"}
    words += [f"{title} {measured[name]:.3f}" for title, name in others.items() if name in measured]
    return ", ".join([*words, f"{measured['validation_codes']} codes in use"])


def _describe_loss(training: AutoencoderTrainingConfig, perceptual: FeatureDistance | None) -> str:
    """The terms of the loss in a few words."""
    words = [name for name, weight in (("L1", training.l1_weight), ("L2", training.l2_weight)) if weight]
    if perceptual is not None and training.perceptual_weight:
        words.append({"lpips": "LPIPS", "st_lpips": "ST-LPIPS"}[training.perceptual])
    words.append("codebook")
    if training.adversarial.weight:
        words.append(f"adversarial from step {training.adversarial.start}")
    return " + ".join(words)


def _perceptual_network(
    config: RiverConfig, run_context: RunContext, found: Checkpoint | None
) -> FeatureDistance | None:
    """The network of the perceptual loss if its weights are on this machine, else None and a warning.

    A training that began without it continues without it.

    Raises:
        UserError: `best_by: lpips` without LPIPS; frames too small for it; a named file of weights that can't be used.
    """
    training, network = config.autoencoder.training, None
    if training.perceptual != "none":
        smallest = (LPIPS if training.perceptual == "lpips" else STLPIPS).smallest_side
        if min(config.dataset.frame_size) < smallest:
            raise UserError(
                f"autoencoder.training.perceptual: {training.perceptual} compares images of at least {smallest} pixels "
                f"a side, and dataset.image_size is {config.dataset.image_size}: set it to none, or use larger frames"
            )
        if found is not None and found.state["perceptual"] == "none":
            say("autoencoder: this training began without the perceptual loss, because its weights were missing")
        else:
            network = _load_perceptual(training, run_context)
    if training.best_by == "lpips" and (network is None or training.perceptual != "lpips"):
        raise UserError(
            "autoencoder.training.best_by: lpips needs the perceptual network: set autoencoder.training.perceptual to "
            "lpips and provide its weights, or use best_by: psnr"
        )
    return network


def _load_perceptual(training: AutoencoderTrainingConfig, run_context: RunContext) -> FeatureDistance | None:
    """The network on the device; None and a warning where its weights are missing."""
    if training.perceptual == "lpips":
        network = load_lpips(training.vgg_weights, run_context.device, download=run_context.download)
        reason = f"{NO_VGG16}, or set autoencoder.training.perceptual to st_lpips, whose weights are in a package"
    else:
        path = find_st_lpips()
        network = None if path is None else load_st_lpips(path, run_context.device)
        reason = f"autoencoder.training.perceptual: {training.perceptual}: {NO_ST_LPIPS}"
    if network is None and run_context.processes.is_first:
        warn(f"autoencoder: {reason}; continuing as with autoencoder.training.perceptual: none")
    return network


def _open_validation(
    config: RiverConfig, run_context: RunContext, source: VideoSource | None, folder: Path
) -> Validation | None:
    """A fixed draw of validation frames, one per video in turn; broken videos are skipped."""
    if source is None or not source.videos:
        say("autoencoder: no validation videos (dataset.splits), so nothing is measured during the training")
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
