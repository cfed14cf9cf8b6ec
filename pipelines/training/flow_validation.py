"""Validation of the flow in training: the loss on fixed draws, and predicted clips."""

import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

import latent_cache
from latent_cache import FlowBatch, LatentCache, first_batch, longest_distance, step_generator
from latent_cache.schema import IDENTITY_VIEW
from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.evaluation.measures.metrics import psnr
from pipelines.loading import find_autoencoder, load_trained_autoencoder, weights_digest
from pipelines.prediction.pictures import animation, clip_strips, contact_sheet, save_gif, save_picture, to_video
from pipelines.runtime.context import computing_in, in_full_precision
from pipelines.runtime.progress import say
from stage1_autoencoder.autoencoder import Autoencoder
from stage2_flow.conditioning import known_frames, make_draws
from stage2_flow.config import SamplingConfig
from stage2_flow.loss import FlowDraws
from stage2_flow.path import PathSample, path_sample
from stage2_flow.rollout import evaluation_mode, generate_latents
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.standardization import Standardization

# Cheap, and the same for all runs: only seed and past horizon are the run's.
SOLVER, SOLVER_STEPS = "euler", 10
# Batch through the field (256 latents of 8x8) and the decoder (128 frames of 64x64): some hundred megabytes at the
# largest sizes, beside a training that needs its memory.
TOKENS_AT_ONCE = 2**14
PIXELS_AT_ONCE = 2**19


def rows_at_once(latents: Tensor) -> int:
    """Batch size through the field for latents of the size of [..., h, w]."""
    return max(1, TOKENS_AT_ONCE // (latents.shape[-2] * latents.shape[-1]))


@dataclass(frozen=True, eq=False)
class ValidationClips:
    """Clips to predict, and the autoencoder that decodes them.

    Attributes:
        names: of the clips.
        keys: rows of their videos in the split; with the seed they key a clip's draws, so that its prediction does not
            depend on the other clips.
        latents: [k, n, c, h, w] float32 raw latents on the CPU.
        truth: [k, n, 3, h f, w f] in [-1, 1] on the CPU: the decoded latents.
        context: number of given frames; the others are predicted.
        fps: the most common rate of their videos.
        sampling: solver, steps, seed and past horizon.
        autoencoder: on `device`.
        title: of the pictures.
    """

    names: list[str]
    keys: list[int]
    latents: Tensor
    truth: Tensor
    context: int
    fps: float
    sampling: SamplingConfig
    autoencoder: Autoencoder
    device: torch.device
    title: str

    def predict(self, field: nn.Module, standardization: Standardization) -> Tensor:
        """[k, n - context, c, h, w] raw latents on the CPU, predicted from the context."""
        plan, horizon = SamplingPlan.from_config(self.sampling), self.latents.shape[1] - self.context
        predicted = []
        size = rows_at_once(self.latents)
        for first in range(0, len(self.keys), size):
            given = standardization.to_final(self.latents[first : first + size, : self.context].to(self.device))
            draws = make_draws(
                self.sampling.seed,
                [(key, 0) for key in self.keys[first : first + size]],
                horizon,
                plan.evaluations,
                known_frames(self.context),
                tuple(given.shape[2:]),
                self.sampling.past_horizon,
                self.device,
                condition=self.sampling.condition,
            )
            # Runs in eval mode and restores the modes.
            final = generate_latents(field, given, horizon, plan, draws, past_horizon=self.sampling.past_horizon)
            predicted.append(standardization.to_raw(final[:, self.context :]).cpu())
        return torch.cat(predicted)

    def write(self, field: nn.Module, standardization: Standardization, step: int, folder: Path) -> dict[str, float]:
        """As `FlowValidation.write_samples`."""
        predicted = decode(self.autoencoder, self.predict(field, standardization), self.device)
        given, truth = self.truth[:, : self.context], self.truth[:, self.context :]
        value = psnr(predicted.flatten(0, 1), truth.flatten(0, 1)).mean().item()
        pixels = zip(self.names, to_video(self.truth), to_video(torch.cat([given, predicted], 1)), strict=True)
        rows = [(name, clip_strips(real, shown, self.context)) for name, real, shown in pixels]
        title = (
            f"{self.title}, step {step}: decoded latents and predictions "
            f"({SamplingPlan.from_config(self.sampling).describe()}), PSNR {value:.2f} dB"
        )
        save_picture(folder / f"step_{step:08d}.png", contact_sheet(rows, title))
        save_gif(folder / f"step_{step:08d}.gif", animation(rows), self.fps)
        return {"validation_sample_psnr": value}


def open_validation_clips(config: RiverConfig, split: LatentCache, device: torch.device) -> ValidationClips | None:
    """The first frames of `flow.training.validation_samples` videos, spread evenly over those of a split.

    Videos with evaluation.context + evaluation.horizon frames are used; if there are none, shorter ones.

    Returns:
        None if no clips are wanted; also, with a message, if no video is longer than the context or the autoencoder
        that encoded the store is missing.
    Raises:
        StoreError: the videos can't be read.
    """
    wanted = config.flow.training.validation_samples
    context, horizon = config.evaluation.context, config.evaluation.horizon
    if not wanted:
        return None
    rows = np.flatnonzero([view == IDENTITY_VIEW for view in split.video_views])
    longest = int(split.lengths[rows].max(initial=0))
    training = config.flow.training
    # No distance that the field does not learn, as in `VideoPredictor.generate_latents`.
    lengths = latent_cache.open(split.url, "train").lengths
    trained = longest_distance(lengths, training.clip_frames, training.past_horizon) + 1
    if longest <= context:
        _say_none(f"evaluation.context is {context}, and the longest video of the val split has {longest} frames")
        return None
    autoencoder = _find_autoencoder(config, split, device)
    if autoencoder is None:
        return None
    rows = rows[split.lengths[rows] >= (context + horizon if longest >= context + horizon else context + 1)]
    rows = rows[np.linspace(0, len(rows) - 1, min(wanted, len(rows))).round().astype(int)]
    frames = min(context + horizon, int(split.lengths[rows].min()))
    if frames < context + horizon:
        say(
            f"flow: predicted clips have {frames - context} instead of {horizon} frames (evaluation.horizon): the "
            "videos of the val split are shorter"
        )
    starts = [int(split.offsets[row]) for row in rows]
    latents = np.stack([split.latent_reader.read(start, start + frames) for start in starts])
    latents = torch.from_numpy(latents).float()
    return ValidationClips(
        names=[split.video_ids[row] for row in rows],
        keys=rows.tolist(),
        latents=latents,
        truth=decode(autoencoder, latents, device),
        context=context,
        fps=statistics.mode(split.video_fps[rows].tolist()),
        sampling=SamplingConfig(
            solver=SOLVER,
            steps=SOLVER_STEPS,
            seed=config.sampling.seed,
            past_horizon=min(horizon for horizon in (config.sampling.past_horizon, trained) if horizon is not None),
            condition=config.sampling.condition,
        ),
        autoencoder=autoencoder,
        device=device,
        title=f"{config.dataset.name}, val split",
    )


def _find_autoencoder(config: RiverConfig, split: LatentCache, device: torch.device) -> Autoencoder | None:
    """The run's autoencoder if it encoded the store; else None and a message."""
    found = find_autoencoder(config.shared.run_path)
    if found is None:
        _say_none(f"{config.training_folder('autoencoder')} has no checkpoint to decode them with")
        return None
    try:
        with torch.random.fork_rng(devices=[]):  # building a network draws random weights
            autoencoder = load_trained_autoencoder(found, device)
    except UserError as error:
        _say_none(str(error).partition("\n")[0])  # torch appends a list of all tensors
        return None
    here, encoder = weights_digest(autoencoder), split.metadata.autoencoder["sha256"]
    if here != encoder:
        _say_none(
            f"{split.url} was encoded by autoencoder {encoder[:12]}..., but {found.path} is {here[:12]}...: encode "
            "again (`encode --overwrite`), or restore the old autoencoder"
        )
        return None
    return autoencoder


def _say_none(why: str) -> None:
    say(f"flow: no predicted clips during training: {why}")


@torch.no_grad()
def decode(autoencoder: Autoencoder, latents: Tensor, device: torch.device) -> Tensor:
    """[k, n, c, h, w] raw latents, quantized, to [k, n, 3, h f, w f] images in [-1, 1] on the CPU."""
    frames = rearrange(latents, "k n c h w -> (k n) c h w")
    pixels = frames.shape[-2] * frames.shape[-1] * autoencoder.downsampling**2
    parts = frames.split(max(1, PIXELS_AT_ONCE // pixels))
    with computing_in("fp32", device):
        images = torch.cat([autoencoder.decode(part.to(device)).float().clamp(-1, 1).cpu() for part in parts])
    return rearrange(images, "(k n) c h w -> k n c h w", k=len(latents))


# Equal parts of the time t that the loss is reported for: early and late times are different tasks.
TIME_BINS = 4
LAST_TIME = 1 - 2**-24  # the largest float32 below 1


@dataclass(frozen=True, eq=False)
class FlowValidation:
    """Fixed pairs, times and noise of the val split, and clips; the same for every training and device.

    Validation leaves the training unchanged: modules' modes, statistics, random generators.

    Attributes:
        batch: [n] pairs of raw latents, float32 on the CPU.
        draws: their noise and times, on the CPU.
        device: where fields are evaluated.
        pairs_at_once: batch size through the field.
        clips: that `write_samples` predicts; None: no clips.
    """

    batch: FlowBatch
    draws: FlowDraws
    device: torch.device
    pairs_at_once: int
    clips: ValidationClips | None = None

    @in_full_precision
    def measure(self, field: nn.Module, standardization: Standardization) -> dict[str, float]:
        """The flow matching loss.

        Args:
            field: a `VectorField` on the device; its modes are restored.
            standardization: from raw latents to those that the field was trained on.
        Returns:
            `validation_loss`, the mean over all pairs, and `validation_loss_t0` .. `_t3`, the means over t in
            [0, .25), [.25, .5), [.5, .75), [.75, 1); parts without pairs are left out.
        """
        errors = self.errors(field, standardization)
        measured = {"validation_loss": errors.mean().item()}
        bins = (self.draws.t * TIME_BINS).long()
        for number in range(TIME_BINS):
            inside = bins == number
            if inside.any():
                measured[f"validation_loss_t{number}"] = errors[inside].mean().item()
        return measured

    @torch.no_grad()
    def errors(self, field: nn.Module, standardization: Standardization) -> Tensor:
        """[n] float64 on the CPU: the mean squared error of the velocity per pair. Arguments as in `measure`."""
        starts = range(0, len(self.draws.t), self.pairs_at_once)
        with evaluation_mode(field):
            parts = [self._errors(field, standardization, slice(start, start + self.pairs_at_once)) for start in starts]
        return torch.cat(parts).cpu()

    def _errors(self, field: nn.Module, standardization: Standardization, rows: slice) -> Tensor:
        """[rows] float64 on the device."""
        target, reference, condition = (
            standardization.to_final(frames[rows].to(self.device))
            for frames in (self.batch.target, self.batch.reference, self.batch.condition)
        )
        distance, t = self.batch.distance[rows].to(self.device), self.draws.t[rows].to(self.device)
        sample = self.sample(target, rows)
        predicted = field(sample.x_t, reference, condition, distance, t)
        # As `flow_matching_loss`, but per pair: the mean then does not depend on the batch size.
        return (predicted.double() - sample.velocity.double()).square().flatten(1).mean(1)

    def sample(self, target: Tensor, rows: slice) -> PathSample:
        """Points [rows, c, h, w] at the times of the draws, and the right velocities there, on the device.

        Args:
            target: [rows, c, h, w] final latents.
        """
        return path_sample(target, self.draws.noise[rows].to(self.device), self.draws.t[rows].to(self.device))

    @in_full_precision
    def write_samples(
        self, field: nn.Module, standardization: Standardization, step: int, folder: Path
    ) -> dict[str, float]:
        """Predict the clips, and write `step_00005000.png` (contact sheet) and `.gif` to a folder.

        Args:
            field, standardization: as in `measure`.
            step: number of steps trained.
        Returns:
            `validation_sample_psnr` [dB] of predicted frames against decoded latents; empty without clips.
        """
        return {} if self.clips is None else self.clips.write(field, standardization, step, folder)


def open_flow_validation(config: RiverConfig, cache_url: str | Path, device: torch.device) -> FlowValidation | None:
    """Draw pairs, times and noise, and choose clips. Pairs are drawn as in training (clip_frames, past_horizon).

    Args:
        cache_url: a complete store.
        device: for fields and decoder.
    Returns:
        None, with a message, if there is no val split or none of its videos has three frames.
    Raises:
        StoreError: the val split can't be read.
    """
    training = config.flow.training
    if "val" not in latent_cache.splits(cache_url):
        say(f"flow: no validation: {cache_url} has no val split (dataset.splits makes one)")
        return None
    split = latent_cache.open(cache_url, "val")
    if split.lengths.max() < 3:
        say(
            f"flow: no validation: {cache_url}: a sample needs 3 frames, and the longest video of the val split has "
            f"{split.lengths.max()}"
        )
        return None
    batch = first_batch(
        split,
        config.seed,
        training.validation_pairs,
        training.clip_frames,
        past_horizon=training.past_horizon,
        recent_frames=config.flow.model.recent_frames,
    )
    return FlowValidation(
        batch=batch,
        draws=validation_draws(tuple(batch.target.shape), config.seed),
        device=device,
        pairs_at_once=rows_at_once(batch.target),
        clips=open_validation_clips(config, split, device),
    )


def validation_draws(shape: tuple[int, ...], seed: int) -> FlowDraws:
    """Noise [b, c, h, w] and times [b], functions of seed and shape, drawn on the CPU: the same for every device.

    Times are uniform, whatever the training's distribution, so that trainings can be compared; and stratified: one in
    each of b equal parts of [0, 1), in random order, which lowers the variance of the mean.
    """
    generator = step_generator(seed, 0, "cpu", "validation")
    pairs = shape[0]
    # t = (k + u) / b, in float64: in float32 k + u could round up to the next part, or to 1.
    place = torch.randperm(pairs, generator=generator)
    t = (place + torch.rand(pairs, generator=generator, dtype=torch.float64)) / pairs
    return FlowDraws(noise=torch.randn(shape, generator=generator), t=t.float().clamp(max=LAST_TIME))
