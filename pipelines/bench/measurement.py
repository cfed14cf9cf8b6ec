"""What one measurement is, and how two are made in turn."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """One line of the table.

    Attributes:
        name: what was measured.
        value, unit: ours.
        reference: what it is held against, in words and numbers; empty where there is nothing.
        ratio: ours to the reference, or the value itself; None where nothing is demanded of it.
        at_least, at_most: what is demanded of the ratio.
    """

    name: str
    value: float
    unit: str
    reference: str = ""
    ratio: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the demand is met; None where there is none."""
        if self.ratio is None:
            return None
        return (self.at_least is None or self.ratio >= self.at_least) and (
            self.at_most is None or self.ratio <= self.at_most
        )


def in_turn(*functions: Callable[[], object], repeats: int) -> list[float]:
    """Least seconds of each function, run in turn so that what disturbs the machine disturbs all of them."""
    least = [float("inf")] * len(functions)
    for _ in range(repeats):
        for number, function in enumerate(functions):
            started = time.perf_counter()
            function()
            least[number] = min(least[number], time.perf_counter() - started)
    return least
