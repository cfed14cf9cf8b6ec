"""The flow matching loss and its random draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stage2_flow.config import TimeSampling
from stage2_flow.path import path_sample

if TYPE_CHECKING:  # for annotations only: sampling and the loss need no store
    from latent_cache.sampling.sampler import FlowBatch

# Share of the samples of a training that have noise on their past frames; the others are what sampling begins with.
NOISY_SHARE = 0.7


@dataclass(frozen=True)
class FlowDraws:
    """The random draws of a training step.

    Attributes:
        noise: [b, c, h, w] from N(0, I).
        t: [b] in [0, 1].
        past_noise: [b, (k + 1) c, h, w] noise that is added to the reference (k frames) and to the condition; None:
            none.
        noise_level: [b] its standard deviation.
    """

    noise: Tensor
    t: Tensor
    past_noise: Tensor | None = None
    noise_level: Tensor | None = None

    def rows(self, rows: slice) -> FlowDraws:
        """The draws of some batch elements, such as one process's part of the global batch."""
        values = (self.noise, self.t, self.past_noise, self.noise_level)
        return FlowDraws(*(None if value is None else value[rows] for value in values))


def draw_flow(
    batch_shape: tuple[int, ...],
    generator: torch.Generator,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    times: TimeSampling = "uniform",
    time_mean: float = 0.0,
    past_noise: float = 0.0,
    past_frames: int = 2,
) -> FlowDraws:
    """Draw times and noise for a batch, times first.

    Args:
        batch_shape: (b, c, h, w).
        generator: source of the numbers, which are drawn on its device and then moved to `device`.
        device: where the draws are placed.
        dtype: a float type.
        times: `uniform`: U[0, 1), as in the paper; `logit_normal`: sigmoid(N(time_mean, 1)), which spends more of the
            training where noise and data are about equal (Esser et al. 2024, Eq. 19, with scale 1).
        time_mean: below 0 more of the training has more noise.
        past_noise: largest standard deviation of the noise on past frames, uniform in [0, past_noise] for a share
            `NOISY_SHARE` of the samples and 0 for the others.
        past_frames: frames of reference and condition.
    """
    if times == "uniform":
        t = torch.rand(batch_shape[0], generator=generator, device=generator.device, dtype=dtype)
    else:
        normal = torch.randn(batch_shape[0], generator=generator, device=generator.device, dtype=dtype)
        t = (normal + time_mean).sigmoid()
    noise = torch.randn(batch_shape, generator=generator, device=generator.device, dtype=dtype)
    if not past_noise:
        return FlowDraws(noise=noise.to(device), t=t.to(device))
    b, c, h, w = batch_shape
    share, level = torch.rand(2, b, generator=generator, device=generator.device, dtype=dtype)
    level = torch.where(share < NOISY_SHARE, past_noise * level, 0.0)
    past = level[:, None, None, None] * torch.randn(
        (b, past_frames * c, h, w), generator=generator, device=generator.device, dtype=dtype
    )
    return FlowDraws(noise.to(device), t.to(device), past.to(device), level.to(device))


def flow_matching_loss(field: Callable[..., Tensor], batch: FlowBatch, draws: FlowDraws) -> Tensor:
    """Mean squared error between the field and the path's velocity.

    Args:
        field: a `VectorField`, or a wrapper that is called like one (compiled, distributed).
        batch: target, condition [b, c, h, w] and reference [b, k c, h, w] final latents, distance [b] int64 >= 1.
        draws: noise [b, c, h, w] and t [b].
    Returns:
        [] float32 (float64 from float64 latents), whatever precision the field uses.
    Source: RIVER (ICCV 2023), section 3.2, Algorithm 1.
    """
    sample = path_sample(batch.target, draws.noise, draws.t)
    reference, condition = batch.reference, batch.condition
    if draws.past_noise is None:
        predicted = field(sample.x_t, reference, condition, batch.distance, draws.t)
    else:
        noise = draws.past_noise.split([reference.shape[1], condition.shape[1]], dim=1)
        past = reference + noise[0], condition + noise[1]
        predicted = field(sample.x_t, *past, batch.distance, draws.t, draws.noise_level)
    # E || v(x_t, reference, condition, distance, t) - dx_t/dt ||^2, reduced in float32 or wider also under autocast.
    return (predicted.to(sample.velocity.dtype) - sample.velocity).square().mean()
