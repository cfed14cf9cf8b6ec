"""Predict latents frame by frame: each is integrated from noise, and becomes context for the next."""

import weakref
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

# Evaluations of a frame up to which it is recorded as a whole; a longer one is recorded step by step: a graph of
# hundreds of evaluations has some 10^5 nodes.
MOST_RECORDED_EVALUATIONS = 64
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
    if context.ndim != 5:
        raise ValueError(f"context must be [b, n, c, h, w], got shape {list(context.shape)}")
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    farthest = past_window(known_frames(context.shape[1]) + num_frames - 1, past_horizon).count
    rollout = Rollout(field, plan, tuple(context[:, 0].shape), farthest, context.dtype, context.device)
    return rollout.run(context, num_frames, draws, past_horizon=past_horizon, on_frame=on_frame)


class Rollout:
    """Continues batches of one shape, frame by frame, in tensors that are allocated once.

    It keeps the frames that a condition can be drawn from, so that it can go on for ever. What computes a frame reads
    and writes only these tensors (the number of the solver step is one of them), so it can be recorded and replayed.
    """

    def __init__(
        self,
        field: nn.Module,
        plan: SamplingPlan,
        frame_shape: tuple[int, ...],
        farthest: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        trunk: Trunk | None = None,
        record: Recorder | None = None,
    ) -> None:
        """Allocate the tensors, and compute what is the same for all frames.

        Args:
            field: a `VectorField`, or a module that is called like one; its weights must not change afterwards.
            frame_shape: (b, c, h, w).
            farthest: largest distance between a condition and its reference, at least 1.
            dtype: dtype of the contexts; the state is float32, or float64 from float64.
            trunk: replaces `VectorField.trunk`, for example by its compiled form.
            record: makes repetitions of a frame (of a solver step, if a frame has very many) faster, for example as a
                CUDA graph.
        """
        batch, *latent_shape = frame_shape
        self.field, self.plan, self.farthest, self.length = field, plan, farthest, 0
        dtype = torch.promote_types(dtype, torch.float32)
        self.recent = getattr(field, "recent_frames", 1)
        kept = max(farthest + 1, self.recent)
        with torch.no_grad():
            self.past = torch.zeros((batch, kept, *latent_shape), dtype=dtype, device=device)  # the newest is the last
            self.noise = torch.zeros(frame_shape, dtype=dtype, device=device)
            self.y = torch.zeros_like(self.noise)
            self.times = plan.time_points(dtype).to(device)
            self.step = torch.zeros(1, dtype=torch.int64, device=device)
            self.distances = torch.ones((plan.evaluations, batch), dtype=torch.int64, device=device)
            self.rows = torch.arange(batch, device=device)
            self.evaluator: Evaluator = PlainEvaluator(field)
            if isinstance(field, VectorField):
                evaluation_times = plan.evaluation_times(dtype).to(device)
                self.evaluator = CachedEvaluator(field, evaluation_times, farthest, self.y, trunk)
        this = weakref.proxy(self)  # a cycle would keep the memory of a graph until the garbage collector comes
        if record is not None and plan.evaluations <= MOST_RECORDED_EVALUATIONS:
            self._compute_frame = record(partial(Rollout._compute_frame, this))
        elif record is not None:
            self._advance = record(partial(Rollout._advance, this))

    def run(
        self,
        context: Tensor,
        num_frames: int,
        draws: SamplingDraws,
        *,
        past_horizon: int | None = None,
        on_frame: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Continue one batch; arguments and result as in `generate_latents`."""
        noise_shape, given = (num_frames, *self.y.shape), context.shape[1]
        _check_draws(draws, noise_shape, self.plan.evaluations, known_frames(given), past_horizon)
        assert past_window(known_frames(given) + num_frames - 1, past_horizon).count <= self.farthest
        noise, indices = draws.noise.to(self.noise), draws.condition_indices.to(self.distances)
        video = self.past.new_empty((len(context), given + num_frames, *self.y.shape[1:]))
        video[:, :given] = context.detach()
        with evaluation_mode(self.field):
            self.begin(video[:, :given])
            for frame in range(num_frames):
                video[:, given + frame] = self.predict(noise[frame], indices[frame])
                if on_frame is not None:
                    on_frame(frame + 1)
        return video

    @torch.inference_mode()
    def begin(self, context: Tensor) -> None:
        """Make [b, n, c, h, w] final latents the past."""
        self.length = known_frames(context.shape[1])
        kept = context[:, -self.past.shape[1] :]
        self.past[:, -kept.shape[1] :] = kept
        # Before the first frame of a video is the first frame again, as in training.
        self.past[:, : -kept.shape[1]] = kept[:, :1]

    @torch.inference_mode()
    def predict(self, noise: Tensor, condition_indices: Tensor) -> Tensor:
        """Predict the next frame, which then belongs to the past.

        Args:
            noise: [b, c, h, w].
            condition_indices: [evaluations, b] int64, of frames at most `farthest` before the newest one; counted from
                the first frame of the context.
        Returns:
            [b, c, h, w] final latents.
        """
        self.noise.copy_(noise)
        self.distances.copy_(self.length - 1 - condition_indices)
        self._compute_frame()
        self.length += 1
        return self.y.clone()

    def _compute_frame(self) -> None:
        """Integrate from the noise to a frame. No Python number in it changes from frame to frame."""
        recent = [self.past[:, -back] for back in range(1, self.recent + 1)]
        self.evaluator.begin_frame(torch.cat(recent, dim=1))
        # y0 = (1 - (1 - sigma_min) ws) noise + ws z_last: the point of the path from noise to the previous frame
        warm_start = self.plan.warm_start
        self.y.copy_((1 - (1 - SIGMA_MIN) * warm_start) * self.noise + warm_start * recent[0])
        self.step.zero_()
        for _ in range(self.plan.steps):
            self._advance()
        self.past.copy_(torch.cat([self.past[:, 1:], self.y[:, None]], dim=1))

    def _advance(self) -> None:
        """One step of the solver. No Python number in it changes from step to step."""
        solver = self.plan.solver
        first = self.step * solver.evaluations_per_step

        def velocity(t: Tensor, y: Tensor, evaluation: int) -> Tensor:
            number = first + evaluation
            # Each evaluation has its own condition, for each batch element.
            distance = self.distances[number][0]
            condition = self.past[self.rows, -1 - distance]
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
