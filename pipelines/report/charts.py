"""Line charts and histograms, which `templates/macros.html` draws as SVG, and numbers as text."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import ArrayLike

# Units of the drawing; it is shown at about this size, on a phone a little smaller.
WIDTH, HEIGHT = 440, 264
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 22, 40
MAX_POINTS = 240
# Longer lines have no dots, and their table shows every n-th point and the ends.
MAX_DOTS = 40
# More ticks of a logarithmic scale would touch each other.
MAX_TICKS = 9


@dataclass(frozen=True, eq=False)
class Line:
    """One line of a chart.

    Attributes:
        name: in the legend.
        x: [n] positions, ascending.
        y: [n] values; None and NaN are gaps.
        style: a class of the style sheet, which decides the color: `prediction`, `s1`...
        band: [n, 2] lower and upper ends around the line.
        bars: drawn as bars from 0, of n >= 2 points, x whole numbers at equal steps.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    style: str
    band: np.ndarray | None = None
    bars: bool = False

    def __post_init__(self) -> None:
        for name in ("x", "y", "band"):
            if getattr(self, name) is not None:
                values = np.asarray(getattr(self, name), np.float64)
                object.__setattr__(self, name, np.where(np.isfinite(values), values, np.nan))

    @property
    def edges(self) -> np.ndarray:
        """[n + 1] ends of the bars."""
        half = (self.x[1] - self.x[0]) / 2
        return np.append(self.x - half, self.x[-1] + half)

    def thinned(self, limit: int = MAX_POINTS) -> "Line":
        """A line of at most `limit` points: means of neighbors, with their extremes as the band."""
        n = len(self.x)
        if n <= limit:
            return self
        size = -(-n // limit)
        count = -(-n // size)

        def groups(values: np.ndarray) -> np.ma.MaskedArray:
            padded = np.pad(values, (0, count * size - n), constant_values=np.nan)
            return np.ma.masked_invalid(padded.reshape(count, size))

        low, high = (self.y, self.y) if self.band is None else self.band.T
        band = np.stack([groups(low).min(1).filled(np.nan), groups(high).max(1).filled(np.nan)], axis=1)
        middle = np.minimum(np.arange(count) * size + size // 2, n - 1)
        return replace(self, x=self.x[middle], y=groups(self.y).mean(1).filled(np.nan), band=band)


@dataclass(frozen=True)
class Scale:
    """Maps values to positions in the drawing.

    Attributes:
        low, high: values at its ends.
        start, stop: positions of its ends.
        logarithmic: equal ratios are equally long; values below `low` are at its start.
    """

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def __call__(self, values: ArrayLike) -> np.ndarray:
        """Positions, rounded to a tenth."""
        values, low, high = np.asarray(values, np.float64), self.low, self.high
        if self.logarithmic:
            values, low, high = np.log(np.maximum(values, low)), math.log(low), math.log(high)
        return np.round(self.start + (self.stop - self.start) * (values - low) / (high - low), 1)

    def ticks(self) -> list[float]:
        """Round values within it; of a logarithmic one 1, 2 and 5 times powers of ten, or of many only the powers."""
        locators = [LogLocator(subs=(1, 2, 5)), LogLocator(subs=(1,))] if self.logarithmic else []
        for locator in (*locators, MaxNLocator(6, steps=[1, 2, 5, 10])):
            ticks = [tick for tick in locator.tick_values(self.low, self.high) if self.low <= tick <= self.high]
            if 3 <= len(ticks) <= MAX_TICKS:
                break
        return [round(tick, 12) for tick in ticks]


class Chart:
    """A chart as the template draws it; `lines` is empty where no line has a value.

    Attributes:
        lines: of at most `MAX_POINTS` points.
        across, up: scales of x and y.
        x_ticks, y_ticks: values.
    """

    def __init__(
        self,
        title: str,
        lines: Sequence[Line],
        x_label: str,
        y_label: str,
        *,
        better: str | None = None,
        log_x: bool = False,
        log_y: bool = False,
    ) -> None:
        """Lay out a chart.

        Args:
            better: `higher`, `lower` or None.
            log_y: ignored where values are not positive.
        """
        self.title, self.x_label, self.y_label, self.better = title, x_label, y_label, better
        self.lines = [line.thinned() for line in lines if np.isfinite(line.y).any()]
        if not self.lines:
            return
        xs = np.concatenate([line.edges if line.bars else line.x for line in self.lines])
        bands = [line.band.ravel() for line in self.lines if line.band is not None]
        ys = np.concatenate([line.y for line in self.lines] + bands)
        histogram = any(line.bars for line in self.lines)
        log_y = log_y and np.nanmin(ys) > 0
        self.across = Scale(*padded_range(xs, log_x, 0.0), LEFT + 6, WIDTH - RIGHT, log_x)
        low, high = padded_range(ys, log_y, 0.05)
        self.up = Scale(0.0 if histogram else low, high, HEIGHT - BOTTOM, TOP, log_y)
        self.x_ticks, self.y_ticks, end = [], self.up.ticks(), -math.inf
        for tick in self.across.ticks():
            apart = self.across(tick) - end >= 8 + 7 * len(tick_text(tick))  # texts must not touch each other
            if apart and not (histogram and tick % 1):
                self.x_ticks.append(tick)
                end = self.across(tick)

    def points(self, x: np.ndarray, y: np.ndarray) -> str:
        """Positions as SVG writes them."""
        return " ".join(f"{a},{b}" for a, b in zip(self.across(x), self.up(y), strict=True))

    def band(self, line: Line) -> list[str]:
        """The points of a line's band, one polygon per piece without gaps."""
        if line.band is None:
            return []
        x, (low, high) = line.x, line.band.T
        found = pieces(np.isfinite(low + high + line.y))
        return [self.points(np.append(x[p], x[p][::-1]), np.append(high[p], low[p][::-1])) for p in found]

    def bars(self, line: Line) -> list[list[float]]:
        """[left, right, top, top of the band, bottom of the band] of each bar; NaN without a band."""
        edges, tops = self.across(line.edges), self.up(line.y)
        low, high = np.full((2, len(tops)), np.nan) if line.band is None else self.up(line.band.T)
        return np.stack([edges[:-1], edges[1:], tops, high, low], axis=1).tolist()

    def pieces(self, line: Line) -> list[np.ndarray]:
        """Indices of a line's points, split at the gaps."""
        return pieces(np.isfinite(line.y))

    def hover_json(self) -> str:
        """Per line [position, x, y] of its points, for the script that shows values under the pointer."""
        lines = []
        for line in self.lines:
            points = zip(self.across(line.x).tolist(), line.x, line.y, strict=True)
            texts = [[at, number_text(x), number_text(y)] for at, x, y in points if math.isfinite(y)]
            lines.append({"name": line.name, "style": line.style, "points": texts})
        return json.dumps({"x": self.x_label, "lines": lines})

    def rows(self) -> list[list[float | str]]:
        """The numbers as a table, for readers who cannot see the chart: x, and the y of each line that has one."""
        steps = np.unique(np.concatenate([line.x for line in self.lines]))
        values = [dict(zip(line.x, line.y, strict=True)) for line in self.lines]
        every = -(-len(steps) // MAX_DOTS)
        shown = np.unique([0, *range(every - 1, len(steps), every), len(steps) - 1])
        return [[x, *(by_x.get(x, "") for by_x in values)] for x in steps[shown]]


def pieces(present: np.ndarray) -> list[np.ndarray]:
    """Indices of the points that are present, split at the gaps."""
    indices = np.flatnonzero(present)
    return np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1) if len(indices) else []


def padded_range(values: ArrayLike, logarithmic: bool, padding: float) -> tuple[float, float]:
    """The ends of a scale that holds all finite values, with a share of their range as space around them."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    low, high = float(values.min()), float(values.max())
    if logarithmic:
        factor = (high / low) ** padding if high > low else 1.5
        return low / factor, high * factor
    space = padding * (high - low) if high > low else 0.05 * abs(high) or 0.5
    return low - space, high + space


def tick_text(value: float) -> str:
    """A tick, which is a round number: 0.25, 12, 2,500, 2e-05."""
    return f"{value:,.10g}"


def number_text(value: float | None, digits: int | None = None) -> str:
    """A number with this many digits after the point, or with four significant ones; `-` without one."""
    if value is None or math.isnan(value):
        return "-"
    if digits is not None:
        return f"{value:.{digits}f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def interval_text(interval: Sequence[float] | None, digits: int | None = None) -> str:
    """`21.20 to 21.80`, or nothing."""
    if interval is None or not all(map(math.isfinite, interval)):
        return ""
    return " to ".join(number_text(end, digits) for end in interval)
