"""Predict latents frame by frame: each is integrated from noise, and becomes context for the next."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_flow.conditioning import SamplingDraws, known_frames, past_window
from stage2_flow.linear import linear
from stage2_flow.path import SIGMA_MIN
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.vector_field import VectorField, time_embedding

# Returns a function that does the same as the given one, which works on tensors that are allocated once.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]
Trunk = Callable[[Tensor, Tensor, int, int], Tensor]  # see `VectorField.trunk`


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, BatchNorm statistics fixed); each submodule's own mode is restored afterwards."""
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
        field: a `VectorField`, or a module that is called like one, with references of `recent_frames` frames (one if
            it has no such attribute).
        context: [b, n, c, h, w] final latents, n >= 1. A single frame is used twice, at distance 1.
        num_frames: frames to predict, at least 1.
        plan: solver and times.
        draws: noise and condition indices of exactly these frames, from `make_draws` or recorded ones.
        past_horizon: the horizon that the draws were made with; they are checked against it.
        on_frame: called after each frame with the number of frames predicted so far.
    Returns:
        [b, n + num_frames, c, h, w] float32 (float64 from float64): the context, then the prediction.
    Raises:
        ValueError: shapes that do not fit together, or condition indices outside the past.
    Source: RIVER (ICCV 2023), section 3.4, Algorithm 2.
    """
    _check_context(context)
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    rollout = Rollout(field, plan, tuple(context.shape), num_frames, context.dtype, context.device)
    return rollout.run(context, draws, past_horizon=past_horizon, on_frame=on_frame)


class Rollout:
    """Continues batches of one shape, in tensors that are allocated once.

    A solver step reads and writes only these tensors (its own number is one of them), so it can be recorded and
    replayed for all steps of all frames, and its cost does not depend on the number of past frames.
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
        """Allocate the tensors, and compute what is the same for all frames.

        Args:
            field: a `VectorField`, or a module that is called like one; its weights must not change afterwards.
            context_shape: (b, n, c, h, w) of the batches, n >= 1.
            num_frames: frames to predict, at least 1.
            dtype: dtype of the contexts; the state is float32, or float64 from float64.
            trunk: replaces `VectorField.trunk`, for example by its compiled form.
            record: makes repetitions of a solver step faster, for example as a CUDA graph.
        """
        batch, given, *latent_shape = context_shape
        self.field, self.plan, self.num_frames, self.given = field, plan, num_frames, given
        self.first_length = known_frames(given)
        dtype = torch.promote_types(dtype, torch.float32)
        length = self.first_length + num_frames
        with torch.no_grad():
            self.past = torch.zeros((batch, length, *latent_shape), dtype=dtype, device=device)
            self.y = torch.zeros((batch, *latent_shape), dtype=dtype, device=device)
            self.recent = getattr(field, "recent_frames", 1)
            self.times = plan.time_points(dtype).to(device)
            self.step = torch.zeros(1, dtype=torch.int64, device=device)
            self.indices = torch.zeros((plan.evaluations, batch), dtype=torch.int64, device=device)
            self.distances = torch.ones_like(self.indices)
            self.rows = torch.arange(batch, device=device)
            self.evaluator: Evaluator = PlainEvaluator(field)
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
        """Continue one batch; arguments and result as in `generate_latents`."""
        _check_context(context)
        noise_shape = (self.num_frames, *self.y.shape)
        _check_draws(draws, noise_shape, self.plan.evaluations, known_frames(context.shape[1]), past_horizon)
        first = self.first_length
        context = context.detach()
        self.past[:, first - self.given : first] = context
        self.past[:, 0] = context[:, 0]  # the copy of a single context frame; otherwise unchanged
        noise, indices = draws.noise.to(self.past), draws.condition_indices.to(self.past.device)
        distances = torch.arange(first, first + self.num_frames, device=indices.device)[:, None, None] - 1 - indices
        with torch.inference_mode(), evaluation_mode(self.field):
            for frame in range(self.num_frames):
                self._predict(first + frame, noise[frame], indices[frame], distances[frame])
                if on_frame is not None:
                    on_frame(frame + 1)
        return self.past[:, first - self.given :].clone()

    def _predict(self, length: int, noise: Tensor, indices: Tensor, distances: Tensor) -> None:
        """Write frame `length` of the past, from all frames before it."""
        self.indices.copy_(indices)
        self.distances.copy_(distances)
        # Before the first frame of a video is the first frame again, as in training.
        recent = [self.past[:, max(0, length - back)] for back in range(1, self.recent + 1)]
        self.evaluator.begin_frame(torch.cat(recent, dim=1))
        # y0 = (1 - (1 - sigma_min) ws) noise + ws z_last: the point of the path from noise to the previous frame
        warm_start = self.plan.warm_start
        self.y.copy_((1 - (1 - SIGMA_MIN) * warm_start) * noise + warm_start * recent[0])
        self.step.zero_()
        for _ in range(self.plan.steps):
            self._advance()
        self.past[:, length] = self.y

    def _solver_step(self) -> None:
        """One step of the solver. No Python number in it changes from step to step, so it can be recorded."""
        solver = self.plan.solver
        first = self.step * solver.evaluations_per_step

        def velocity(t: Tensor, y: Tensor, evaluation: int) -> Tensor:
            number = first + evaluation
            # Each evaluation has its own condition, for each batch element.
            condition = self.past[self.rows, self.indices[number][0]]
            distance = self.distances[number][0]
            return self.evaluator.velocity(t, y, number, condition, distance).to(y.dtype)

        t, t_next = self.times[self.step][0], self.times[self.step + 1][0]
        self.y.copy_(solver.step(velocity, t, t_next, self.y))
        self.step += 1


class Evaluator(Protocol):
    """The field as an integration uses it: bound to the reference of one batch of frames."""

    def begin_frame(self, reference: Tensor) -> None:
        """Set the final latents [b, k c, h, w] of the k newest frames, the newest first."""

    def velocity(self, t: Tensor, y: Tensor, evaluation: Tensor, condition: Tensor, distance: Tensor) -> Tensor:
        """Evaluate the field.

        Args:
            t: [] time.
            y: [b, c, h, w] point of the path.
            evaluation: [1] int64, number of the evaluation within the frame; `t` is its time.
            condition: [b, c, h, w] final latents of a past frame.
            distance: [b] int64, from the condition to the reference.
        Returns:
            [b, c, h, w] in the field's precision.
        """
        ...


class PlainEvaluator:
    """Calls any field as it is, with copies of the tensors that a rollout overwrites."""

    def __init__(self, field: nn.Module) -> None:
        self.field = field
        self.reference: Tensor | None = None

    def begin_frame(self, reference: Tensor) -> None:
        self.reference = reference

    def velocity(self, t: Tensor, y: Tensor, evaluation: Tensor, condition: Tensor, distance: Tensor) -> Tensor:
        return self.field(y.clone(), self.reference, condition, distance, t.expand(len(y)))


class CachedEvaluator:
    """A `VectorField` whose embedding is computed in parts, each only when it changes.

    Once per rollout: the codes of all positions, times and distances. Once per frame: the projection of the reference.
    At each evaluation: the projection of the point and the condition, in fp32 whatever precision the trunk uses, since
    it takes a ten-thousandth of the work.
    """

    def __init__(
        self, field: VectorField, times: Tensor, longest: int, frame: Tensor, trunk: Trunk | None = None
    ) -> None:
        """Compute what does not change in a rollout.

        Args:
            times: [evaluations] times within a frame, on the device.
            longest: largest distance between a condition and its reference.
            frame: [b, c, h, w], of the shape and device of all frames.
            trunk: replaces `field.trunk`, for example by its compiled form.
        """
        self.project, projection = field.project, field.project_in["1"]
        self.dtype = projection.weight.dtype
        batch, channels, self.height, self.width = frame.shape
        self.trunk = trunk or field.trunk
        with torch.autocast(frame.device.type, enabled=False):
            # [features, frames c, ...]: the columns of the point, of the newest frames (if the field has them), of the
            # condition
            point, *newest, condition = projection.weight.split(channels, dim=1)
            self.varying = _layer(field, [point, condition])
            self.reference = _layer(field, newest) if newest else None
            self.static_tokens = projection.bias + field.position_encoding(self.height, self.width)
            if field.noise_projection is not None:
                self.static_tokens = self.static_tokens + field.noise_code(frame.new_zeros(1))
            self.time_tokens = time_embedding(times, field.config.width)
            # A distance is at least 1; entry 0 of the table is not used.
            self.distances = field.distance_code(torch.arange(longest + 1, device=frame.device).clamp(min=1))
        self.frame_tokens = self.static_tokens.expand(batch, -1, -1).clone()

    def begin_frame(self, reference: Tensor) -> None:
        if self.reference is not None:
            with torch.autocast(reference.device.type, enabled=False):
                projected = self.project(reference.to(self.dtype), self.reference)
            self.frame_tokens.copy_(self.static_tokens + projected)

    def velocity(self, t: Tensor, y: Tensor, evaluation: Tensor, condition: Tensor, distance: Tensor) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            varying = torch.cat([y, condition], dim=1).to(self.dtype)
            tokens = self.project(varying, self.varying) + self.frame_tokens + self.distances[distance][:, None]
        time_token = self.time_tokens[evaluation].expand(len(y), -1)
        return self.trunk(tokens, time_token, self.height, self.width)


def _layer(field: VectorField, columns: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """The field's input layer with some columns of its weight, and without its bias."""
    weight = torch.cat(list(columns), dim=1)
    if field.config.convolutions:
        return partial(F.conv2d, weight=weight, padding=1)
    return partial(linear, weight=weight)


def _check_context(context: Tensor) -> None:
    if context.ndim != 5:
        raise ValueError(f"context must be [b, n, c, h, w], got shape {list(context.shape)}")


def _check_draws(
    draws: SamplingDraws, noise_shape: tuple[int, ...], evaluations: int, first_length: int, past_horizon: int | None
) -> None:
    """Raise ValueError for draws that do not fit the rollout."""
    num_frames, batch = noise_shape[:2]
    if tuple(draws.noise.shape) != noise_shape:
        raise ValueError(f"noise must be [frames, b, c, h, w] = {list(noise_shape)}, got {list(draws.noise.shape)}")
    expected = (num_frames, evaluations, batch)
    if tuple(draws.condition_indices.shape) != expected:
        raise ValueError(
            f"condition_indices must be [frames, evaluations, b] = {list(expected)} for this plan, "
            f"got {list(draws.condition_indices.shape)}"
        )
    lowest = draws.condition_indices.amin(dim=(1, 2)).tolist()
    highest = draws.condition_indices.amax(dim=(1, 2)).tolist()
    for frame, (low, high) in enumerate(zip(lowest, highest, strict=True)):
        window = past_window(first_length + frame, past_horizon)
        if low < window.first or high >= window.first + window.count:
            raise ValueError(
                f"condition_indices of frame {frame} are in {low}..{high}; allowed are "
                f"{window.first}..{window.first + window.count - 1} (past_horizon {past_horizon})"
            )
