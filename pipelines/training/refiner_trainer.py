"""The refiner's training: from the store and the raw videos to a network that refines decoded frames."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

import latent_cache
from latent_cache import LatentCache, StoreError, step_generator
from latent_cache.schema import IDENTITY_VIEW
from pipelines.config import RiverConfig
from pipelines.data.datasets import open_videos
from pipelines.encoding.store_checks import check_sources
from pipelines.errors import UserError
from pipelines.evaluation.measures.metrics import psnr
from pipelines.evaluation.measures.networks import VideoNetwork
from pipelines.loading import autoencoder_digest, find_autoencoder, load_trained_autoencoder
from pipelines.prediction.pictures import save_reconstructions
from pipelines.prediction.rollouts import refine_frames
from pipelines.runtime.checkpoints import Checkpoint
from pipelines.runtime.context import RunContext, computing_in, image_memory_format, in_full_precision, training_in
from pipelines.runtime.distributed import ALONE, Processes
from pipelines.runtime.files import file_sha256
from pipelines.runtime.progress import say
from pipelines.runtime.status import Status
from pipelines.runtime.train_state import TrainState
from pipelines.training.training_loop import LoopSettings, StepResult, Trainer, TrainingAmount
from pipelines.training.training_run import TrainingPlan, plan_training, train, training_status
from stage1_autoencoder.autoencoder import Autoencoder, image_to_unit
from stage1_autoencoder.rcan import RCAN
from stage1_autoencoder.training import learning_rate_factor
from stage1_autoencoder.videos.source import BrokenVideoError, VideoSource

# Batch sizes: frames through the autoencoder, clips in validation.
FRAMES_AT_ONCE = 64
CLIPS_AT_ONCE = 4
# Steps whose clips are decoded ahead of the current one.
STEPS_AHEAD = 2
# Clips drawn per row, in case that videos break.
ATTEMPTS = 8
# Steps whose clips can still be named.
NAMES_KEPT = 4


def train_refiner(config: RiverConfig, run_context: RunContext) -> Checkpoint:
    """Train the refiner to its last step, or recognise that this was done.

    Returns:
        The checkpoint to use: the best by validation if one was measured, else the last.
    Raises:
        UserError: no autoencoder; a checkpoint that conflicts with the configuration, the autoencoder or the store;
            videos that are not those of the store, or all too short; gradients that are not finite.
        StoreError: no complete store.
        StoppedBySignal: after a signal, with a checkpoint saved.
    """
    processes, plan = run_context.processes, refiner_plan(config)

    def open_trainer(
        config: RiverConfig, found: Checkpoint | None, held: ExitStack
    ) -> tuple[Trainer, LoopSettings, str]:
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
        held.enter_context(training_in(training.precision, measure_kernels=True))
        trainer = RefinerTrainer(
            config,
            run_context.device,
            autoencoder,
            clips,
            perceptual=perceptual,
            validation=validation,
            pictures=plan.folder / "reconstructions",
            state=plan.state,
            processes=processes,
        )
        sentence = (
            f"{trainer.model.parameter_count / 1e6:.2f} M parameters, batch {training.batch_size} of {clips.count} "
            f"clips of {training.clip_frames} frames, {training.precision}"
        )
        return trainer, replace(plan.loop, best=None if validation is None else "validation_psnr"), sentence

    return train(plan, config, run_context, open_trainer)


def refiner_status(config: RiverConfig) -> Status:
    """How far the refiner is: its newest checkpoint against the configuration, the autoencoder and the store."""
    return training_status(refiner_plan(config))


def refiner_plan(config: RiverConfig) -> TrainingPlan:
    """The training of this configuration on this store. Missing inputs are not compared."""
    training, inputs = config.refiner.training, {}
    autoencoder = find_autoencoder(config.shared.run_path)
    if autoencoder is not None:
        inputs["autoencoder"] = autoencoder_digest(autoencoder)
    try:
        if latent_cache.is_complete(config.store_path):
            inputs["store"] = {"fingerprint": latent_cache.open(config.store_path, "train").fingerprint}
    except StoreError:  # the store's own status reports it
        pass
    if training.perceptual_network is None:
        inputs["perceptual"] = None
    elif (file := Path(training.perceptual_network)).is_file():
        inputs["perceptual"] = {"sha256": file_sha256(file)}
    return plan_training("refiner", config, inputs=inputs)


@dataclass(frozen=True)
class ClipBatch:
    """Clips and their latents.

    Attributes:
        names: video and first frame, such as `walking_3@17`.
        pixels: [b, t, h, w, 3] uint8.
        latents: [b, t, c, y, x] float32, before quantization, as in the store.
    """

    names: list[str]
    pixels: torch.Tensor
    latents: torch.Tensor


class RefinerClips:
    """Serves one batch of clips per step, drawn uniformly over all clips of a split: a function of (seed, step).

    Frames are decoded a few steps ahead; latents are kept in memory if they fit into the budget.
    """

    def __init__(
        self,
        source: VideoSource,
        cache: LatentCache,
        *,
        clip_frames: int,
        batch_size: int,
        steps: int,
        seed: int,
        memory: int,
        on_broken: Callable[[BrokenVideoError], None],
    ) -> None:
        """Match videos and latents.

        Args:
            source: the videos of a split; `cache`: the same split in the store.
            steps: of the whole training; nothing is decoded for later ones.
            memory: limit in bytes for latents in memory; those of a larger split are read from the store clip by clip.
            on_broken: called with a video that can't be decoded, from another thread; other clips take its place.
        Raises:
            UserError: the store has other videos than the source, or all of them are shorter than a clip.
        """
        self.source, self.cache, self.clip_frames = source, cache, clip_frames
        self.batch_size, self.steps, self.seed, self.on_broken = batch_size, steps, seed, on_broken
        self.rows, self.videos = _match(source, cache)
        lengths = cache.lengths[self.rows]
        fits = lengths >= clip_frames
        if not fits.any():
            raise UserError(
                f"refiner: no video of the {cache.split} split of {cache.url} has the {clip_frames} frames of "
                f"refiner.training.clip_frames; they have {lengths.min()} to {lengths.max()}: lower it"
            )
        if not fits.all():
            short = [source.videos[video].id for video in self.videos[~fits]]
            names = ", ".join(short[:3]) + (", ..." if len(short) > 3 else "")
            say(
                f"refiner: {len(short)} of {len(lengths)} videos of the {cache.split} split are shorter than the "
                f"{clip_frames} frames of a clip and ignored: {names}"
            )
        self.rows, self.videos, self.frames = self.rows[fits], self.videos[fits], int(lengths[fits].sum())
        self.ends = np.cumsum(lengths[fits] - clip_frames + 1)  # number of clips up to and including each video
        self._latents = cache.load() if cache.nbytes <= memory else None
        self._threads = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="clips")
        self._ahead: dict[int, list[Future[tuple]]] = {}
        self._names: dict[int, list[str]] = {}

    @property
    def count(self) -> int:
        """Number of clips that can be drawn."""
        return int(self.ends[-1])

    def batch(self, step: int, rows: slice = slice(None)) -> ClipBatch:
        """The clips of a step, or some rows of them (the same at every step); starts to decode the next steps'.

        Raises:
            BrokenVideoError: none of the clips drawn for a row can be decoded.
            CorruptStoreError: damaged latents; names their chunk.
        """
        for old in [number for number in self._ahead if number < step]:
            del self._ahead[old]
        for wanted in range(step, max(step + 1, min(step + 1 + STEPS_AHEAD, self.steps))):
            if wanted not in self._ahead:
                draws = self._draw(wanted)[rows]
                self._ahead[wanted] = [self._threads.submit(self._read_first_whole, choices) for choices in draws]
        names, pixels, latents = zip(*(future.result() for future in self._ahead.pop(step)), strict=True)
        self._names[step] = list(names)
        for old in [number for number in self._names if number <= step - NAMES_KEPT]:
            del self._names[old]
        return ClipBatch(list(names), torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(latents)).float())

    def describe(self, step: int, most: int = 4) -> str:
        """The clips of one of the last steps, for messages."""
        names = self._names.get(step, [])
        more = f" and {len(names) - most} more" if len(names) > most else ""
        return f"clips {', '.join(names[:most])}{more}"

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _draw(self, step: int) -> np.ndarray:
        """[batch_size, ATTEMPTS] numbers of clips."""
        generator = step_generator(self.seed, step, stream="refiner clips")
        return torch.randint(self.count, (self.batch_size, ATTEMPTS), generator=generator).numpy()

    def _read_first_whole(self, choices: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
        for choice in choices:
            try:
                return self._read(int(choice))
            except BrokenVideoError as error:
                self.on_broken(error)
                broken = error
        raise broken

    def _read(self, clip: int) -> tuple[str, np.ndarray, np.ndarray]:
        number = int(np.searchsorted(self.ends, clip, side="right"))
        start = clip - (int(self.ends[number - 1]) if number else 0)
        row, video = int(self.rows[number]), int(self.videos[number])
        first = int(self.cache.offsets[row]) + start
        last = first + self.clip_frames
        if self._latents is None:
            latents = self.cache.latent_reader.read(first, last)
        else:
            latents = self._latents[first:last].numpy()
        pixels = self.source.read(video, range(start, start + self.clip_frames))
        return f"{self.source.videos[video].id}@{start}", pixels, latents


def _match(source: VideoSource, cache: LatentCache) -> tuple[np.ndarray, np.ndarray]:
    """(rows in the store, numbers in the source) of the videos that are not augmented, matched by their ids."""
    numbers = {video.id: number for number, video in enumerate(source.videos)}
    rows = [row for row, view in enumerate(cache.video_views) if view == IDENTITY_VIEW]
    if not rows:
        raise UserError(
            f"refiner: the {cache.split} split of {cache.url} holds augmented videos only: add {IDENTITY_VIEW} to "
            "cache.views, and encode with --overwrite"
        )
    for row in rows:
        name = cache.video_ids[row]
        stored, found = int(cache.lengths[row]), source.videos[numbers[name]].frames if name in numbers else None
        if stored != found:
            problem = "is missing" if found is None else f"has {found} frames"
            raise UserError(
                f"refiner: video {name!r} of the {cache.split} split {problem}, and {cache.url} has {stored} frames of "
                "it: restore the videos that were encoded, or encode with --overwrite"
            )
    return np.array(rows), np.array([numbers[cache.video_ids[row]] for row in rows])


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
        pictures: Path | None = None,
        state: dict[str, Any] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """Initialize everything from the configuration's seed.

        Args:
            autoencoder: in eval mode on the device; decodes the clips' latents.
            clips: source of the training clips.
            perceptual: network of the perceptual loss term, if any.
            validation: clips to validate on, in rank 0.
            pictures: folder for their frames, refined.
            state: further JSON of the checkpoints.
        """
        self.config, self.training, self.device = config, config.refiner.training, device
        self.autoencoder, self.clips, self.perceptual = autoencoder, clips, perceptual
        self.validation, self.pictures = validation, pictures
        self.checkpoint_state, self.processes = state or {}, processes
        torch.manual_seed(config.seed)
        self.model = RCAN(config.refiner.model)
        if self.training.start == "copy":
            self.model.start_as_copy()
        self.model.to(device, memory_format=image_memory_format(device))
        settings = self.training.model_copy(update={"learning_rate": self.training.peak_learning_rate})
        self.train_state = TrainState(self.model, settings, self.model.boundary_parameters())
        self.network = processes.distribute(self.model, device)

    def set_steps(self, steps: int) -> None:
        self.training = self.training.model_copy(update={"steps": steps})
        self.clips.steps = steps

    @property
    def amount(self) -> TrainingAmount:
        # A clip's first frame is only the previous one of its second.
        return TrainingAmount(self.clips.frames, self.training.batch_size * (self.training.clip_frames - 1))

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
        means = {name: torch.stack([part[name] for part in terms]).mean() for name in terms[0]}
        norm = self.train_state.gradient_norm()
        finite = self.processes.all_true(norm.isfinite() & means["loss"].isfinite())
        factor = learning_rate_factor(step, warmup=training.warmup, total=training.steps)
        self.train_state.update(step, factor, norm, finite)
        return StepResult(means | {"gradient_norm": norm}, finite)

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
    @in_full_precision
    def validate(self, step: int) -> dict[str, float]:
        """PSNR of fixed clips refined as in use (each frame given the refined previous one), and unrefined."""
        if self.validation is None:
            return {}
        model = self.train_state.best_model.eval()
        refined, unrefined, shown = [], [], []
        clips = zip(self.validation.pixels.split(CLIPS_AT_ONCE), self.validation.latents.split(CLIPS_AT_ONCE),
                    strict=True)  # fmt: skip
        for pixels, latents in clips:
            example = make_example(self.autoencoder, pixels.to(self.device), latents.to(self.device))
            truth = example.truth.flatten(0, 1)
            frames = refine_frames(model, example.previous[:, 0], example.decoded).flatten(0, 1)
            refined.append(psnr(frames, truth))
            shown.append((truth.cpu(), frames.cpu()))
            unrefined.append(psnr(example.decoded.flatten(0, 1), truth))
        measured = {
            "validation_psnr": torch.cat(refined).mean().item(),
            "validation_psnr_unrefined": torch.cat(unrefined).mean().item(),
        }
        words = (
            f"PSNR {measured['validation_psnr']:.2f} dB refined, "
            f"{measured['validation_psnr_unrefined']:.2f} dB unrefined"
        )
        if self.pictures is not None:
            path, title = self.pictures / f"step_{step:08d}.png", f"{self.config.dataset.name}, step {step}: {words}"
            save_reconstructions(path, *(torch.cat(x) for x in zip(*shown, strict=True)), title, ("image", "refined"))
        say(f"refiner: step {step}: validation {words}")
        return measured

    def state(self) -> dict[str, Any]:
        return self.checkpoint_state | {"model": self.config.refiner.model.model_dump(mode="json")}


@torch.no_grad()
def make_example(autoencoder: Autoencoder, pixels: Tensor, latents: Tensor) -> RefinerExample:
    """Decode clips' latents as prediction does: quantized to their nearest codes first.

    Args:
        pixels: [b, t, h, w, 3] uint8; `latents`: [b, t, c, y, x] of the same frames; both on the autoencoder's device.
    """
    frames = image_to_unit(pixels)
    wanted = rearrange(latents[:, 1:], "b n c y x -> (b n) c y x")
    with computing_in("fp32", wanted.device):
        decoded = torch.cat([autoencoder.decode(part) for part in wanted.split(FRAMES_AT_ONCE)])
    return RefinerExample(
        previous=frames[:, :-1],
        decoded=rearrange(decoded, "(b n) c h w -> b n c h w", b=len(frames)),
        truth=frames[:, 1:],
    )


def _load_autoencoder(config: RiverConfig, device: torch.device) -> Autoencoder:
    checkpoint = find_autoencoder(config.shared.run_path)
    if checkpoint is None:
        raise UserError(
            f"{config.training_folder('autoencoder')}/checkpoints holds no checkpoint, and a refiner is trained on "
            f"frames that the autoencoder decodes: restore the one that encoded {config.store_path}, or train one and "
            "encode again (`train-autoencoder`, `encode --overwrite`)"
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
