"""How good predictions are: the evaluation's metrics, and the study of quality against evaluations of the field."""

import math
from dataclasses import dataclass
from typing import Any

from pipelines.report.charts import Chart, Line, Scale, interval_text, number_text
from pipelines.report.predictions import picture_file_url
from pipelines.report.run_files import Missing, Run
from pipelines.runtime.results import (
    SUBJECTS,
    Calibration,
    Evaluation,
    Interval,
    Memorization,
    MetricValues,
    Study,
    StudyPoint,
)

# Solver -> class of the style sheet.
SOLVERS = {"euler": "s1", "midpoint": "s2", "heun": "s3", "rk4": "s4", "rk4-38": "s5"}
RULER_WIDTH = 260
WORST_CLIPS = 5


@dataclass(frozen=True)
class Quantity:
    """How a measured quantity is named and written.

    Attributes:
        key: in the results.
        label: title and unit.
        better: `higher`, `lower`, or None where neither is.
        digits: after the point; None: four significant ones.
    """

    key: str
    title: str
    label: str
    better: str | None
    digits: int | None

    def is_better(self, one: float, other: float) -> bool:
        return one > other if self.better == "higher" else one < other

    def cell(self, value: float | None, interval: Interval | None) -> tuple[str, str]:
        """A number and its interval for a table; below 1 with three digits at least."""
        if value is None:
            return "", ""
        digits = self.digits if self.digits is None or abs(value) >= 1 else max(self.digits, 3)
        return number_text(value, digits), interval_text(interval, digits)


IMAGE_METRICS = [
    Quantity("psnr", "PSNR", "PSNR [dB]", "higher", 2),
    Quantity("ssim", "SSIM", "SSIM", "higher", 3),
    Quantity("lpips", "LPIPS", "LPIPS", "lower", 3),
]
ST_LPIPS = Quantity("st_lpips", "ST-LPIPS", "ST-LPIPS", "lower", 3)
SHARPNESS = Quantity("sharpness", "Sharpness", "sharpness [share of the true frames']", None, 3)
FVD = Quantity("fvd", "FVD", "FVD", "lower", 1)
METRICS = [
    *IMAGE_METRICS,
    ST_LPIPS,
    SHARPNESS,
    Quantity("crps", "CRPS", "CRPS [levels of 255]", "lower", 2),
    Quantity("energy_score", "Energy score", "energy score [levels of 255]", "lower", 2),
    Quantity("latent_energy_score", "Energy score of latents", "energy score of latents", "lower", 3),
    FVD,
    Quantity("latent_frechet", "Fréchet distance of latents", "Fréchet distance of latents", "lower", 4),
    *(
        Quantity(f"{what}_{kind}", f"{title} of {what} features", f"{title} of {what} features", "lower", 4)
        for what in ("frame", "motion")
        for kind, title in (("frechet", "Fréchet distance"), ("mmd", "MMD"))
    ),
]
SPREAD_SKILL = Quantity("spread_skill", "Spread/skill", "spread / skill", None, 2)
WHOLE = Quantity("whole", "Clips with all objects whole", "share of clips", "higher", 3)
OBJECTS = [
    WHOLE,
    Quantity("position", "Position error", "pixels of 64", "lower", 2),
    Quantity("kept", "Objects kept", "share of objects", "higher", 3),
    Quantity("kind", "Right kind", "share of kept objects", "higher", 3),
    Quantity("speed", "Speed", "share of the true way", None, 3),
    Quantity("color", "Color error", "levels of 255", "lower", 2),
    Quantity("ghosts", "Ghosts", "per frame", "lower", 3),
    Quantity("bounces", "Bounces off walls", "share of meetings with a wall", "higher", 3),
    Quantity("collisions", "Bounces off each other", "share of meetings of two", "higher", 3),
    Quantity("elastic", "Bounces that keep the speed", "share of bounces", "higher", 3),
    Quantity("on_time", "Bounces on time", "share of the true bounces", "higher", 3),
]
SILHOUETTES = [
    Quantity("kept", "Silhouettes of the right area", "share of the clips", "higher", 3),
    Quantity("speed", "Speed of silhouettes", "share of the true way", None, 3),
    Quantity("identity", "The same person", "share of the silhouettes", "higher", 3),
]
TIME = Quantity("milliseconds_per_frame", "Time", "ms per predicted frame", "lower", None)
STUDIED = [
    *IMAGE_METRICS,
    Quantity("frechet", "Fréchet distance of latents", "Fréchet distance", "lower", 3),
    SHARPNESS,
    WHOLE,
    Quantity("score", "Score", "dB", "higher", 2),
    TIME,
]


def headline(run: Run) -> dict[str, Any]:
    """The metrics at the top of the page, each between its two baselines; nothing where nothing is measured."""
    evaluation = run.read_if_sound(Evaluation)
    if evaluation is None:
        return {"protocol": None, "tiles": [], "gain": None, "worst": []}
    measured = [(q, evaluation.metrics[q.key]) for q in (*IMAGE_METRICS, ST_LPIPS, FVD) if q.key in evaluation.metrics]
    worst = sorted((evaluation.clips or {}).items(), key=lambda clip: clip[1])[:WORST_CLIPS]
    return {
        "protocol": evaluation.protocol,
        "tiles": [_tile(metric, values) for metric, values in measured],
        "gain": evaluation.describe_gain(),
        "worst": [f"{name} ({value:+.1f} dB)" for name, value in worst],
    }


def _tile(metric: Quantity, values: MetricValues) -> dict[str, Any]:
    value, copying, limit = (
        number_text(x, metric.digits) for x in (values.prediction, values.copy_last, values.reconstruction)
    )
    return {
        "metric": metric,
        "unit": metric.label.removeprefix(metric.title).strip(" []"),
        "value": value,
        "interval": interval_text((values.interval or {}).get("prediction"), metric.digits),
        "copying": copying,
        "limit": limit,
        "ruler": _ruler(values, metric.better),
    }


def _ruler(values: MetricValues, better: str | None) -> dict[str, Any] | None:
    """Positions of the prediction, its interval and the baselines on a line of `RULER_WIDTH`; better is right."""
    start, stop, ours = values.copy_last, values.reconstruction, values.prediction
    ends = [value for value in (start, stop, ours) if value is not None and math.isfinite(value)]
    if len(ends) < 3 or min(ends) == max(ends):
        return None
    low, high = (min(ends), max(ends)) if better == "higher" else (max(ends), min(ends))
    scale = Scale(low, high, 8, RULER_WIDTH - 8)
    interval = scale((values.interval or {}).get("prediction", (ours, ours))).clip(2, RULER_WIDTH - 2)
    places = {"width": RULER_WIDTH, "copying": scale(start), "limit": scale(stop), "prediction": scale(ours)}
    return places | {"interval": interval.tolist()}


def quality_section(run: Run) -> dict[str, Any]:
    """Curves over predicted frames, a table of all metrics, the audits, and the protocol."""
    evaluation = run.read(Evaluation)
    if evaluation is None:
        raise Missing(f"Nothing is measured yet: `{run.command('evaluate')}` measures it.")
    measured = [(metric, evaluation.metrics[metric.key]) for metric in METRICS if metric.key in evaluation.metrics]
    arrows = {"higher": " ↑", "lower": " ↓", None: ""}
    columns = [(metric.label + arrows[metric.better], metric, v) for metric, v in measured]
    columns += [("FVD to autoencoded ↓", metric, v.autoencoded) for metric, v in measured if v.autoencoded is not None]
    rows: list[list[Any]] = [
        [title, *(metric.cell(getattr(v, subject), (v.interval or {}).get(subject)) for _, metric, v in columns)]
        for subject, title in SUBJECTS.items()
        if any(getattr(values, subject) is not None for _, _, values in columns)
    ]
    best = [(metric, getattr(values, "best_of", None)) for _, metric, values in columns]
    if any(found for _, found in best):
        samples = evaluation.protocol.samples
        cells = [metric.cell(found.value, found.interval) if found else "" for metric, found in best]
        rows.insert(1, [f"best of {samples} samples", *cells])
    return {
        "protocol": evaluation.protocol,
        "charts": [_curves(metric, values) for metric, values in measured],
        "head": ["mean over frames", *(heading for heading, _, _ in columns)],
        "rows": rows,
        "calibration": None if evaluation.calibration is None else _calibration(evaluation.calibration),
        "objects": None if evaluation.objects is None else _objects(run, evaluation.objects),
        "silhouettes": [
            _curves(measure, values)
            for measure in SILHOUETTES
            if (values := (evaluation.silhouettes or {}).get(measure.key)) is not None
        ],
        "memorization": evaluation.memorization and _memorization(evaluation.memorization),
    }


def _memorization(found: Memorization) -> dict[str, Any]:
    """A table of the distances, and the share of predictions that are nearer to the training clips."""
    intervals = found.interval or {}

    def row(title: str, name: str, smallest: float | None = None) -> list[Any]:
        cell = (number_text(getattr(found, name), 3), interval_text(intervals.get(name), 3))
        return [title, cell, "" if smallest is None else number_text(smallest, 3)]

    return {
        "training_clips": found.training_clips,
        "share": number_text(100 * found.nearer, 0) + " %",
        "interval": interval_text(tuple(100 * x for x in intervals["nearer"]), 0) if "nearer" in intervals else "",
        "head": ["distance", "mean", "smallest"],
        "rows": [
            row("from the prediction to the nearest training clip", "prediction", found.smallest["prediction"]),
            row("from the true frames to the nearest training clip", "truth", found.smallest["truth"]),
            row("from the prediction to the true frames", "error"),
        ],
    }


def _calibration(found: Calibration) -> list[Chart]:
    """Spread/skill of each predicted frame, and the rank histogram."""
    spread = _curves(SPREAD_SKILL, found.spread_skill, level=1.0)
    ranks = range(len(found.ranks))
    bars = Line("truth", ranks, found.ranks, "prediction", found.ranks_interval, bars=True)
    flat = Line("calibrated", ranks, [1 / len(ranks) for _ in ranks], "reference")
    title = f"Rank of the truth among {found.samples} samples"
    return [spread, Chart(title, [bars, flat], "samples below the truth", "share of the pixels")]


def _objects(run: Run, objects: dict[str, MetricValues]) -> dict[str, Any]:
    """Curves of the audit, and the picture of the best and the worst clips."""
    path, sheet, problem = run.path / "objects.png", None, None
    if path.exists():
        try:
            sheet = picture_file_url(path)
        except (OSError, ValueError) as error:
            problem = f"{path}: cannot be shown: {error}; `{run.command('evaluate')}` writes it again"
    charts = [_curves(measure, objects[measure.key]) for measure in OBJECTS if measure.key in objects]
    return {"charts": charts, "sheet": sheet, "problem": problem}


def _curves(metric: Quantity, values: MetricValues, level: float | None = None) -> Chart:
    """A line per subject; `level` is that of calibrated samples."""
    lines, curves = [], values.per_frame or {}
    for subject in (subject for subject in SUBJECTS if subject in curves):
        y = curves[subject]
        band = (values.per_frame_interval or {}).get(subject)
        lines.append(Line(SUBJECTS[subject], range(1, len(y) + 1), y, subject.replace("_", "-"), band))
    if values.best_of is not None:
        y = values.best_of.per_frame
        lines.insert(1, Line(f"best of {values.best_of.samples} samples", range(1, len(y) + 1), y, "best"))
    if level is not None:
        x = lines[0].x
        lines.append(Line("calibrated", x, [level for _ in x], "reference"))
    title = f"{metric.title} of each predicted frame"
    return Chart(title, lines, "predicted frame", metric.label, better=metric.better)


def study_section(run: Run) -> dict[str, Any]:
    """A chart per quantity with a line per solver, and a table of all sampler settings."""
    study = run.read(Study)
    if study is None:
        raise Missing(f"Numbers of evaluations are not compared yet: `{run.command('study')}` compares them.")
    measured = [quantity for quantity in STUDIED if getattr(study.points[0], quantity.key) is not None]
    rows = []
    for point in study.points:
        cells = [q.cell(getattr(point, q.key), getattr(point, f"{q.key}_interval", None)) for q in measured]
        rows.append([point.describe() + (f", seed {point.seed}" if point.seed else ""), point.nfe, *cells])
    return {
        "protocol": study.protocol,
        "chosen": study.choice,
        "charts": [_study_chart(study, quantity) for quantity in measured],
        "head": ["sampler", "NFE", *(quantity.label for quantity in measured)],
        "rows": rows,
    }


def _study_chart(study: Study, quantity: Quantity) -> Chart:
    def value(point: StudyPoint) -> float:
        return getattr(point, quantity.key)

    reference = study.points[study.reference]
    # Points of other seeds show the scatter, in the table.
    plain = [point for point in study.points if point.is_plain and point.seed == reference.seed]
    lines = []
    for solver, style in SOLVERS.items():
        points = sorted((point for point in plain if point.solver == solver), key=lambda point: point.nfe)
        band = [getattr(point, f"{quantity.key}_interval", None) or (None, None) for point in points]
        lines.append(Line(solver, [p.nfe for p in points], [*map(value, points)], style, band))
    ends = [min(point.nfe for point in plain), max(point.nfe for point in plain)] if plain else []
    if quantity is not TIME:
        lines.append(Line(f"level of {reference.nfe} evaluations", ends, [value(reference) for _ in ends], "reference"))
    return Chart(
        f"{quantity.title} against NFE", lines, "NFE (evaluations per frame)", quantity.label, better=quantity.better,
        log_x=True, log_y=quantity is TIME,
    )  # fmt: skip
