"""Solvers against closed forms, their orders, and torchdiffeq."""

import math
from itertools import pairwise

import pytest
import torch
from torchdiffeq import odeint

from stage2_flow.solvers import SOLVERS


def integrate(velocity, y, times, solver):
    for t, t_next in pairwise(times.to(y.dtype)):
        y = solver.step(velocity, t, t_next, y)
    return y


def swinging(t, y, evaluation=0):
    """dy/dt = y cos t, y(0) = 1: y = exp(sin t)."""
    return y * torch.cos(t)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_constant_field_is_integrated_exactly(solver):
    velocity = torch.tensor([0.5, -2.0], dtype=torch.float64)
    y0 = torch.tensor([1.0, 3.0], dtype=torch.float64)
    # Powers of two, so that no step is rounded.
    y = integrate(lambda t, y, evaluation: velocity, y0, torch.linspace(0, 1, 5), solver)
    torch.testing.assert_close(y, y0 + velocity, rtol=0, atol=1e-15)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_the_error_falls_with_the_step_to_the_order(solver):
    y0 = torch.ones((), dtype=torch.float64)
    errors = [
        abs(integrate(swinging, y0, torch.linspace(0, 2, steps + 1, dtype=torch.float64), solver).item()
            - math.exp(math.sin(2)))
        for steps in (40, 80)
    ]  # fmt: skip
    assert math.log2(errors[0] / errors[1]) == pytest.approx(solver.order, abs=0.15)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_evaluations_of_a_step_are_counted_from_0_and_begin_at_its_time(solver):
    calls = []
    solver.step(lambda t, y, evaluation: calls.append((evaluation, t.item())) or y, *torch.tensor([0.25, 1.0, 1.0]))
    assert [evaluation for evaluation, _ in calls] == list(range(solver.evaluations_per_step))
    assert calls[0][1] == 0.25


# torchdiffeq calls the 3/8 rule rk4, and Heun's method of order 2 heun2.
@pytest.mark.parametrize(("name", "theirs"), [("euler", "euler"), ("midpoint", "midpoint"), ("rk4-38", "rk4")])
def test_equals_torchdiffeq(name, theirs):
    y0 = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def velocity(t, y, evaluation=0):
        return torch.tanh(y @ matrix) * (1 + t)

    times = torch.tensor([0.0, 0.1, 0.4, 1.0], dtype=torch.float64)
    expected = odeint(velocity, y0, times, method=theirs)[-1]
    torch.testing.assert_close(integrate(velocity, y0, times, SOLVERS[name]), expected, rtol=1e-14, atol=1e-14)


def test_the_classical_rk4_takes_its_weights_from_simpson():
    """dy/dt = t^3 is integrated exactly; of dy/dt = y one step gives the exponential's first five terms."""
    y = integrate(lambda t, y, _: t**3, torch.zeros((), dtype=torch.float64), torch.linspace(0, 2, 2), SOLVERS["rk4"])
    assert y.item() == pytest.approx(4, abs=1e-14)
    for name in ("rk4", "rk4-38"):
        y = integrate(lambda t, y, _: y, torch.ones((), dtype=torch.float64), torch.linspace(0, 1, 2), SOLVERS[name])
        assert y.item() == pytest.approx(1 + 1 + 1 / 2 + 1 / 6 + 1 / 24, abs=1e-14)
    # t^4 tells them apart: Simpson's rule gives 5/24 for it, the 3/8 rule 11/54.
    for name, value in (("rk4", 5 / 24), ("rk4-38", 11 / 54)):
        y = integrate(
            lambda t, y, _: t**4, torch.zeros((), dtype=torch.float64), torch.linspace(0, 1, 2), SOLVERS[name]
        )
        assert y.item() == pytest.approx(value, abs=1e-14)
