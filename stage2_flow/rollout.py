"""Predict latents frame by frame: each is integrated from noise, and becomes context for the next."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stage2_flow.conditioning import SamplingDraws, known_frames, past_window
from stage2_flow.config import SamplingConfig
from stage2_flow.path import SIGMA_MIN
from stage2_flow.solvers import SOLVERS, Solver, integrate

DEFAULT_STEPS = {"default": 10, "official": 100}
DEFAULT_SOLVER = {"default": "euler", "official": "rk4"}


@dataclass(frozen=True)
class SamplingPlan:
    """How each frame is integrated: with `solver`, on `points` equidistant times from `warm_start` to 1."""

    solver: Solver
    warm_start: float
    points: int

    @classmethod
    def from_config(cls, config: SamplingConfig) -> "SamplingPlan":
        """Resolve a preset and what overrides it.

        Raises:
            ValueError: preset official with too few steps for its warm start.
        """
        steps = config.steps or DEFAULT_STEPS[config.preset]
        points = steps + 1
        if config.preset == "official":
            # Points, not intervals, and truncated in floating point: 100 steps from warm start 0.9 give 9 points.
            points = int((1 - config.warm_start) * steps)
            if points < 2:
                raise ValueError(
                    f"sampling.steps {steps} with warm_start {config.warm_start} leaves "
                    f"int((1 - warm_start) * steps) = {points} time points, and preset official needs at least 2: "
                    "raise steps, lower warm_start, or take preset default, where steps counts intervals"
                )
        return cls(SOLVERS[config.solver or DEFAULT_SOLVER[config.preset]], config.warm_start, points)

    @property
    def evaluations(self) -> int:
        """Evaluations of the field a frame (NFE)."""
        return (self.points - 1) * self.solver.evaluations_per_step

    def time_points(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[points] times, made on the CPU: accelerators round a linspace otherwise."""
        return torch.linspace(self.warm_start, 1, self.points, dtype=dtype)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside (no dropout, BatchNorm statistics fixed), each submodule's own mode again after."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


@torch.no_grad()
def generate_latents(
    field: nn.Module,
    context: Tensor,
    num_frames: int,
    plan: SamplingPlan,
    draws: SamplingDraws,
    *,
    past_horizon: int | None = None,
    on_frame: Callable[[int], None] | None = None,
) -> Tensor:
    """Continue a batch of latent videos.

    Args:
        field: a `VectorField`, or a module that is called like one.
        context: [b, n, c, h, w] final latents, n >= 1. A single frame is taken twice, at distance 1.
        num_frames: frames to predict, at least 1.
        plan: solver and times.
        draws: noise and condition indices of exactly these frames, from `make_draws` or recorded ones.
        past_horizon: the one that draws were made with: they are held to it.
        on_frame: called after each frame with the number of frames predicted so far.
    Returns:
        [b, n + num_frames, c, h, w] float32 (float64 from float64): the context, then the prediction.
    Raises:
        ValueError: shapes that don't fit each other, or condition indices outside the past.
    Source: RIVER (ICCV 2023), section 3.4, Algorithm 2.
    """
    if context.ndim != 5:
        raise ValueError(f"context must be [b, n, c, h, w], got shape {list(context.shape)}")
    batch, given, *latent_shape = context.shape
    first_length = known_frames(given)
    _check_draws(draws, (num_frames, batch, *latent_shape), plan.evaluations, first_length, past_horizon)

    dtype = torch.promote_types(context.dtype, torch.float32)
    past = context.new_empty((batch, first_length + num_frames, *latent_shape), dtype=dtype)
    past[:, first_length - given : first_length] = context
    past[:, 0] = context[:, 0]  # a single frame's copy; else what is there
    noise = draws.noise.to(past)
    indices = draws.condition_indices.to(past.device)
    times = plan.time_points(dtype).to(past.device)
    with evaluation_mode(field):
        for frame in range(num_frames):
            length = first_length + frame
            past[:, length] = _next_latent(field, past[:, :length], noise[frame], indices[frame], times, plan)
            if on_frame is not None:
                on_frame(frame + 1)
    return past[:, first_length - given :]


def _next_latent(
    field: nn.Module, past: Tensor, noise: Tensor, indices: Tensor, times: Tensor, plan: SamplingPlan
) -> Tensor:
    """[b, c, h, w] after the past [b, length, c, h, w], with conditions at indices [evaluations, b] of it."""
    batch, length = past.shape[:2]
    rows = torch.arange(batch, device=past.device)
    reference = past[:, -1]
    distances = length - 1 - indices

    def velocity(t: Tensor, y: Tensor, evaluation: int) -> Tensor:
        # The condition is drawn anew at every evaluation, for each batch element.
        condition = past[rows, indices[evaluation]]
        return field(y, reference, condition, distances[evaluation], t.expand(batch)).to(y.dtype)

    # y0 = (1 - (1 - sigma_min) ws) noise + ws z_last: the point of the path from noise to the previous frame
    start = (1 - (1 - SIGMA_MIN) * plan.warm_start) * noise + plan.warm_start * reference
    return integrate(velocity, start, times, plan.solver)


def _check_draws(
    draws: SamplingDraws, noise_shape: tuple[int, ...], evaluations: int, first_length: int, past_horizon: int | None
) -> None:
    """Raise ValueError where draws don't fit the rollout."""
    num_frames, batch = noise_shape[:2]
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if tuple(draws.noise.shape) != noise_shape:
        raise ValueError(f"noise must be [frames, b, c, h, w] = {list(noise_shape)}, got {list(draws.noise.shape)}")
    wanted = (num_frames, evaluations, batch)
    if tuple(draws.condition_indices.shape) != wanted:
        raise ValueError(
            f"condition_indices must be [frames, evaluations, b] = {list(wanted)} for this plan, "
            f"got {list(draws.condition_indices.shape)}"
        )
    lowest = draws.condition_indices.amin(dim=(1, 2)).tolist()
    highest = draws.condition_indices.amax(dim=(1, 2)).tolist()
    for frame, (low, high) in enumerate(zip(lowest, highest, strict=True)):
        window = past_window(first_length + frame, past_horizon)
        if low < window.first or high >= window.first + window.count:
            raise ValueError(
                f"condition_indices of frame {frame} lie in {low}..{high}; allowed are "
                f"{window.first}..{window.first + window.count - 1} (past_horizon {past_horizon})"
            )
