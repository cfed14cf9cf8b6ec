"""Predict latents frame by frame: each is integrated from noise, and becomes context for the next."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stage2_flow.conditioning import SamplingDraws, known_frames, past_window
from stage2_flow.evaluators import CachedEvaluator, Evaluator, PlainEvaluator, Trunk
from stage2_flow.path import SIGMA_MIN
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.vector_field import VectorField

# Hands back a function that does the same as the given one, which works on tensors that stay where they are.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]


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
    """Continue a batch of latent videos; for several batches of the same sizes see `Rollout`.

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
    _check_context(context)
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    rollout = Rollout(field, plan, tuple(context.shape), num_frames, context.dtype, context.device)
    return rollout.run(context, draws, past_horizon=past_horizon, on_frame=on_frame)


class Rollout:
    """Continues batches of one shape, all of it in tensors that are made once.

    A solver step reads and writes these tensors alone, its number among them, so that it can be recorded and replayed
    for all steps of all frames; and what it costs does not depend on the number of past frames.
    """

    def __init__(
        self,
        field: nn.Module,
        plan: SamplingPlan,
        context_shape: tuple[int, ...],
        num_frames: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        trunk: Trunk | None = None,
        record: Recorder | None = None,
    ) -> None:
        """Make the tensors, and compute what is the same for all frames.

        Args:
            field: a `VectorField`, or a module that is called like one; its weights must stay what they are.
            context_shape: (b, n, c, h, w) of the batches, n >= 1.
            num_frames: frames to predict, at least 1.
            dtype: of the contexts; the state is float32, or float64 from float64.
            trunk: the `VectorField`'s own in another form, such as compiled.
            record: makes a solver step faster where that is repeated, such as a CUDA graph.
        """
        batch, given, *latent_shape = context_shape
        self.field, self.plan, self.num_frames, self.given = field, plan, num_frames, given
        self.first_length = known_frames(given)
        dtype = torch.promote_types(dtype, torch.float32)
        length = self.first_length + num_frames
        with torch.no_grad():
            self.past = torch.zeros((batch, length, *latent_shape), dtype=dtype, device=device)
            self.y = torch.zeros((batch, *latent_shape), dtype=dtype, device=device)
            self.times = plan.time_points(dtype).to(device)
            self.step = torch.zeros(1, dtype=torch.int64, device=device)
            self.indices = torch.zeros((plan.evaluations, batch), dtype=torch.int64, device=device)
            self.distances = torch.ones_like(self.indices)
            self.rows = torch.arange(batch, device=device)
            self.evaluator: Evaluator = PlainEvaluator(field, self.y)
            if isinstance(field, VectorField):
                evaluation_times = plan.evaluation_times(dtype).to(device)
                self.evaluator = CachedEvaluator(field, evaluation_times, length - 2, self.y, trunk)
        self._advance = self._solver_step if record is None else record(self._solver_step)

    def run(
        self,
        context: Tensor,
        draws: SamplingDraws,
        *,
        past_horizon: int | None = None,
        on_frame: Callable[[int], None] | None = None,
    ) -> Tensor:
        """As `generate_latents`."""
        _check_context(context)
        noise_shape = (self.num_frames, *self.y.shape)
        _check_draws(draws, noise_shape, self.plan.evaluations, known_frames(context.shape[1]), past_horizon)
        first = self.first_length
        context = context.detach()
        self.past[:, first - self.given : first] = context
        self.past[:, 0] = context[:, 0]  # a single frame's copy; else what is there
        noise, indices = draws.noise.to(self.past), draws.condition_indices.to(self.past.device)
        distances = torch.arange(first, first + self.num_frames, device=indices.device)[:, None, None] - 1 - indices
        with torch.inference_mode(), evaluation_mode(self.field):
            for frame in range(self.num_frames):
                self._predict(first + frame, noise[frame], indices[frame], distances[frame])
                if on_frame is not None:
                    on_frame(frame + 1)
        return self.past[:, first - self.given :].clone()

    def _predict(self, length: int, noise: Tensor, indices: Tensor, distances: Tensor) -> None:
        """Write frame `length` of the past, from all before it."""
        reference = self.past[:, length - 1]
        self.indices.copy_(indices)
        self.distances.copy_(distances)
        self.evaluator.begin_frame(reference)
        # y0 = (1 - (1 - sigma_min) ws) noise + ws z_last: the point of the path from noise to the previous frame
        warm_start = self.plan.warm_start
        self.y.copy_((1 - (1 - SIGMA_MIN) * warm_start) * noise + warm_start * reference)
        self.step.zero_()
        for _ in range(self.plan.steps):
            self._advance()
        self.past[:, length] = self.y

    def _solver_step(self) -> None:
        """One step of the solver, with no number of Python's that changes from step to step."""
        solver = self.plan.solver
        first = self.step * solver.evaluations_per_step

        def velocity(t: Tensor, y: Tensor, evaluation: int) -> Tensor:
            number = first + evaluation
            # The condition is drawn anew at every evaluation, for each batch element.
            condition = self.past[self.rows, self.indices[number][0]]
            distance = self.distances[number][0]
            return self.evaluator.velocity(t, y, number, condition, distance).to(y.dtype)

        t, t_next = self.times[self.step][0], self.times[self.step + 1][0]
        self.y.copy_(solver.step(velocity, t, t_next, self.y, 0))
        self.step += 1


def _check_context(context: Tensor) -> None:
    if context.ndim != 5:
        raise ValueError(f"context must be [b, n, c, h, w], got shape {list(context.shape)}")


def _check_draws(
    draws: SamplingDraws, noise_shape: tuple[int, ...], evaluations: int, first_length: int, past_horizon: int | None
) -> None:
    """Raise ValueError where draws don't fit the rollout."""
    num_frames, batch = noise_shape[:2]
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
