"""Distillation against teachers whose solutions are known."""

import pytest
import torch

from latent_cache import FlowBatch
from stage2_flow.distillation import (
    DistillationDraws,
    Segments,
    distillation_loss,
    distillation_sample,
    draw_distillation,
    solve,
    spread_own_frames,
    with_own_past,
)
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.solvers import SOLVERS

SHAPE = (6, 2, 3, 3)


def batch(frames: int = 2) -> FlowBatch:
    generator = torch.Generator().manual_seed(0)
    b, c, h, w = SHAPE
    target, condition = torch.randn(2, *SHAPE, dtype=torch.float64, generator=generator)
    reference = torch.randn(b, frames * c, h, w, dtype=torch.float64, generator=generator)
    return FlowBatch(target, reference, condition, torch.tensor([1, 2, 3, 4, 5, 6]))


def growth(x_t, reference, condition, distance, t):
    """dx/dt = x + a, so x(t) = (x(0) + a) e^t - a, with an `a` of its own per sample, from all that it is given."""
    return x_t + offset(reference, condition, distance)


def offset(reference, condition, distance):
    newest = reference[:, : condition.shape[1]]
    return newest - 2 * condition + distance[:, None, None, None]


def plan(solver: str, steps: int, warm_start: float = 0.0) -> SamplingPlan:
    return SamplingPlan(SOLVERS[solver], warm_start, steps + 1)


@pytest.mark.parametrize(("evaluations", "warm_start"), [(1, 0.0), (2, 0.0), (4, 0.2)])
def test_a_step_of_the_student_goes_where_the_teacher_s_solution_goes(evaluations, warm_start):
    past, noise = batch(), torch.randn(SHAPE, dtype=torch.float64)
    segments = Segments(plan("rk4", 32, warm_start), evaluations)
    times = segments.student.time_points(torch.float64)
    a = offset(past.reference, past.condition, past.distance)
    first = (1 - (1 - 1e-7) * warm_start) * noise + warm_start * past.reference[:, :2]
    for number in range(evaluations):
        sample = distillation_sample(growth, past, noise, torch.full((6,), number), segments)
        assert torch.equal(sample.t, times[number].expand(6))
        x, end = ((first + a) * (t - warm_start).exp() - a for t in (times[number], times[number + 1]))
        torch.testing.assert_close(sample.x_t, x, rtol=1e-7, atol=1e-7)  # of 32 steps of fourth order
        stepped = sample.x_t + (times[number + 1] - sample.t[0]) * sample.velocity
        torch.testing.assert_close(stepped, end, rtol=1e-7, atol=1e-7)


def test_a_student_that_knows_the_mean_velocity_has_no_loss_and_needs_one_step():
    past, noise = batch(), torch.randn(SHAPE, dtype=torch.float64)
    segments = Segments(plan("midpoint", 4), 1)
    h = 1 / 4
    grown = (1 + h + h**2 / 2) ** 4  # of a linear field in four midpoint steps

    def student(x_t, reference, condition, distance, t):
        assert not t.any()
        return (grown - 1) * (x_t + offset(reference, condition, distance))

    sample = distillation_sample(growth, past, noise, torch.zeros(6, dtype=torch.int64), segments)
    assert distillation_loss(student, past, sample) < 1e-24
    torch.testing.assert_close(
        solve(student, past, noise, segments.student)[-1], solve(growth, past, noise, segments.teacher)[-1]
    )
    off = distillation_loss(lambda *inputs: student(*inputs) + 0.5, past, sample)
    torch.testing.assert_close(off, torch.tensor(0.25, dtype=torch.float64))


def test_segments_of_a_batch_are_mixed():
    past, noise = batch(), torch.randn(SHAPE, dtype=torch.float64)
    segments, mixed = Segments(plan("euler", 6), 3), torch.tensor([0, 1, 2, 2, 1, 0])
    sample = distillation_sample(growth, past, noise, mixed, segments)
    for row, number in enumerate(mixed):
        alone = distillation_sample(growth, past, noise, number.expand(6), segments)
        assert torch.equal(sample.x_t[row], alone.x_t[row])
        assert torch.equal(sample.velocity[row], alone.velocity[row])


@pytest.mark.parametrize(("teacher", "count"), [(plan("euler", 2), 2), (plan("euler", 4), 3), (plan("euler", 1), 2)])
def test_a_teacher_without_anything_to_learn(teacher, count):
    with pytest.raises(ValueError, match=r"divided|already"):
        Segments(teacher, count)


@pytest.mark.parametrize("frames", [1, 2])
def test_own_frames_are_the_newest_and_the_condition_is_farther(frames):
    """As far as was trained; then the frame before the own one is the condition."""
    past, own_noise = batch(frames), torch.randn(2, *SHAPE, dtype=torch.float64)
    draws = DistillationDraws(own_noise[0], torch.zeros(6, dtype=torch.int64), own_noise, (1, 0, 2, 1, 2, 0))
    moved = with_own_past(growth, past, draws, plan("euler", 1), longest_distance=4)
    first = 2 * own_noise[0] + offset(past.reference, past.condition, past.distance)
    assert moved.distance.tolist() == [2, 2, 1, 1, 2, 6]  # row 2: 3, 4, and then 1
    for row in (1, 5):
        assert torch.equal(moved.reference[row], past.reference[row])
        assert torch.equal(moved.condition[row], past.condition[row])
    for row in (0, 3):
        torch.testing.assert_close(moved.reference[row, :2], first[row])
        assert torch.equal(moved.reference[row, 2:], past.reference[row, :-2])
    newest = past.reference[:, :2]
    assert torch.equal(moved.condition[0], past.condition[0])
    assert torch.equal(moved.condition[3], newest[3])
    assert torch.equal(moved.condition[4], newest[4])
    torch.testing.assert_close(moved.condition[2], first[2])
    second = 2 * own_noise[1, 4] + first[4] - 2 * newest[4] + 1
    torch.testing.assert_close(moved.reference[4, :2], second)
    if frames == 2:
        torch.testing.assert_close(moved.reference[4, 2:], first[4])


def test_every_part_of_a_batch_has_its_share_of_own_frames():
    numbers = spread_own_frames(600, 0.5, 3)
    for part in (numbers[:120], numbers[300:420], numbers):
        for number, share in {0: 1 / 2, 1: 1 / 6, 2: 1 / 6, 3: 1 / 6}.items():
            assert abs(part.count(number) - share * len(part)) <= 3
    assert spread_own_frames(8, 0.0, 3) == (0,) * 8
    assert set(spread_own_frames(8, 1.0, 1)) == {1}


def test_draws_are_those_of_the_generator_whatever_the_rows():
    def drawn():
        own_frames = spread_own_frames(400, 0.5, 2)
        return draw_distillation((400, 1, 1, 1), 2, own_frames, torch.Generator().manual_seed(3), "cpu")

    draws, part = drawn(), drawn().rows(slice(100, 200))
    assert torch.equal(draws.noise[100:200], part.noise)
    assert torch.equal(draws.own_noise[:, 100:200], part.own_noise)
    assert draws.own_frames[100:200] == part.own_frames
    assert abs(draws.segment.float().mean() - 0.5) < 4 * (0.25 / 400) ** 0.5
    assert len({*draws.noise.flatten().tolist(), *draws.own_noise.flatten().tolist()}) == 1200
