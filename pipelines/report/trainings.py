"""How trainings went: losses, validation, and speed beside the benchmark."""

from dataclasses import dataclass
from typing import Any

from pipelines.bench.measurement import Benchmark
from pipelines.report.charts import Chart, Line, number_text
from pipelines.report.run_files import Run
from pipelines.runtime.logs import Log
from pipelines.runtime.run_folder import describe_progress

TITLES = {
    "flow": "Stage 2: the flow",
    "autoencoder": "Stage 1: the autoencoder",
    "decoder": "The fast decoder (optional)",
    "refiner": "The refiner (optional)",
}
# Logged at every line: shown as means over parts of the training, with a band between their extremes.
NOISY = ("loss", "l1", "l2", "perceptual", "codebook", "adversarial", "logits_real", "logits_fake", "gradient_norm")
NOISY_POINTS = 60


@dataclass(frozen=True)
class Panel:
    """A chart of logged quantities.

    Attributes:
        quantities: key in the log -> name in the legend.
    """

    title: str
    y_label: str
    quantities: dict[str, str]
    better: str | None = None
    log_y: bool = False


LOSS = Panel("Loss", "loss", {"loss": "training", "validation_loss": "validation"}, "lower", log_y=True)
GRADIENTS = Panel("Gradient norm", "L2 norm", {"gradient_norm": "before clipping"}, log_y=True)
IMAGE_METRICS = [
    Panel("Validation PSNR", "PSNR [dB]", {"validation_psnr": "PSNR"}, "higher"),
    Panel("Validation SSIM", "SSIM", {"validation_ssim": "SSIM"}, "higher"),
    Panel("Validation LPIPS", "LPIPS", {"validation_lpips": "LPIPS"}, "lower"),
    Panel("Validation ST-LPIPS", "ST-LPIPS", {"validation_st_lpips": "ST-LPIPS"}, "lower"),
]
PATH_TIMES = ("t from 0 to 0.25 (noise)", "0.25 to 0.5", "0.5 to 0.75", "0.75 to 1 (data)")
TERMS = {"l1": "L1", "l2": "L2", "perceptual": "perceptual", "codebook": "codebook", "adversarial": "adversarial"}
CODES = {
    "codes_used": "in use, training",
    "code_perplexity": "perplexity, training",
    "validation_codes": "in use, validation",
    "validation_perplexity": "perplexity, validation",
}
LOGITS = {"logits_real": "real images", "logits_fake": "reconstructions"}
PANELS = {
    "flow": [
        LOSS,
        Panel(
            "Validation loss by time on the path", "loss",
            {f"validation_loss_t{number}": name for number, name in enumerate(PATH_TIMES)}, "lower", log_y=True,
        ),
        Panel("PSNR of clips predicted during training", "PSNR [dB]", {"validation_sample_psnr": "PSNR"}, "higher"),
        GRADIENTS,
    ],
    "autoencoder": [
        LOSS,
        Panel("Terms of the loss", "term", TERMS, "lower", log_y=True),
        *IMAGE_METRICS,
        Panel("Codes in use", "codes", CODES, "higher"),
        Panel("Discriminator", "logit", LOGITS),
        GRADIENTS,
    ],
    "decoder": [LOSS, Panel("PSNR to the full decoder", "PSNR [dB]", {"validation_psnr": "PSNR"}, "higher"), GRADIENTS],
    "refiner": [LOSS, *IMAGE_METRICS, GRADIENTS],
}  # fmt: skip

# Key in the log -> name, factor and unit of its median.
SPEEDS = {
    "steps_per_second": ("steps per second", 1, ""),
    "samples_per_second": ("samples per second", 1, ""),
    "tflops_per_second": ("arithmetic of the model", 1, " TFLOP/s"),
    "mfu": ("share of the device's matrix product rate", 100, " %"),
    "data_wait": ("share of a step waiting for data", 100, " %"),
    "peak_memory_mb": ("peak memory", 1, " MB"),
}


def training_section(run: Run) -> dict[str, Any]:
    """Progress and charts per training; those of optional networks only where there are any."""
    optional = ("decoder", "refiner")
    shown = [name for name in TITLES if name not in optional or run.logs[name] or run.stages[name].state != "missing"]
    return {"trainings": [_training(run, name) for name in shown]}


def _training(run: Run, training: str) -> dict[str, Any]:
    log = run.logs[training]
    return {
        "title": TITLES[training],
        "target": f"train-{training}",
        "problems": run.damaged_checkpoints(training) + ([] if log is None else log.problems),
        "progress": _progress(run, training),
        "log": log,
        "charts": [] if log is None else training_charts(log, training),
    }


def _progress(run: Run, training: str) -> str | None:
    """How far a training is, in words; None without a checkpoint."""
    log, checkpoint = run.logs[training], run.checkpoints[training]
    if checkpoint is None:
        return None
    status = run.stages[training]
    # What conflicts is told by a warning, at length.
    detail = describe_progress(checkpoint) if status.state == "conflicting" else status.detail
    words = [f"{status.state.capitalize()}: {detail}", f"the checkpoint of step {checkpoint.step} is used"]
    best = checkpoint.state.get("best", {})
    words += [f"best by {key.replace('_', ' ')} ({number_text(value)})" for key, value in best.items()]
    rate = None if log is None else log.median("steps_per_second")
    return ", ".join(words + ([] if rate is None else [f"{number_text(rate)} steps/s"])) + "."


def training_charts(log: Log, training: str) -> list[Chart]:
    """The charts of a training's log; those without a value have no lines."""
    return [_chart(log, panel) for panel in PANELS[training]]


def _chart(log: Log, panel: Panel) -> Chart:
    lines = []
    for number, (key, name) in enumerate(panel.quantities.items(), start=1):
        style = "prediction" if key == "validation_loss" else f"s{number}"
        line = Line(name, *log.series(key), style)
        lines.append(line.thinned(NOISY_POINTS) if key in NOISY else line)
    return Chart(panel.title, lines, "step", panel.y_label, better=panel.better, log_y=panel.log_y)


def speed_section(run: Run) -> dict[str, Any]:
    """Medians of the flow's training, and the benchmark."""
    log = run.logs["flow"]
    medians = {} if log is None else {key: log.median(key) for key in SPEEDS}
    return {
        "training": {
            name: f"{number_text(factor * medians[key])}{unit}"
            for key, (name, factor, unit) in SPEEDS.items()
            if medians.get(key) is not None
        },
        "benchmark": run.read(Benchmark),
    }
