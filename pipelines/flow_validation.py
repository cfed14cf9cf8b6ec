"""What is looked at again and again while a flow is trained: a loss on fixed draws, and clips that are predicted."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import latent_cache
from latent_cache import FlowBatch, open_sampler, step_generator
from pipelines.config import RiverConfig
from pipelines.flow_validation_clips import ValidationClips, open_validation_clips, rows_at_once
from pipelines.runtime.progress import say
from stage2_flow.loss import FlowDraws
from stage2_flow.path import path_sample
from stage2_flow.rollout import evaluation_mode
from stage2_flow.standardization import Standardization

# The loss is told apart by the time on the path, in so many equal parts: it is another task early and late.
TIME_BINS = 4
LAST_TIME = 1 - 2**-24  # the largest float32 below 1


@dataclass(frozen=True, eq=False)
class FlowValidation:
    """Fixed pairs, times and noise of the val split, and clips; the same whatever is trained and on whatever device.

    It changes nothing of the training: no mode of a module, no statistics, no state of a random generator.

    Attributes:
        batch: [n] pairs of raw latents, float32 on the CPU.
        draws: their noise and times, on the CPU.
        device: where fields are evaluated.
        pairs_at_once: that go through the field, to bound memory.
        clips: what `write_samples` predicts; None: nothing.
    """

    batch: FlowBatch
    draws: FlowDraws
    device: torch.device
    pairs_at_once: int
    clips: ValidationClips | None = None

    def measure(self, field: nn.Module, standardization: Standardization) -> dict[str, float]:
        """The flow matching loss, of noise drawn independently whatever the training's coupling is.

        Args:
            field: a `VectorField` on the device; its modes are afterwards what they were.
            standardization: from raw latents to those that the field knows.
        Returns:
            `validation_loss`, the mean over all pairs, and `validation_loss_t0` .. `_t3`, the means over those whose t
            lies in [0, .25), [.25, .5), [.5, .75), [.75, 1); without parts that have no pair.
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
        """[n] float64 on the CPU: the mean squared error of the velocity, a pair. Arguments as in `measure`."""
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
        distance, noise, t = (
            values[rows].to(self.device) for values in (self.batch.distance, self.draws.noise, self.draws.t)
        )
        sample = path_sample(target, noise, t)
        predicted = field(sample.x_t, reference, condition, distance, t)
        # As `flow_matching_loss`, but a number a pair: their mean is then the same in parts of any size.
        return (predicted.double() - sample.velocity.double()).square().flatten(1).mean(1)

    def write_samples(
        self, field: nn.Module, standardization: Standardization, step: int, folder: Path
    ) -> dict[str, float]:
        """Predict the clips, and write `step_00005000.png` (contact sheet) and `.gif` to a folder.

        Args:
            field, standardization: as in `measure`.
            step: steps that were trained.
        Returns:
            `validation_sample_psnr` [dB] of predicted frames against decoded latents; empty where there are no clips.
        """
        return {} if self.clips is None else self.clips.write(field, standardization, step, folder)


def open_flow_validation(config: RiverConfig, cache_url: str | Path, device: torch.device) -> FlowValidation | None:
    """Draw the validation's pairs, times and noise, and choose its clips; when it is done the split can leave memory.

    Pairs are drawn as the training draws its own (clip_frames, past_horizon, condition_draw).

    Args:
        cache_url: a complete store.
        device: where fields will be evaluated, and latents decoded.
    Returns:
        None where there is no val split, or none of its videos has three frames, which is said.
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
            f"flow: no validation: {cache_url}: a sample has 3 frames, and the longest video of the val split "
            f"{split.lengths.max()}"
        )
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
        condition_draw=training.condition_draw,
    )
    with closing(sampler):
        batch = sampler.batch(0)
    return FlowValidation(
        batch=batch,
        draws=validation_draws(tuple(batch.target.shape), config.seed),
        device=device,
        pairs_at_once=rows_at_once(batch.target),
        clips=open_validation_clips(config, split, device),
    )


def validation_draws(shape: tuple[int, ...], seed: int) -> FlowDraws:
    """Noise [b, c, h, w] and times [b], a function of seed and shape, made on the CPU: the same for every device.

    Times are uniform whatever those of the training are, so that trainings can be compared, and stratified: one in
    each of b equal parts of [0, 1), in a drawn order, so that the mean scatters less than with independent ones.
    """
    generator = step_generator(seed, 0, "cpu", "validation")
    pairs = shape[0]
    # t = (k + u) / b, in float64: in float32 k + u could round up to the next part, or to 1.
    place = torch.randperm(pairs, generator=generator)
    t = (place + torch.rand(pairs, generator=generator, dtype=torch.float64)) / pairs
    return FlowDraws(noise=torch.randn(shape, generator=generator), t=t.float().clamp(max=LAST_TIME))
