"""Axes: where ticks stand, and how numbers are written."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WANTED_TICKS = 5


@dataclass(frozen=True)
class Scale:
    """From values to a line of pixels.

    Attributes:
        low, high: values at its ends.
        start, stop: pixels there.
        logarithmic: equal ratios are equally long.
    """

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Where a value lies; what has no place on a logarithmic scale lies at its beginning."""
        if self.logarithmic:
            value = math.log(max(value, self.low))
            low, high = math.log(self.low), math.log(self.high)
        else:
            low, high = self.low, self.high
        return self.start + (self.stop - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values within it."""
        return log_ticks(self.low, self.high) if self.logarithmic else linear_ticks(self.low, self.high)


def spread(values: Sequence[float], logarithmic: bool) -> tuple[float, float]:
    """The ends of a scale that holds values with a little air around them."""
    values = [value for value in values if math.isfinite(value) and (value > 0 or not logarithmic)]
    if not values:
        return (1.0, 10.0) if logarithmic else (0.0, 1.0)
    low, high = min(values), max(values)
    if logarithmic:
        factor = (high / low) ** 0.04 if high > low else 1.5
        return low / factor, high * factor
    air = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return low - air, high + air


def linear_ticks(low: float, high: float, wanted: int = WANTED_TICKS) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / raw)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def log_ticks(low: float, high: float, wanted: int = WANTED_TICKS) -> list[float]:
    """Powers of ten, with 2 and 5 times them where there are few; where these are few too, as on a linear scale."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [factor * 10.0**e for e in exponents for factor in factors if low <= factor * 10.0**e <= high]
        if len(found) >= 3:
            return found[:: -(-len(found) // (2 * wanted))]
    return linear_ticks(low, high, wanted=3)


def tick_text(value: float) -> str:
    """A tick: 0.25, 12, 1k, 2.5M; far below one as a power."""
    size = abs(value)
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if size >= 10 * factor or (size >= factor and value % (factor / 10) == 0):
            return f"{value / factor:g}{unit}"
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-") if size < 1e-3 else f"{value:.4g}"


def number_text(value: float | None, digits: int | None = None) -> str:
    """A number with so many digits after the point, or with four that matter."""
    if value is None:
        return "-"
    if digits is not None:
        return f"{value:.{digits}f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def interval_text(interval: Sequence[float | None] | None, digits: int | None = None) -> str:
    """`21.20 to 21.80`, or nothing."""
    if interval is None or None in interval:
        return ""
    return " to ".join(number_text(end, digits) for end in interval)
