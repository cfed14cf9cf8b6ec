"""What is looked at again and again while a flow is trained: a loss on fixed draws, and clips that are predicted."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

import latent_cache
from latent_cache import FlowBatch, LatentCache, open_sampler, step_generator
from latent_cache.schema import IDENTITY_VIEW
from pipelines.config import RiverConfig
from pipelines.metrics import psnr
from pipelines.pictures import animation, clip_strips, contact_sheet, save_gif
from pipelines.runtime.progress import say
from pipelines.train_autoencoder import find_autoencoder, load_trained_autoencoder, weights_digest
from stage1_autoencoder.autoencoder import Autoencoder
from stage2_flow.conditioning import known_frames, make_draws
from stage2_flow.config import SamplingConfig
from stage2_flow.loss import FlowDraws, draw_flow
from stage2_flow.path import path_sample
from stage2_flow.rollout import SamplingPlan, evaluation_mode, generate_latents
from stage2_flow.standardization import Standardization

# Pairs that go through the field, and frames that go through the autoencoder, at once.
PAIRS_AT_ONCE = 128
FRAMES_AT_ONCE = 64
# The loss is told apart by the time on the path, in so many equal parts: it is another task early and late.
TIME_BINS = 4
# Cheap, and the same whatever the run samples with, so that trainings can be compared.
SAMPLING = SamplingConfig(solver="euler", steps=10)


@dataclass(frozen=True)
class ValidationClips:
    """Clips of the val split that are predicted each time.

    Attributes:
        names: of the clips.
        latents: [b, n, c, h, w] raw latents on the CPU.
        truth: [b, n, 3, h f, w f] in [-1, 1] on the CPU, the decoded latents.
        context: frames that are given.
        fps: frames a second.
    """

    names: list[str]
    latents: Tensor
    truth: Tensor
    context: int
    fps: float


class FlowValidation:
    """Fixed pairs, times and noise of the val split, and clips; the same whatever is trained and on whatever device."""

    def __init__(
        self,
        batch: FlowBatch,
        draws: FlowDraws,
        device: torch.device,
        *,
        seed: int = 0,
        clips: ValidationClips | None = None,
        autoencoder: Autoencoder | None = None,
        title: str = "",
    ) -> None:
        """Take what `open_flow_validation` found.

        Args:
            batch: raw latents, on the CPU.
            draws: for its rows, on the CPU.
            device: where fields are evaluated.
            seed: of the clips' predictions.
            clips, autoencoder: what is predicted and what decodes it; None: nothing.
            title: what the pictures show.
        """
        self.batch, self.draws, self.device, self.seed = batch, draws, device, seed
        self.clips, self.autoencoder, self.title = clips, autoencoder, title

    @torch.no_grad()
    def measure(self, field: nn.Module, standardization: Standardization) -> dict[str, float]:
        """The flow matching loss.

        Args:
            field: a `VectorField`, evaluated as in sampling; its modes are afterwards what they were.
        Returns:
            `validation_loss`, the mean over all pairs, and `validation_loss_t0` .. `_t3` of those whose t lies in
            [0, .25), [.25, .5), ...
        """
        errors = []
        with evaluation_mode(field):
            for first in range(0, len(self.draws.t), PAIRS_AT_ONCE):
                errors.append(self._errors(field, standardization, slice(first, first + PAIRS_AT_ONCE)))
        error, t = torch.cat(errors).double().cpu(), self.draws.t
        measured = {"validation_loss": error.mean().item()}
        for number in range(TIME_BINS):
            inside = (t * TIME_BINS).long() == number
            if inside.any():
                measured[f"validation_loss_t{number}"] = error[inside].mean().item()
        return measured

    def _errors(self, field: nn.Module, standardization: Standardization, rows: slice) -> Tensor:
        """[b] mean squared error of the velocity, a pair."""
        final = [
            standardization.to_final(frames[rows].to(self.device))
            for frames in (self.batch.target, self.batch.reference, self.batch.condition)
        ]
        distance = self.batch.distance[rows].to(self.device)
        noise, t = self.draws.noise[rows].to(self.device), self.draws.t[rows].to(self.device)
        sample = path_sample(final[0], noise, t)
        predicted = field(sample.x_t, final[1], final[2], distance, t)
        return (predicted.float() - sample.velocity).square().flatten(1).mean(1)

    @torch.no_grad()
    def write_samples(
        self, field: nn.Module, standardization: Standardization, step: int, folder: Path
    ) -> dict[str, float]:
        """Predict the clips, and write `step_00005000.png` (contact sheet) and `.gif` to a folder.

        Returns:
            `validation_sample_psnr` [dB] of predicted frames against decoded latents; empty where there are no clips.
        """
        if self.clips is None or self.autoencoder is None:
            return {}
        clips, plan = self.clips, SamplingPlan.from_config(SAMPLING)
        given = clips.latents[:, : clips.context].to(self.device)
        horizon = clips.latents.shape[1] - clips.context
        draws = make_draws(
            self.seed,
            [(number, 0) for number in range(len(clips.names))],
            horizon,
            plan.evaluations,
            known_frames(clips.context),
            tuple(given.shape[2:]),
            None,
            self.device,
        )
        final = generate_latents(field, standardization.to_final(given), horizon, plan, draws)
        predicted = _decode(self.autoencoder, standardization.to_raw(final[:, clips.context :]), self.device)
        truth = clips.truth[:, clips.context :]
        value = psnr(*(rearrange(frames, "b n c h w -> (b n) c h w") for frames in (predicted, truth))).mean().item()
        shown = torch.cat([clips.truth[:, : clips.context], predicted], 1)
        rows = zip(clips.names, _pixels(clips.truth), _pixels(shown), strict=True)
        strips = [(name, clip_strips(real, made, clips.context)) for name, real, made in rows]
        folder.mkdir(parents=True, exist_ok=True)
        title = f"{self.title}, step {step}: decoded latents and what was predicted, PSNR {value:.2f} dB"
        sheet, moving = folder / f"step_{step:08d}.png", folder / f"step_{step:08d}.gif"
        contact_sheet(strips, title).save(_part(sheet), format="png")
        save_gif(_part(moving), animation(strips), clips.fps)
        for file in (sheet, moving):
            _part(file).replace(file)
        return {"validation_sample_psnr": value}


def open_flow_validation(config: RiverConfig, store: str, device: torch.device) -> FlowValidation | None:
    """Draw the validation's pairs, times and noise, and choose its clips; when it is done the split can leave memory.

    Times are stratified, one in each of as many equal parts of [0, 1) as there are pairs: whatever the training's
    times are, trainings can be compared, and the mean scatters less than with independent ones.

    Args:
        store: URL of a complete store.
        device: where fields will be evaluated, and latents decoded.
    Returns:
        None where there is no val split, or none of its videos has three frames, which is said.
    """
    training = config.flow.training
    if "val" not in latent_cache.splits(store):
        say("flow: no validation: the store has no val split (dataset.splits)")
        return None
    split = latent_cache.open(store, "val")
    if split.lengths.max() < 3:
        say("flow: no validation: no video of the val split has 3 frames")
        return None
    sampler = open_sampler(
        split,
        "cpu",
        config.seed,
        training.validation_pairs,
        training.clip_frames,
        residency="auto",
        memory_budget=config.cache.memory_budget_bytes,
        past_horizon=training.past_horizon,
    )
    with closing(sampler):
        batch = sampler.batch(0)
    draws = draw_flow(batch.target.shape, step_generator(config.seed, 0, stream="validation"), "cpu")
    pairs = training.validation_pairs
    draws = FlowDraws(noise=draws.noise, t=(torch.arange(pairs) + draws.t) / pairs)
    clips, autoencoder = None, None
    if training.validation_samples:
        autoencoder = _autoencoder(config, split, device)
    if autoencoder is not None:
        clips = _choose_clips(config, split, autoencoder, device)
    return FlowValidation(
        batch, draws, device, seed=config.sampling.seed, clips=clips, autoencoder=autoencoder, title=config.dataset.name
    )


def _autoencoder(config: RiverConfig, split: LatentCache, device: torch.device) -> Autoencoder | None:
    """The run's autoencoder if it is the one that encoded the store; else None, and why is said."""
    found = find_autoencoder(config.run_path)
    if found is None:
        say(f"flow: no predicted clips on the way: {config.run_path}/autoencoder, which would decode them, is not here")
        return None
    autoencoder = load_trained_autoencoder(found, device)
    ours, theirs = weights_digest(autoencoder), split.metadata.autoencoder["sha256"]
    if ours != theirs:
        say(
            f"flow: no predicted clips on the way: {found.path} is {ours[:12]}..., and the store was encoded by "
            f"{theirs[:12]}..."
        )
        return None
    return autoencoder


def _choose_clips(
    config: RiverConfig, split: LatentCache, autoencoder: Autoencoder, device: torch.device
) -> ValidationClips | None:
    """The first frames of videos that are spread over the split; None, which is said, where all are too short."""
    context, horizon = config.evaluation.context, config.evaluation.horizon
    wanted = config.flow.training.validation_samples
    lengths = split.lengths
    itself = [i for i, view in enumerate(split.video_views) if view == IDENTITY_VIEW and lengths[i] > context]
    if not itself:
        say(
            f"flow: no predicted clips on the way: no video of the val split has more than the {context} frames of "
            "evaluation.context"
        )
        return None
    whole = [i for i in itself if lengths[i] >= context + horizon] or itself
    chosen = [whole[i] for i in np.linspace(0, len(whole) - 1, min(wanted, len(whole))).round().astype(int)]
    frames = int(min(lengths[chosen].min(), context + horizon))
    if frames < context + horizon:
        say(
            f"flow: clips predicted on the way end after {frames - context} frames, where a video of the val split does"
        )
    names = [split.video_ids[i] for i in chosen]
    latents = torch.stack([torch.from_numpy(split.video(name)[:frames]).float() for name in names])
    truth = _decode(autoencoder, latents, device)
    return ValidationClips(names, latents, truth, context, split.metadata.fps)


@torch.no_grad()
def _decode(autoencoder: Autoencoder, latents: Tensor, device: torch.device) -> Tensor:
    """[b, n, c, h, w] raw latents to [b, n, 3, h f, w f] images in [-1, 1] on the CPU."""
    frames = rearrange(latents, "b n c h w -> (b n) c h w").split(FRAMES_AT_ONCE)
    images = torch.cat([autoencoder.decode(part.to(device)).clamp(-1, 1).cpu() for part in frames])
    return rearrange(images, "(b n) c h w -> b n c h w", b=len(latents))


def _pixels(videos: Tensor) -> np.ndarray:
    """[b, n, 3, h, w] in [-1, 1] to [b, n, h, w, 3] uint8."""
    return rearrange(videos.add(1).mul(127.5).round().to(torch.uint8), "b n c h w -> b n h w c").numpy()


def _part(file: Path) -> Path:
    """Where a file is written before it has its name."""
    return file.with_name(f".{file.name}.part{file.suffix}")
