"""What one measurement is, and how two are made in turn."""

import time
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, computed_field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, config=ConfigDict(ser_json_inf_nan="constants"))
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

    @computed_field
    @property
    def reached(self) -> bool | None:
        """Whether the demand is met; None where there is none."""
        if self.ratio is None:
            return None
        return (self.at_least is None or self.ratio >= self.at_least) and (
            self.at_most is None or self.ratio <= self.at_most
        )


class Benchmark(BaseModel):
    """`benchmark.json`: all measurements of one call, and the machine they belong to.

    Attributes:
        date: ISO 8601, UTC.
        hardware: the machine in words.
        software: package -> version.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    date: str
    hardware: str
    software: dict[str, str]
    measurements: list[Measurement]


def in_turn(*functions: Callable[[], object], repeats: int) -> list[float]:
    """Least seconds of each function, run in turn so that what disturbs the machine disturbs all of them."""
    least = [float("inf")] * len(functions)
    for _ in range(repeats):
        for number, function in enumerate(functions):
            started = time.perf_counter()
            function()
            least[number] = min(least[number], time.perf_counter() - started)
    return least
