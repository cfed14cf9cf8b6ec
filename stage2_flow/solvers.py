"""Fixed-step solvers of dy/dt = v(t, y), as small pure functions."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# velocity(t [], y [...], number of the evaluation within the step, from 0) -> like y
VelocityFunction = Callable[[Tensor, Tensor, int], Tensor]


def _euler(velocity: VelocityFunction, t: Tensor, t_next: Tensor, y: Tensor) -> Tensor:
    # y += h v(t, y)
    return y + (t_next - t) * velocity(t, y, 0)


def _midpoint(velocity: VelocityFunction, t: Tensor, t_next: Tensor, y: Tensor) -> Tensor:
    # y += h v(t + h/2, y + h/2 v(t, y))
    h = t_next - t
    k1 = velocity(t, y, 0)
    return y + h * velocity(t + h / 2, y + h / 2 * k1, 1)


def _heun(velocity: VelocityFunction, t: Tensor, t_next: Tensor, y: Tensor) -> Tensor:
    # y += h/2 (k1 + k2), k1 = v(t, y), k2 = v(t + h, y + h k1)
    h = t_next - t
    k1 = velocity(t, y, 0)
    k2 = velocity(t_next, y + h * k1, 1)
    return y + h / 2 * (k1 + k2)


def _rk4(velocity: VelocityFunction, t: Tensor, t_next: Tensor, y: Tensor) -> Tensor:
    # The classical Runge-Kutta method: y += h/6 (k1 + 2 k2 + 2 k3 + k4)
    h = t_next - t
    k1 = velocity(t, y, 0)
    k2 = velocity(t + h / 2, y + h / 2 * k1, 1)
    k3 = velocity(t + h / 2, y + h / 2 * k2, 2)
    k4 = velocity(t_next, y + h * k3, 3)
    return y + (k1 + 2 * (k2 + k3) + k4) * h / 6


def _rk4_38(velocity: VelocityFunction, t: Tensor, t_next: Tensor, y: Tensor) -> Tensor:
    # Kutta's 3/8 rule, not the classical method: torchdiffeq, and so the official code, calls it rk4.
    h, third = t_next - t, 1 / 3
    k1 = velocity(t, y, 0)
    k2 = velocity(t + h * third, y + h * k1 * third, 1)
    k3 = velocity(t + h * (2 * third), y + h * (k2 - k1 * third), 2)
    k4 = velocity(t_next, y + h * (k1 - k2 + k3), 3)
    return y + (k1 + 3 * (k2 + k3) + k4) * h / 8


@dataclass(frozen=True)
class Solver:
    """A one-step method.

    Attributes:
        order: the error falls with the step size to this power.
        evaluations_per_step: calls of the velocity per step.
        step: (velocity, t [], t_next [], y [...]) -> y at t_next.
    """

    name: str
    order: int
    evaluations_per_step: int
    step: Callable[[VelocityFunction, Tensor, Tensor, Tensor], Tensor]


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
