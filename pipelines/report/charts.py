"""Line charts as inline SVG: text that stays text, colours of the page, values under the pointer."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.report.markup import Html, details, el, join, table
from pipelines.report.scales import Scale, number_text, spread, tick_text

# Units of the drawing; it is shown at about this size, on a phone a little smaller.
WIDTH, HEIGHT = 440, 264
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 22, 40
MOST_POINTS = 240
MARK_UP_TO = 40


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: in the legend.
        x, y: its points; None is a gap.
        style: a class of the style sheet, which decides the colour: `prediction`, `s1`...
        band: low and high ends at each point.
        marks: show the points themselves.
        faint: in the background, such as raw values behind their mean.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: str
    band: Sequence[Sequence[float | None]] | None = None
    marks: bool = False
    faint: bool = False


def chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    better: str | None = None,
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] | None = None,
    note: str | None = None,
) -> Html:
    """A figure with legend, chart and the numbers as a table that is folded away.

    Args:
        better: `higher` or `lower`.
        x_ticks: where ticks stand, if not at round values.
        note: below the chart.
    """
    lines = [thinned(line) for line in lines if any(value is not None for value in line.y)]
    if not lines:
        return Html("")
    direction = {"higher": "higher is better", "lower": "lower is better", None: None}[better]
    legend = el("ul", [el("li", _swatch(line), line.name) for line in lines], class_="legend")
    return el(
        "figure",
        el("figcaption", el("strong", title), direction and el("span", direction, class_="direction")),
        legend if len(lines) > 1 else None,
        _drawing(title, lines, x_label, y_label, log_x, log_y, x_ticks),
        el("p", note, class_="remark") if note else None,
        _numbers(title, lines, x_label),
        class_="chart",
    )


def thinned(line: Line, most: int = MOST_POINTS) -> Line:
    """A line of no more points than can be told apart: means of neighbours, their extremes as the band."""
    if len(line.x) <= most:
        return line
    size = -(-len(line.x) // most)
    x, y, band = [], [], []
    for start in range(0, len(line.x), size):
        values = [value for value in line.y[start : start + size] if value is not None]
        x.append(line.x[start : start + size][len(line.x[start : start + size]) // 2])
        y.append(sum(values) / len(values) if values else None)
        ends = values if line.band is None else [end for pair in line.band[start : start + size] for end in pair]
        ends = [end for end in ends if end is not None]
        band.append((min(ends), max(ends)) if ends else (None, None))
    return Line(line.name, x, y, line.style, band, line.marks, line.faint)


def smoothed(x: Sequence[float], y: Sequence[float | None], share: float = 0.05) -> list[float | None]:
    """The mean over a window of so large a share of the points, centred at each; gaps are passed over."""
    reach = max(1, round(share * len(x) / 2))
    found = []
    for place in range(len(x)):
        near = [value for value in y[max(0, place - reach) : place + reach + 1] if value is not None]
        found.append(sum(near) / len(near) if near else None)
    return found


def _drawing(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    log_x: bool,
    log_y: bool,
    x_ticks: Sequence[float] | None,
) -> Html:
    xs = [value for line in lines for value in line.x]
    ys = [value for line in lines for value in line.y if value is not None]
    ys += [end for line in lines if not line.faint for pair in line.band or () for end in pair if end is not None]
    log_y = log_y and min(ys) > 0
    ends = (min(xs), max(xs)) if min(xs) < max(xs) else spread(xs, log_x)
    across = Scale(*ends, LEFT + 6, WIDTH - RIGHT, log_x)
    up = Scale(*spread(ys, log_y), HEIGHT - BOTTOM, TOP, log_y)
    label = f"{title}: {y_label} over {x_label}. Lines: {', '.join(line.name for line in lines)}."
    return el(
        "svg",
        _axes(across, up, x_label, y_label, x_ticks),
        [_band(line, across, up) for line in lines],
        [_line(line, across, up) for line in lines],
        el("line", class_="rule", x1=0, x2=0, y1=TOP, y2=HEIGHT - BOTTOM, visibility="hidden"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=label,
        data_chart=json.dumps(
            {
                "x": x_label,
                "lines": [
                    {
                        "name": line.name,
                        "style": line.style,
                        "points": [
                            [round(across(x), 1), number_text(x), number_text(y)]
                            for x, y in zip(line.x, line.y, strict=True)
                            if y is not None
                        ],
                    }
                    for line in lines
                    if not line.faint
                ],
            },
            ensure_ascii=True,
        ),
    )


def _axes(across: Scale, up: Scale, x_label: str, y_label: str, x_ticks: Sequence[float] | None) -> Html:
    parts, ground = [], HEIGHT - BOTTOM
    for tick in up.ticks():
        y = _places(up(tick))
        parts.append(el("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(el("text", tick_text(tick), class_="tick", x=LEFT - 6, y=f"{up(tick) + 4:.1f}", text_anchor="end"))
    last = -math.inf
    for tick in across.ticks() if x_ticks is None else x_ticks:
        x, text = across(tick), tick_text(tick)
        if x - last < 8 + 7 * len(text):  # it would touch its neighbour
            continue
        last = x
        parts.append(el("line", class_="mark", x1=_places(x), x2=_places(x), y1=ground, y2=ground + 4))
        sticks_out = x + 4.2 * len(text) > WIDTH - 2
        place = {"x": WIDTH - 2, "text_anchor": "end"} if sticks_out else {"x": _places(x), "text_anchor": "middle"}
        parts.append(el("text", text, class_="tick", y=ground + 17, **place))
    parts.append(el("line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=ground, y2=ground))
    parts.append(el("text", y_label, class_="label", x=4, y=12))
    parts.append(el("text", x_label, class_="label", x=WIDTH - RIGHT, y=HEIGHT - 5, text_anchor="end"))
    return join(parts)


def _runs(line: Line) -> list[list[int]]:
    """Indices of the points between gaps."""
    runs: list[list[int]] = [[]]
    for place, value in enumerate(line.y):
        if value is None:
            runs.append([])
        else:
            runs[-1].append(place)
    return [run for run in runs if run]


def _band(line: Line, across: Scale, up: Scale) -> Html | None:
    if line.band is None or line.faint:
        return None
    parts = []
    for run in _runs(line):
        ends = [(line.x[place], *line.band[place]) for place in run if None not in line.band[place]]
        corners = [(x, high) for x, _, high in ends] + [(x, low) for x, low, _ in reversed(ends)]
        parts.append(el("polygon", class_=f"band {line.style}", points=_points(corners, across, up)))
    return join(parts)


def _line(line: Line, across: Scale, up: Scale) -> Html:
    faint = " faint" if line.faint else ""
    parts = []
    for run in _runs(line):
        points = [(line.x[place], line.y[place]) for place in run]
        if len(points) > 1:
            parts.append(el("polyline", class_=f"line {line.style}{faint}", points=_points(points, across, up)))
        if (line.marks and len(line.x) <= MARK_UP_TO) or len(points) == 1:
            parts += [
                el("circle", class_=f"dot {line.style}", cx=_places(across(x)), cy=_places(up(y)), r=2.6)
                for x, y in points
            ]
    return join(parts)


def _points(points: Sequence[tuple[float, float]], across: Scale, up: Scale) -> str:
    return " ".join(f"{_places(across(x))},{_places(up(y))}" for x, y in points)


def _places(pixels: float) -> str:
    return f"{pixels:.1f}"


def _swatch(line: Line) -> Html:
    stroke = el("line", class_=f"line {line.style}{' faint' if line.faint else ''}", x1=1, x2=17, y1=5, y2=5)
    return el("svg", stroke, viewBox="0 0 18 10", width=18, height=10, aria_hidden="true", class_="swatch")


def _numbers(title: str, lines: Sequence[Line], x_label: str) -> Html | None:
    """The same as a table, for who does not see the lines; long series every so many points."""
    shown = [line for line in lines if not line.faint]
    steps = sorted({x for line in shown for x in line.x})
    chosen = steps[:: -(-len(steps) // MARK_UP_TO)]
    values = [dict(zip(line.x, line.y, strict=True)) for line in shown]
    rows = [
        [tick_text(x), *(number_text(of_line.get(x)) if x in of_line else "" for of_line in values)] for x in chosen
    ]
    return details("numbers", table([x_label, *(line.name for line in shown)], rows, f"{title}, as numbers"))
