"""Distillation of a flow: what a student of a few Euler steps learns from a teacher's integration.

Time is divided into segments, one per evaluation of the student. In each, the student learns the mean velocity of the
teacher's solution, so that one Euler step goes where the teacher goes with its own solver: progressive distillation
(Salimans and Ho, ICLR 2022), for any solver and any number of the teacher's steps, in one stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stage2_flow.path import SIGMA_MIN, PathSample
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.solvers import SOLVERS

if TYPE_CHECKING:  # for annotations only, as in `loss`
    from latent_cache.sampling.sampler import FlowBatch

# (sqrt(5) - 1) / 2
GOLDEN_RATIO = 0.6180339887498949

Field = Callable[..., Tensor]  # a `VectorField`, or a wrapper that is called like one


@dataclass(frozen=True)
class Segments:
    """A teacher's steps in equal parts.

    Attributes:
        teacher: its solver and times.
        count: of segments, the student's evaluations per frame.
    Raises:
        ValueError: the teacher's steps can't be divided, or are already those of the student.
    """

    teacher: SamplingPlan
    count: int

    def __post_init__(self) -> None:
        if self.teacher.steps % self.count:
            raise ValueError(f"{self.teacher.steps} steps of the teacher can't be divided by {self.count}")
        if self.student == self.teacher:
            raise ValueError(f"the teacher's sampler is already {self.teacher.describe()}")

    @property
    def student(self) -> SamplingPlan:
        """The sampler that the student learns."""
        return SamplingPlan(SOLVERS["euler"], self.teacher.warm_start, self.count + 1)


@dataclass(frozen=True)
class DistillationDraws:
    """The random draws of a training step.

    Attributes:
        noise: [b, c, h, w] from N(0, I).
        segment: [b] int64, the segment that is learned.
        own_noise: [n, b, c, h, w] from N(0, I), for predictions of the student itself.
        own_frames: of each of the b rows, how many of these, one after the other, are its newest past frames: 0 to n.
    """

    noise: Tensor
    segment: Tensor
    own_noise: Tensor
    own_frames: tuple[int, ...]

    def rows(self, rows: slice) -> DistillationDraws:
        """The draws of some batch elements."""
        return DistillationDraws(self.noise[rows], self.segment[rows], self.own_noise[:, rows], self.own_frames[rows])


def draw_distillation(
    batch_shape: tuple[int, ...],
    segments: int,
    own_frames: tuple[int, ...],
    generator: torch.Generator,
    device: torch.device | str,
) -> DistillationDraws:
    """Draw noise and segments.

    Args:
        batch_shape: (b, c, h, w).
        segments: their number.
        own_frames: see `DistillationDraws`.
        generator: source of the numbers, which are drawn on its device and then moved to `device`.
        device: where the draws are placed.
    """
    on, b = generator.device, batch_shape[0]
    noise = torch.randn(batch_shape, generator=generator, device=on)
    segment = torch.randint(segments, (b,), generator=generator, device=on)
    own_noise = torch.randn((max(own_frames), *batch_shape), generator=generator, device=on)
    return DistillationDraws(*(x.to(device) for x in (noise, segment, own_noise)), own_frames)


def spread_own_frames(rows: int, share: float, most: int) -> tuple[int, ...]:
    """Numbers of own past frames for the rows of a batch.

    Which rows have which number is fixed, as rows are drawn alike, so that shapes are known. Any part of the batch has
    nearly its share of each number.

    Args:
        share: of the rows with 1 to `most`, each as often; the others have 0.
    """
    # Multiples of the golden ratio fill [0, 1) evenly from the first on.
    places = [row * GOLDEN_RATIO % 1 for row in range(rows)]
    return tuple(1 + int(place / share * most) if place < share else 0 for place in places)


def solve(field: Field, batch: FlowBatch, noise: Tensor, plan: SamplingPlan) -> Tensor:
    """Integrate one frame, with one condition for all evaluations.

    Args:
        batch: reference [b, k c, h, w] and condition [b, c, h, w] final latents, distance [b]; the target is not used.
        noise: [b, c, h, w].
    Returns:
        [points, b, c, h, w] float32 (float64 from float64): the solution at the plan's times.
    """
    dtype = torch.promote_types(noise.dtype, torch.float32)
    newest = batch.reference[:, : noise.shape[1]]

    def velocity(t: Tensor, y: Tensor, evaluation: int) -> Tensor:
        return field(y, batch.reference, batch.condition, batch.distance, t.expand(len(y))).to(dtype)

    # As in a rollout: y0 = (1 - (1 - sigma_min) ws) noise + ws z_last
    y = (1 - (1 - SIGMA_MIN) * plan.warm_start) * noise.to(dtype) + plan.warm_start * newest.to(dtype)
    solution = [y]
    for t, t_next in pairwise(_times(plan, dtype, noise.device)):
        solution.append(plan.solver.step(velocity, t, t_next, solution[-1]))
    return torch.stack(solution)


@dataclass(frozen=True)
class DistillationSample(PathSample):
    """Points at the beginning of segments, and the mean velocity of the teacher there, [b, c, h, w].

    Attributes:
        t: [b] the points' times.
    """

    t: Tensor


@torch.no_grad()
def distillation_sample(
    teacher: Field, batch: FlowBatch, noise: Tensor, segment: Tensor, segments: Segments
) -> DistillationSample:
    """What a student learns, from the teacher's solution that begins at the noise.

    Args:
        teacher: in evaluation mode.
        batch, noise: see `solve`.
        segment: [b] int64.
    """
    every = segments.teacher.steps // segments.count
    ends = solve(teacher, batch, noise, segments.teacher)[::every]
    times = _times(segments.student, ends.dtype, ends.device)
    rows = torch.arange(len(noise), device=noise.device)
    first, last, t = ends[segment, rows], ends[segment + 1, rows], times[segment]
    # u(x(t_i), t_i) = (x(t_i+1) - x(t_i)) / (t_i+1 - t_i)
    length = (times[segment + 1] - t).reshape(-1, *(1,) * (noise.ndim - 1))
    return DistillationSample(x_t=first, velocity=(last - first) / length, t=t)


def distillation_loss(field: Field, batch: FlowBatch, sample: DistillationSample) -> Tensor:
    """Mean squared error between the student and the teacher's mean velocities.

    Args:
        field: the student.
        batch: the past frames of the sample, see `solve`.
    Returns:
        [] float32 (float64 from float64), whatever precision the field uses.
    """
    predicted = field(sample.x_t, batch.reference, batch.condition, batch.distance, sample.t)
    return (predicted.to(sample.velocity.dtype) - sample.velocity).square().mean()


@torch.no_grad()
def with_own_past(
    student: Field, batch: FlowBatch, draws: DistillationDraws, plan: SamplingPlan, longest_distance: int
) -> FlowBatch:
    """The past of a later frame, for the rows whose newest past frames are the student's own predictions.

    In a rollout the past is the student's own imperfect frames. No true frame follows them, and none is needed: the
    teacher predicts one from any past.

    Args:
        student: in evaluation mode.
        batch: final latents, see `solve`.
        plan: the student's.
        longest_distance: of a condition. One that would be farther is replaced by the newest frame before the own one.
    Returns:
        Past frames; the target stays as it is.
    """
    reference, condition, distance = batch.reference, batch.condition, batch.distance
    channels = condition.shape[1]
    for number in range(max(draws.own_frames)):
        rows = _index(tuple(row for row, own in enumerate(draws.own_frames) if own > number), reference.device)
        past = replace(
            batch,
            target=batch.target[rows],
            reference=reference[rows],
            condition=condition[rows],
            distance=distance[rows],
        )
        own = solve(student, past, draws.own_noise[number][rows], plan)[-1].to(reference.dtype)
        newest = past.reference[:, :channels]
        too_far = past.distance >= longest_distance
        moved = torch.cat([own, past.reference[:, :-channels]], dim=1)
        reference = reference.index_copy(0, rows, moved)
        condition = condition.index_copy(0, rows, torch.where(too_far[:, None, None, None], newest, past.condition))
        distance = distance.index_copy(0, rows, torch.where(too_far, 1, past.distance + 1))
    return replace(batch, reference=reference, condition=condition, distance=distance)


@cache
def _index(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Row numbers on a device, copied once: a copy makes the host wait for a GPU."""
    return torch.tensor(rows, device=device)


@cache
def _times(plan: SamplingPlan, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A plan's times on a device, copied once."""
    return plan.time_points(dtype).to(device)
