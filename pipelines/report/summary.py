"""The top of the page: headline numbers between their two baselines, and what a reader should be warned of."""

import math

from pipelines.report.cautions import warnings_of
from pipelines.report.evaluations import is_plain
from pipelines.report.forms import Evaluation, MetricValues
from pipelines.report.inputs import Run
from pipelines.report.markup import Content, Html, code, el, join, note
from pipelines.report.quality import METRICS, MetricName, describe_clips
from pipelines.report.scales import Scale, interval_text, number_text

RULER_WIDTH, RULER_HEIGHT = 260, 26


def summary_section(run: Run) -> Html:
    """Never fails: what is damaged is said in its own section."""
    evaluation: Evaluation | None = run.sound("evaluation")
    metrics = {} if evaluation is None else evaluation.metrics
    headline = [
        _metric_tile(metric, metrics[metric.key])
        for metric in METRICS
        if metric.key in metrics and metrics[metric.key].prediction is not None
    ]
    tiles = [_evaluations_tile(run), _speed_tile(run), _training_tile(run)]
    lead = describe_clips(evaluation) if evaluation is not None else "Nothing has been measured yet."
    return join(
        [
            el("p", lead, class_="lead"),
            el("div", headline, class_="tiles") if headline else None,
            el("div", [tile for tile in tiles if tile], class_="tiles"),
            [note("warning", warning) for warning in warnings_of(run)],
        ]
    )


def _metric_tile(metric: MetricName, values: MetricValues) -> Html:
    digits = metric.digits
    interval = interval_text(values.interval.get("prediction"), digits)
    unit = f" {metric.unit}" if metric.unit else ""
    return el(
        "div",
        el("div", metric.title, el("span", f"{metric.better} is better", class_="direction"), class_="name"),
        el("div", number_text(values.prediction, digits), el("small", unit), class_="value"),
        el("div", f"95 %: {interval}" if interval else "no interval", class_="interval"),
        _ruler(metric, values),
        el(
            "div",
            el("span", "copying ", number_text(values.copy_last, digits), class_="copy-last"),
            el("span", "reconstruction ", number_text(values.reconstruction, digits), class_="reconstruction"),
            class_="ends",
        ),
        class_="tile metric",
    )


def _ruler(metric: MetricName, values: MetricValues) -> Html | None:
    """Where the prediction lies between copying the last frame and the autoencoder's limit; the right is better."""
    ends = {subject: getattr(values, subject) for subject in ("copy_last", "prediction", "reconstruction")}
    there = [value for value in ends.values() if value is not None]
    if len(there) < 2 or min(there) == max(there):
        return None
    low, high = (min(there), max(there)) if metric.better == "higher" else (max(there), min(there))
    scale, y = Scale(low, high, 8, RULER_WIDTH - 8), RULER_HEIGHT / 2
    parts: list[Content] = [el("line", class_="track", x1=8, x2=RULER_WIDTH - 8, y1=y, y2=y)]
    interval = values.interval.get("prediction")
    if interval is not None and None not in interval:
        xs = [f"{min(max(scale(end), 2), RULER_WIDTH - 2):.1f}" for end in interval]
        parts.append(el("line", class_="spread prediction", x1=xs[0], x2=xs[1], y1=y, y2=y))
    for subject, value in ends.items():
        if value is not None and subject != "prediction":
            x, style = f"{scale(value):.1f}", subject.replace("_", "-")
            parts.append(el("line", class_=f"line {style}", x1=x, x2=x, y1=y - 8, y2=y + 8))
    parts.append(el("circle", class_="dot prediction", cx=f"{scale(values.prediction):.1f}", cy=y, r=5.5))
    return el(
        "svg", parts, viewBox=f"0 0 {RULER_WIDTH} {RULER_HEIGHT}", class_="ruler", role="img",
        aria_label=f"{metric.title}: the prediction between copying the last frame and the reconstruction",
    )  # fmt: skip


def _tile(name: str, value: str, unit: str, *lines: Content) -> Html:
    return el(
        "div",
        el("div", name, class_="name"),
        el("div", value, el("small", f" {unit}"), class_="value"),
        [el("div", line, class_="interval") for line in lines if line],
        class_="tile",
    )


def _evaluations_tile(run: Run) -> Html | None:
    evaluation: Evaluation | None = run.sound("evaluation")
    protocol = {} if evaluation is None else evaluation.protocol
    if not isinstance(protocol.get("nfe"), int):
        return None
    quality = run.sound("quality")
    cheapest = None
    if quality is not None and quality.cheapest is not None:
        point, reference = quality.points[quality.cheapest], quality.points[quality.reference]
        cheapest = f"{point.nfe} lose nothing measurable against {reference.nfe}"
    sampling = protocol.get("sampling")
    solver = sampling.get("solver") if isinstance(sampling, dict) else None
    return _tile("Evaluations of the field", str(protocol["nfe"]), "NFE a frame", solver, cheapest)


def _speed_tile(run: Run) -> Html | None:
    """From the study, at what the evaluation used; else from the benchmark."""
    evaluation, quality, benchmark = run.sound("evaluation"), run.sound("quality"), run.sound("benchmark")
    if quality is not None:
        nfe = None if evaluation is None else evaluation.protocol.get("nfe")
        timed = [point for point in quality.points if point.milliseconds_per_frame and is_plain(point)]
        point = quality.points[quality.reference if quality.cheapest is None else quality.cheapest]
        if timed and isinstance(nfe, int) and nfe > 0:
            point = min(timed, key=lambda point: abs(math.log(point.nfe / nfe)))
        if point.milliseconds_per_frame:
            device = str(quality.protocol.get("device", ""))
            value = number_text(point.milliseconds_per_frame)
            frames = f"{number_text(1000 / point.milliseconds_per_frame)} frames/s, many clips at once"
            return _tile("Prediction takes", value, "ms a frame", f"at {point.nfe} evaluations, on {device}", frames)
    if benchmark is not None:
        for line in benchmark.measurements:
            if line.unit == "frames/s" and line.name.startswith("sampling") and line.value:
                return _tile("Prediction", number_text(line.value), "frames/s", benchmark.hardware)
    return None


def _training_tile(run: Run) -> Html | None:
    flow = run.checkpoint("flow")
    if flow is None:
        return None
    if "imported" in flow.state:
        name = flow.state["imported"].get("file", "") if isinstance(flow.state["imported"], dict) else ""
        return _tile("Flow", "imported", "", code(str(name)))
    autoencoder = run.checkpoint("autoencoder")
    stage1 = f"autoencoder {autoencoder.step:,}" if autoencoder is not None else None
    return _tile("Flow trained for", f"{flow.step:,}", "steps", stage1)
