"""The top of the page: headline numbers between their two baselines."""

import math
from dataclasses import dataclass
from typing import Any

from pipelines.bench.measurement import Benchmark
from pipelines.evaluation.results import Evaluation, MetricValues, Study
from pipelines.report.charts import Scale, interval_text, number_text
from pipelines.report.quality import METRICS, Quantity
from pipelines.report.run_files import Run
from pipelines.report.warnings import run_warnings

RULER_WIDTH = 260


@dataclass(frozen=True)
class Tile:
    """One headline number.

    Attributes:
        notes: lines of small text below it.
        better: of a metric, `higher` or `lower`.
        ends: of a metric, the baselines as text: copying the last frame, reconstruction.
        ruler: of a metric, see `_ruler`.
    """

    name: str
    value: str
    unit: str
    notes: list[str]
    better: str | None = None
    ends: tuple[str, str] | None = None
    ruler: dict[str, Any] | None = None


def summary(run: Run) -> dict[str, Any]:
    """Tiles and warnings; files that cannot be read are reported by their sections."""
    evaluation = run.read_if_sound(Evaluation)
    metrics = {} if evaluation is None else evaluation.metrics
    tiles = [_evaluations_tile(run), _speed_tile(run), _training_tile(run)]
    return {
        "protocol": None if evaluation is None else evaluation.protocol,
        "metrics": [_metric_tile(metric, metrics[metric.key]) for metric in METRICS if metric.key in metrics],
        "tiles": [tile for tile in tiles if tile is not None],
        "warnings": list(run_warnings(run)),
    }


def _metric_tile(metric: Quantity, values: MetricValues) -> Tile:
    value, copying, limit = (
        number_text(getattr(values, name), metric.digits) for name in ("prediction", "copy_last", "reconstruction")
    )
    interval = interval_text((values.interval or {}).get("prediction"), metric.digits)
    note = f"95 %: {interval}" if interval else "no interval"
    unit = metric.label.removeprefix(metric.title).strip(" []")
    return Tile(metric.title, value, unit, [note], metric.better, (copying, limit), _ruler(values, metric.better))


def _ruler(values: MetricValues, better: str | None) -> dict[str, Any] | None:
    """Positions of the prediction, its interval and the two baselines on a line of `RULER_WIDTH`; better is right."""
    start, stop, ours = values.copy_last, values.reconstruction, values.prediction
    ends = [value for value in (start, stop, ours) if value is not None and math.isfinite(value)]
    if len(ends) < 3 or min(ends) == max(ends):
        return None
    low, high = (min(ends), max(ends)) if better == "higher" else (max(ends), min(ends))
    scale = Scale(low, high, 8, RULER_WIDTH - 8)
    interval = scale((values.interval or {}).get("prediction", (ours, ours))).clip(2, RULER_WIDTH - 2)
    places = {"width": RULER_WIDTH, "copying": scale(start), "limit": scale(stop), "prediction": scale(ours)}
    return places | {"interval": interval.tolist()}


def _evaluations_tile(run: Run) -> Tile | None:
    evaluation, study = run.read_if_sound(Evaluation), run.read_if_sound(Study)
    if evaluation is None:
        return None
    protocol = evaluation.protocol
    notes = [str(protocol.sampling.get("solver", ""))]
    if study is not None:
        cheapest, reference = study.points[study.cheapest], study.points[study.reference]
        notes.append(f"{cheapest.nfe} lose nothing measurable against {reference.nfe}")
    return Tile("Evaluations of the field", str(protocol.nfe), "NFE per frame", notes)


def _speed_tile(run: Run) -> Tile | None:
    """From the study, at the number of evaluations nearest to the evaluation's; else from the benchmark."""
    evaluation, study, benchmark = (run.read_if_sound(model) for model in (Evaluation, Study, Benchmark))
    if study is not None:
        nfe = study.points[study.cheapest].nfe if evaluation is None else evaluation.protocol.nfe
        plain = [point for point in study.points if point.is_plain] or study.points
        point = min(plain, key=lambda point: abs(math.log(point.nfe / nfe)))
        notes = [f"at {point.nfe} evaluations, on {study.protocol.device}"]
        notes.append(f"{number_text(1000 / point.milliseconds_per_frame)} frames/s, many clips at once")
        return Tile("Prediction takes", number_text(point.milliseconds_per_frame), "ms per frame", notes)
    for line in [] if benchmark is None else benchmark.measurements:
        if line.unit == "frames/s" and line.name.startswith("sampling"):
            return Tile("Prediction", number_text(line.value), "frames/s", [benchmark.hardware])
    return None


def _training_tile(run: Run) -> Tile | None:
    flow, autoencoder = run.checkpoints["flow"], run.checkpoints["autoencoder"]
    if flow is None:
        return None
    if "imported" in flow.state:
        return Tile("Flow", "imported", "", [flow.state["imported"]["file"]])
    notes = [] if autoencoder is None else [f"autoencoder {autoencoder.step:,}"]
    return Tile("Flow trained for", f"{flow.step:,}", "steps", notes)
