"""How the trainings went: losses, and what was measured on the way."""

from dataclasses import dataclass

from pipelines.report.charts import Line, chart, smoothed
from pipelines.report.inputs import Log, Run
from pipelines.report.markup import Content, Html, code, el, join, note
from pipelines.report.scales import number_text
from pipelines.runtime.checkpoints import Checkpoint
from pipelines.runtime.runs import describe_progress

TITLES = {
    "flow": ("Stage 2: the flow", "train-flow"),
    "autoencoder": ("Stage 1: the autoencoder", "train-autoencoder"),
    "refiner": ("The refiner (optional)", "train-refiner"),
}
FEW_POINTS = 30


@dataclass(frozen=True)
class Panel:
    """A chart of quantities of the log.

    Attributes:
        quantities: key in the log -> (name in the legend, style). One that is logged at every line is also smoothed.
    """

    title: str
    y_label: str
    quantities: dict[str, tuple[str, str]]
    better: str | None = None
    log_y: bool = False


LOSS = Panel(
    "Loss", "loss", {"loss": ("training", "s1"), "validation_loss": ("validation", "prediction")}, "lower", True
)
RATE = Panel("Learning rate", "learning rate", {"learning_rate": ("learning rate", "s1")})
PSNR = Panel("Validation PSNR", "PSNR [dB]", {"validation_psnr": ("PSNR", "s1")}, "higher")
SSIM = Panel("Validation SSIM", "SSIM", {"validation_ssim": ("SSIM", "s1")}, "higher")
LPIPS = Panel("Validation LPIPS", "LPIPS", {"validation_lpips": ("LPIPS", "s1")}, "lower")
PANELS = {
    "flow": [
        LOSS,
        Panel(
            "Validation loss by time on the path",
            "loss",
            {
                "validation_loss_t0": ("t from 0 to 0.25 (noise)", "s1"),
                "validation_loss_t1": ("0.25 to 0.5", "s2"),
                "validation_loss_t2": ("0.5 to 0.75", "s3"),
                "validation_loss_t3": ("0.75 to 1 (data)", "s4"),
            },
            "lower",
            True,
        ),
        Panel("PSNR of clips predicted on the way", "PSNR [dB]", {"validation_sample_psnr": ("PSNR", "s1")}, "higher"),
        RATE,
    ],
    "autoencoder": [
        LOSS,
        Panel(
            "Terms of the loss",
            "term",
            {
                "l1": ("L1", "s1"),
                "l2": ("L2", "s2"),
                "perceptual": ("LPIPS", "s3"),
                "codebook": ("codebook", "s4"),
                "adversarial": ("adversarial", "s5"),
            },
            "lower",
            True,
        ),
        PSNR,
        SSIM,
        LPIPS,
        Panel(
            "Codes in use",
            "codes",
            {
                "codes_used": ("in use, training", "s1"),
                "code_perplexity": ("perplexity, training", "s2"),
                "validation_codes": ("in use, validation", "s3"),
                "validation_perplexity": ("perplexity, validation", "s4"),
            },
            "higher",
        ),
        Panel(
            "Discriminator",
            "logit",
            {"logits_real": ("real images", "s1"), "logits_fake": ("reconstructions", "prediction")},
        ),
        RATE,
    ],
    "refiner": [LOSS, PSNR, SSIM, LPIPS, RATE],
}


def training_section(run: Run) -> Html:
    """A part a training; raises `Problem` where a log cannot be read."""
    return join([_training(run, training) for training in TITLES])


def _training(run: Run, training: str) -> Html | None:
    title, target = TITLES[training]
    log, checkpoint = run.log(training), run.checkpoint(training)
    if training == "refiner" and log is None and checkpoint is None:
        return None  # nobody need have one
    parts: list[Content] = [el("h3", title)]
    parts += [note("problem", problem) for problem in run.damaged_checkpoints(training)]
    if checkpoint is not None:
        parts.append(el("p", _progress(run, training, checkpoint, log)))
    elif log is None or not log.records:
        parts.append(note("missing", "Not trained yet: ", code(run.command(target)), " does it."))
    if log is None and checkpoint is not None:
        parts.append(note("missing", "There is no log of this training, so there are no curves."))
    if log is not None:
        parts += [note("problem", problem) for problem in log.problems[:5]]
        if len(log.problems) > 5:
            parts.append(note("problem", f"... and {len(log.problems) - 5} more lines"))
        parts.append(el("div", [_panel(log, panel) for panel in PANELS[training]], class_="charts"))
    return join(parts)


def _panel(log: Log, panel: Panel) -> Html | None:
    lines = []
    for key, (name, style) in panel.quantities.items():
        x, y = log.series(key)
        # What is measured now and then is shown as it is; what every step scatters, behind its mean.
        if key in ("loss", "l1", "l2", "perceptual", "codebook", "adversarial") and len(x) >= FEW_POINTS:
            lines += [Line(f"{name}, as logged", x, y, style, faint=True), Line(name, x, smoothed(x, y), style)]
        else:
            lines.append(Line(name, x, y, style, marks=True))
    many = sum(not line.faint and bool(line.x) for line in lines) > 1
    lines = [line for line in lines if not (line.faint and many and panel is not LOSS)]
    return chart(panel.title, lines, "step", panel.y_label, better=panel.better, log_y=panel.log_y)


def _progress(run: Run, training: str, checkpoint: Checkpoint, log: Log | None) -> str:
    steps = getattr(run.config, training).training.steps
    reached = max(checkpoint.step, int(log.records[-1]["step"]) if log is not None and log.records else 0)
    words = [describe_progress(checkpoint)]
    if "imported" not in checkpoint.state:
        words = [f"{reached} of {steps} steps; the checkpoint of step {checkpoint.step} is used"]
    best = checkpoint.state.get("best", {})
    words += [f"best by {_in_words(key)}, {number_text(value)}" for key, value in best.items()]
    if log is not None:
        rates = sorted(rate for rate in log.series("steps_per_second")[1] if rate is not None)
        words += [f"{number_text(rates[len(rates) // 2])} steps/s"] if rates else []
    return ", ".join(words) + "."


def _in_words(key: str) -> str:
    """`validation_psnr` to `validation PSNR`."""
    return " ".join(word.upper() if word in ("psnr", "ssim", "lpips") else word for word in key.split("_"))
