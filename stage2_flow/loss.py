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


@dataclass(frozen=True)
class FlowDraws:
    """The random draws of a training step: `noise` [b, c, h, w] from N(0, I), and `t` [b] in [0, 1]."""

    noise: Tensor
    t: Tensor

    def rows(self, rows: slice) -> FlowDraws:
        """The draws of some batch elements, such as one process's part of the global batch."""
        return FlowDraws(noise=self.noise[rows], t=self.t[rows])


def draw_flow(
    batch_shape: tuple[int, ...],
    generator: torch.Generator,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    times: TimeSampling = "uniform",
) -> FlowDraws:
    """Draw times and noise for a batch, times first.

    Args:
        batch_shape: (b, c, h, w).
        generator: source of the numbers, which are drawn on its device and then moved to `device`.
        device: where the draws are placed.
        dtype: a float type.
        times: `uniform`: U[0, 1), as in the paper; `logit_normal`: sigmoid(N(0, 1)), which spends more of the training
            where noise and data are about equal (Esser et al. 2024, Eq. 19, with mean 0 and scale 1).
    """
    if times == "uniform":
        t = torch.rand(batch_shape[0], generator=generator, device=generator.device, dtype=dtype)
    else:
        t = torch.randn(batch_shape[0], generator=generator, device=generator.device, dtype=dtype).sigmoid()
    noise = torch.randn(batch_shape, generator=generator, device=generator.device, dtype=dtype)
    return FlowDraws(noise=noise.to(device), t=t.to(device))


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
    predicted = field(sample.x_t, batch.reference, batch.condition, batch.distance, draws.t)
    # E || v(x_t, reference, condition, distance, t) - dx_t/dt ||^2, reduced in float32 or wider also under autocast.
    return (predicted.to(sample.velocity.dtype) - sample.velocity).square().mean()
