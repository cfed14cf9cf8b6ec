"""How fast it is: the benchmark's table, and the trainings' own readings."""

from pipelines.report.forms import Measured
from pipelines.report.inputs import Run
from pipelines.report.markup import Content, Html, code, el, facts, join, note, table
from pipelines.report.scales import number_text

READINGS = {
    "steps_per_second": ("steps a second", 1.0, ""),
    "samples_per_second": ("samples a second", 1.0, ""),
    "tflops_per_second": ("of the model's arithmetic", 1.0, " TFLOP/s"),
    "mfu": ("of what the device's matrix products reach", 100.0, " %"),
    "data_wait": ("of a step waiting for data", 100.0, " %"),
    "peak_memory_mb": ("memory at its peak", 1.0, " MB"),
}


def speed_section(run: Run) -> Html:
    """Readings and benchmark; raises `Problem` where a file is damaged."""
    parts: list[Content] = []
    log = run.log("flow")
    if log is not None:
        pairs = [(name, _median(log.series(key)[1], factor, unit)) for key, (name, factor, unit) in READINGS.items()]
        if any(value for _, value in pairs):
            parts += [el("h3", "Training the flow, median"), facts(pairs)]
    benchmark = run.benchmark
    parts.append(el("h3", "Benchmark"))
    if benchmark is None:
        parts.append(note("missing", "Not measured yet: ", code(run.command("bench")), " does it."))
        return join(parts)
    versions = ", ".join(f"{name} {version}" for name, version in benchmark.software.items())
    words = ", ".join(filter(None, [benchmark.hardware, versions, benchmark.date[:10]]))
    rows = [
        [
            line.name,
            f"{number_text(line.value)} {line.unit}",
            line.reference,
            "" if line.ratio is None else number_text(line.ratio),
            _demand(line),
        ]
        for line in benchmark.measurements
    ]
    heads = ["what", "value", "held against", "ratio", "wanted"]
    parts += [el("p", words), table(heads, rows, "benchmark", numbers_from=3)]
    return join(parts)


def _demand(line: Measured) -> Content:
    if line.at_least is None and line.at_most is None:
        return ""
    text = f"≥ {line.at_least:g}" if line.at_least is not None else f"≤ {line.at_most:g}"
    if line.reached is False:
        return el("span", f"{text}, not reached", class_="missed")
    return el("span", f"{text} ✓", class_="reached")


def _median(values: list[float | None], factor: float, unit: str) -> str:
    there = sorted(value for value in values if value is not None)
    return f"{number_text(factor * there[len(there) // 2])}{unit}" if there else ""
