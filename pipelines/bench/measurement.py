"""The results of a benchmark: rows of a table, and the file `benchmark.json` that holds them."""

from pydantic import BaseModel, ConfigDict, computed_field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """One row of the table.

    Attributes:
        name: what was measured.
        value, unit: the result.
        reference: what the value is compared to, in words and numbers.
        ratio: how the value compares to the reference; above 1 is better, unless `at_most` is set.
        at_least, at_most: the required range of the ratio.
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
        """Whether the ratio is in the required range; None without a ratio."""
        if self.ratio is None:
            return None
        return (self.at_least is None or self.ratio >= self.at_least) and (
            self.at_most is None or self.ratio <= self.at_most
        )

    def line(self) -> str:
        """The row as text."""
        required = ""
        if self.at_least is not None:
            required = f"required >= {self.at_least:g}"
        elif self.at_most is not None:
            required = f"required <= {self.at_most:g}"
        if self.reached is False:
            required += "  NOT REACHED"
        ratio = "" if self.ratio is None else f"{self.ratio:.3g}"
        value = f"{self.value:.4g} {self.unit}"
        return f"  {self.name:<52} {value:<22} {self.reference:<44} {ratio:>8}  {required}".rstrip()


class Benchmark(BaseModel):
    """Content of `benchmark.json`.

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
