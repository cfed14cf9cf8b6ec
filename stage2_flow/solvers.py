"""Fixed-step solvers of dy/dt = v(t, y), as small pure functions."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# velocity(t [], y [...], index of the evaluation, counted from 0 over the whole integration) -> like y
VelocityFunction = Callable[[Tensor, Tensor, int], Tensor]


def _euler(velocity: VelocityFunction, t: Tensor, t_next: Tensor, y: Tensor, evaluation: int) -> Tensor:
    # y += h v(t, y)
    return y + (t_next - t) * velocity(t, y, evaluation)


def _midpoint(velocity: VelocityFunction, t: Tensor, t_next: Tensor, y: Tensor, evaluation: int) -> Tensor:
    # y += h v(t + h/2, y + h/2 v(t, y))
    h = t_next - t
    k1 = velocity(t, y, evaluation)
    return y + h * velocity(t + h / 2, y + h / 2 * k1, evaluation + 1)


def _heun(velocity: VelocityFunction, t: Tensor, t_next: Tensor, y: Tensor, evaluation: int) -> Tensor:
    # y += h/2 (k1 + k2), k1 = v(t, y), k2 = v(t + h, y + h k1)
    h = t_next - t
    k1 = velocity(t, y, evaluation)
    k2 = velocity(t_next, y + h * k1, evaluation + 1)
    return y + h / 2 * (k1 + k2)


def _rk4(velocity: VelocityFunction, t: Tensor, t_next: Tensor, y: Tensor, evaluation: int) -> Tensor:
    # The classical Runge-Kutta method: y += h/6 (k1 + 2 k2 + 2 k3 + k4)
    h = t_next - t
    k1 = velocity(t, y, evaluation)
    k2 = velocity(t + h / 2, y + h / 2 * k1, evaluation + 1)
    k3 = velocity(t + h / 2, y + h / 2 * k2, evaluation + 2)
    k4 = velocity(t_next, y + h * k3, evaluation + 3)
    return y + (k1 + 2 * (k2 + k3) + k4) * h / 6


def _rk4_38(velocity: VelocityFunction, t: Tensor, t_next: Tensor, y: Tensor, evaluation: int) -> Tensor:
    # Kutta's 3/8 rule, not the classical one: it is what torchdiffeq, and so the official code, calls rk4.
    h, third = t_next - t, 1 / 3
    k1 = velocity(t, y, evaluation)
    k2 = velocity(t + h * third, y + h * k1 * third, evaluation + 1)
    k3 = velocity(t + h * (2 * third), y + h * (k2 - k1 * third), evaluation + 2)
    k4 = velocity(t_next, y + h * (k1 - k2 + k3), evaluation + 3)
    return y + (k1 + 3 * (k2 + k3) + k4) * h / 8


@dataclass(frozen=True)
class Solver:
    """A one-step method: its error falls with the step to the power `order`."""

    name: str
    order: int
    evaluations_per_step: int
    step: Callable[[VelocityFunction, Tensor, Tensor, Tensor, int], Tensor]


SOLVERS = {
    solver.name: solver
    for solver in (
        Solver("euler", order=1, evaluations_per_step=1, step=_euler),
        Solver("midpoint", order=2, evaluations_per_step=2, step=_midpoint),
        Solver("heun", order=2, evaluations_per_step=2, step=_heun),
        Solver("rk4", order=4, evaluations_per_step=4, step=_rk4),
        Solver("rk4-38", order=4, evaluations_per_step=4, step=_rk4_38),
    )
}


def integrate(velocity: VelocityFunction, y0: Tensor, time_points: Tensor, solver: Solver) -> Tensor:
    """Integrate from the first time point to the last, one solver step an interval.

    Args:
        velocity: called with (t [] on y0's device and in its dtype, y like y0, index of the evaluation).
        y0: [...] float, the value at the first time point.
        time_points: [points] float, at least two.
        solver: one of `SOLVERS`.
    Returns:
        The value at the last time point, like y0.
    Raises:
        ValueError: fewer than two time points.
    """
    if len(time_points) < 2:
        raise ValueError(f"an integration needs at least 2 time points, got {len(time_points)}")
    # Times stay tensors on the device: reading one on the host would wait for the accelerator.
    times = time_points.to(y0.device, y0.dtype)
    y = y0
    for index, (t, t_next) in enumerate(pairwise(times)):
        y = solver.step(velocity, t, t_next, y, index * solver.evaluations_per_step)
    return y


def evaluation_times(time_points: Tensor, solver: Solver) -> Tensor:
    """The times at which an integration asks for the velocity.

    Args:
        time_points: [points] float, at least two.
        solver: one of `SOLVERS`.
    Returns:
        [(points - 1) evaluations_per_step] like `time_points`, in the order of the evaluations.
    """
    times: list[Tensor] = []

    def velocity(t: Tensor, y: Tensor, evaluation: int) -> Tensor:
        times.append(t)
        return y

    integrate(velocity, time_points.new_zeros(()), time_points, solver)
    return torch.stack(times)
