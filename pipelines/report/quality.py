"""How good the predictions are: curves over the predicted frames, and one table of all metrics."""

from collections.abc import Mapping
from typing import Any

from pipelines.report.charts import Line, chart
from pipelines.report.forms import Evaluation, MetricValues
from pipelines.report.inputs import Run
from pipelines.report.markup import Content, Html, code, details, el, facts, join, note, table
from pipelines.report.scales import interval_text, number_text

SUBJECTS = {
    "prediction": "prediction",
    "copy_last": "copying the last frame",
    "reconstruction": "autoencoder's reconstruction",
}


class MetricName:
    """A metric's name, unit and direction."""

    def __init__(self, key: str, title: str, unit: str, better: str, digits: int) -> None:
        self.key, self.title, self.unit, self.better, self.digits = key, title, unit, better, digits

    @property
    def heading(self) -> str:
        """For a table."""
        unit = f" [{self.unit}]" if self.unit else ""
        return f"{self.title}{unit} {'↑' if self.better == 'higher' else '↓'}"

    def is_better(self, one: float, other: float) -> bool:
        """Whether the first number is the better one."""
        return one > other if self.better == "higher" else one < other


METRICS = [
    MetricName("psnr", "PSNR", "dB", "higher", 2),
    MetricName("ssim", "SSIM", "", "higher", 3),
    MetricName("lpips", "LPIPS", "", "lower", 3),
    MetricName("fvd", "FVD", "", "lower", 1),
]


def quality_section(run: Run) -> Html:
    """Charts, table and protocol; raises `Problem` where `evaluation.json` is damaged."""
    evaluation = run.evaluation
    if evaluation is None:
        return note("missing", "Nothing has been measured yet: ", code(run.command("evaluate")), " does it.")
    measured = [metric for metric in METRICS if metric.key in evaluation.metrics]
    charts = [_curves(metric, evaluation.metrics[metric.key]) for metric in measured]
    missing = evaluation.protocol.get("missing")
    missing = missing if isinstance(missing, Mapping) else {}
    return join(
        [
            el("p", _explanation(evaluation), class_="lead"),
            el("div", charts, class_="charts"),
            _table(evaluation, measured),
            [note("missing", f"{str(name).upper()} was not measured: {why}") for name, why in missing.items()],
            details("protocol", facts(flattened(evaluation.protocol))),
        ]
    )


def _explanation(evaluation: Evaluation) -> str:
    """What the lines are, and how sure."""
    text = (
        "Copying the last given frame is what a prediction must beat; the autoencoder's reconstruction of the real "
        "frames is what it can't. "
    )
    interval = evaluation.protocol.get("interval")
    return text + (f"Bands and intervals: {interval}." if interval else "There are no intervals.")


def describe_clips(evaluation: Evaluation) -> str:
    """A sentence on what was measured."""
    protocol = evaluation.protocol

    def known(name: str) -> str:
        return str(protocol.get(name, "?"))

    clips = f"{known('clips')} clips" + (f" of {known('videos')} videos" if "videos" in protocol else "")
    text = f"{clips} of the {known('split')} split, {known('context')} frames given, {known('horizon')} predicted"
    return text + (f"; {known('description')}." if protocol.get("description") else ".")


def _curves(metric: MetricName, values: MetricValues) -> Html | None:
    lines = []
    for subject, title in SUBJECTS.items():
        y = values.per_frame.get(subject)
        if y:
            band = values.per_frame_interval.get(subject)
            band = band if band and len(band) == len(y) else None
            lines.append(Line(title, range(1, len(y) + 1), y, subject.replace("_", "-"), band, marks=True))
    best = values.best_of
    if best is not None and best.per_frame:
        x = range(1, len(best.per_frame) + 1)
        lines.insert(1, Line(f"best of {best.samples} samples", x, best.per_frame, "best"))
    unit = f"{metric.title} [{metric.unit}]" if metric.unit else metric.title
    title = f"{metric.title} of each predicted frame"
    return chart(title, lines, "predicted frame", unit, better=metric.better) if lines else None


def _table(evaluation: Evaluation, measured: list[MetricName]) -> Html:
    columns = [(metric, metric.heading, evaluation.metrics[metric.key], metric.digits) for metric in measured]
    fvd = evaluation.metrics.get("fvd")
    if fvd is not None and fvd.autoencoded is not None:
        columns.append((METRICS[-1], "FVD to autoencoded ↓", fvd.autoencoded, METRICS[-1].digits))
    rows: list[list[Content]] = []
    for subject, title in SUBJECTS.items():
        rows.append([title])
        for _, _, values, digits in columns:
            rows[-1].append(_cell(getattr(values, subject), values.interval.get(subject), digits))
    best = [getattr(values, "best_of", None) for _, _, values, _ in columns]
    if any(best):
        samples = next(each.samples for each in best if each)
        cells = [
            each and _cell(each.value, each.interval, column[3]) for each, column in zip(best, columns, strict=True)
        ]
        rows.insert(1, [f"best of {samples} samples", *cells])
    return table(["mean over frames", *(heading for _, heading, _, _ in columns)], rows, "all metrics")


def _cell(value: float | None, interval: tuple[float | None, float | None] | None, digits: int) -> Content:
    if value is None:
        return ""
    if abs(value) < 1:
        digits = max(digits, 3)
    return [number_text(value, digits), el("small", interval_text(interval, digits))]


def flattened(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Content]]:
    """Nested mappings as pairs of a dotted name and a text; what is None is left out."""
    pairs: list[tuple[str, Content]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += flattened(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            pairs.append((f"{prefix}{name}", ", ".join(map(str, value))))
        elif value is not None:
            pairs.append((f"{prefix}{name}", str(value)))
    return pairs
