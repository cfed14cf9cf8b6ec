"""Quality against evaluations of the field: what a prediction costs, and what it gives."""

from pipelines.report.charts import Line, chart
from pipelines.report.forms import Point, Quality
from pipelines.report.inputs import Run
from pipelines.report.markup import Html, code, details, el, join, note, table
from pipelines.report.scales import interval_text, number_text

# Solver -> class of the style sheet.
SOLVERS = {"euler": "s1", "midpoint": "s2", "heun": "s3", "rk4": "s4", "rk4-38": "s5"}
# Quantity -> title, unit, better, digits
PANELS = {
    "psnr": ("PSNR", "PSNR [dB]", "higher", 2),
    "ssim": ("SSIM", "SSIM", "higher", 3),
    "lpips": ("LPIPS", "LPIPS", "lower", 3),
    "frechet": ("Fréchet distance of latents", "Fréchet distance", "lower", 3),
    "sharpness": ("Sharpness", "share of the decoded real latents'", None, 3),
    "milliseconds_per_frame": ("Time", "ms a predicted frame", "lower", 3),
}
TICKS = (1, 2, 4, 8, 16, 32, 64, 128, 396)


def evaluations_section(run: Run) -> Html:
    """A chart a metric, a line a solver; raises `Problem` where `quality.json` is damaged."""
    quality = run.quality
    if quality is None:
        return note(
            "missing", "Solvers and numbers of evaluations have not been compared yet: ", code(run.command("study")),
            " does it.",
        )  # fmt: skip
    charts = [
        _panel(quality, key) for key in PANELS if any(getattr(point, key) is not None for point in quality.points)
    ]
    clips = quality.protocol.get("clips")
    count = f"{len(clips)} clips. " if isinstance(clips, list) else ""
    reference = quality.points[quality.reference]
    chosen = "" if quality.cheapest is None else _sentence(quality.points[quality.cheapest], reference)
    return join(
        [
            el("p", f"{count}NFE: evaluations of the field for a predicted frame. {chosen}", class_="lead"),
            el("div", charts, class_="charts"),
            details(f"all {len(quality.points)} ways to sample", _table(quality)),
        ]
    )


def is_plain(point: Point) -> bool:
    """Whether nothing but solver and evaluations is chosen."""
    return point.warm_start == 0 and point.condition == "per-evaluation"


def describe_point(point: Point) -> str:
    """A way to sample in a few words."""
    words = [point.solver]
    words += [f"warm start {point.warm_start:g}"] if point.warm_start else []
    words += ["one condition a frame"] if point.condition == "per-frame" else []
    words += ["official grid"] if point.preset == "official" else []
    words += [f"seed {point.seed}"] if point.seed else []
    return ", ".join(words)


def _there(quality: Quality) -> list[str]:
    """What was measured of any point."""
    return [key for key in PANELS if any(getattr(point, key) is not None for point in quality.points)]


def _sentence(cheapest: Point, reference: Point) -> str:
    return (
        f"Fewest that lose nothing measurable: {cheapest.nfe} ({describe_point(cheapest)}), "
        f"{reference.nfe / cheapest.nfe:.3g} times fewer than {reference.nfe}."
    )


def _panel(quality: Quality, key: str) -> Html:
    title, unit, better, _ = PANELS[key]
    reference = quality.points[quality.reference]
    # Other seeds are there to show how much they scatter.
    plain = [
        point
        for point in quality.points
        if is_plain(point) and point.seed == reference.seed and getattr(point, key) is not None
    ]
    lines = []
    known = list(SOLVERS)
    solvers = sorted(
        {point.solver for point in plain}, key=lambda name: (known.index(name) if name in known else 9, name)
    )
    for number, solver in enumerate(solvers):
        by_nfe = {point.nfe: point for point in reversed(plain) if point.solver == solver}
        points = [by_nfe[nfe] for nfe in sorted(by_nfe)]
        intervals = [getattr(point, f"{key}_interval", None) for point in points]
        lines.append(
            Line(
                solver,
                [point.nfe for point in points],
                [getattr(point, key) for point in points],
                SOLVERS.get(solver, f"s{1 + number % 5}"),
                None if None in intervals else intervals,
                marks=True,
            )
        )
    everywhere = [point.nfe for point in plain]
    value = getattr(reference, key)
    if everywhere and value is not None and key != "milliseconds_per_frame":
        ends = [min(everywhere), max(everywhere)]
        lines.append(Line(f"level of {reference.nfe} evaluations", ends, [value, value], "reference"))
    ticks = [tick for tick in TICKS if everywhere and min(everywhere) <= tick <= max(everywhere)]
    logarithmic = key == "milliseconds_per_frame"
    return chart(
        f"{title} against NFE", lines, "NFE (evaluations a frame)", unit,
        better=better, log_x=True, log_y=logarithmic, x_ticks=ticks if len(ticks) > 1 else None,
    )  # fmt: skip


def _table(quality: Quality) -> Html:
    there = _there(quality)
    rows = []
    for point in quality.points:
        row = [describe_point(point), point.nfe]
        for key in there:
            digits = PANELS[key][3] if key != "milliseconds_per_frame" else None
            interval = interval_text(getattr(point, f"{key}_interval", None), digits)
            row.append([number_text(getattr(point, key), digits), el("small", interval)])
        rows.append(row)
    heads = [PANELS[key][1] for key in there]
    return table(["way", "NFE", *heads], rows, "all ways to sample")
