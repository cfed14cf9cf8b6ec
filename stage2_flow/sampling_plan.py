"""How a frame is integrated: sampling options resolved to a solver and its times."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from stage2_flow.config import SamplingConfig
from stage2_flow.solvers import SOLVERS, Solver

DEFAULT_SOLVER = {"default": "midpoint", "official": "rk4-38"}
# Where `study` has chosen nothing.
DEFAULT_EVALUATIONS = 8
OFFICIAL_STEPS = 100


@dataclass(frozen=True)
class SamplingPlan:
    """Each frame is integrated with `solver` over `points` equidistant times from `warm_start` to 1."""

    solver: Solver
    warm_start: float
    points: int

    @classmethod
    def from_config(cls, config: SamplingConfig) -> "SamplingPlan":
        """Resolve a preset and the options that override it.

        Raises:
            ValueError: preset official with too few steps for its warm start; `nfe` that is no whole number of steps.
        """
        solver = SOLVERS[config.solver or DEFAULT_SOLVER[config.preset]]
        if config.nfe is not None:
            return cls(solver, config.warm_start, _points(config.nfe, solver))
        if config.preset == "default":
            points = _points(DEFAULT_EVALUATIONS, solver) if config.steps is None else config.steps + 1
        else:
            steps = config.steps or OFFICIAL_STEPS
            # Points, not intervals, and truncated in floating point: 100 steps from warm start 0.9 give 9 points.
            points = int((1 - config.warm_start) * steps)
            if points < 2:
                raise ValueError(
                    f"sampling.steps {steps} with warm_start {config.warm_start} leaves "
                    f"int((1 - warm_start) * steps) = {points} time points, and preset official needs at least 2: "
                    "raise steps, lower warm_start, or use preset default, where steps counts intervals"
                )
        return cls(solver, config.warm_start, points)

    @property
    def steps(self) -> int:
        """Solver steps per frame."""
        return self.points - 1

    @property
    def evaluations(self) -> int:
        """Evaluations of the field per frame (NFE)."""
        return self.steps * self.solver.evaluations_per_step

    def describe(self) -> str:
        """Solver and evaluations, in a few words."""
        return f"{self.solver.name}, {self.evaluations} evaluation{'s' * (self.evaluations != 1)} per frame"

    def time_points(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[points] times, made on the CPU because accelerators round a linspace differently."""
        return torch.linspace(self.warm_start, 1, self.points, dtype=dtype)

    def evaluation_times(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[evaluations] times at which the field is evaluated, in order, on the CPU."""
        times: list[Tensor] = []

        def velocity(t: Tensor, y: Tensor, evaluation: int) -> Tensor:
            times.append(t)
            return y

        for t, t_next in pairwise(self.time_points(dtype)):
            self.solver.step(velocity, t, t_next, torch.zeros((), dtype=dtype))
        return torch.stack(times)


def _points(nfe: int, solver: Solver) -> int:
    steps, rest = divmod(nfe, solver.evaluations_per_step)
    if rest or not steps:
        least = max(1, steps) * solver.evaluations_per_step
        raise ValueError(
            f"sampling.nfe {nfe}: {solver.name} evaluates the field {solver.evaluations_per_step} times per step, so "
            f"nfe must be a multiple of that: use {least} or {least + solver.evaluations_per_step}, or another solver"
        )
    return steps + 1
