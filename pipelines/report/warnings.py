"""Warnings about a run: results that are worse than they look, out of date, or unfinished."""

import math
from collections.abc import Iterator

from pipelines.bench.measurement import Benchmark
from pipelines.evaluation.measures.intervals import MIN_RECORDINGS
from pipelines.report.charts import number_text
from pipelines.report.quality import METRICS
from pipelines.report.run_files import Run
from pipelines.runtime.logs import Log
from pipelines.runtime.results import Evaluation, MetricValues, RunPredictor

# Relative rise of the validation loss above its minimum that is no scatter.
LOSS_RISE = 0.05
# dB that the validation PSNR may be below its maximum.
PSNR_FALL = 0.5
# Distances of sets of frames, in which a copied frame is a faultless one.
OF_SINGLE_FRAMES = ("frame_frechet", "frame_mmd")
# Below these shares of the codes, the codebook has collapsed.
MIN_USED, MIN_PERPLEXITY = 0.5, 0.1


def run_warnings(run: Run) -> Iterator[str]:
    """All warnings, the most serious first; none about files that cannot be read, which their sections report."""
    evaluation, benchmark = run.read_if_sound(Evaluation), run.read_if_sound(Benchmark)
    if evaluation is not None:
        yield from _no_better_than_copying(evaluation)
        yield from _no_better_than_motion(evaluation)
        yield from _out_of_date(run, evaluation)
        if evaluation.protocol.recordings < MIN_RECORDINGS:
            yield f"The metrics are measured on {evaluation.protocol.recordings} recordings only: expect large scatter."
    for name, status in run.stages.items():
        if status.state == "conflicting":
            yield f"Stage {name}: {status.detail}"
        elif status.state == "partial":
            target = "encode" if name == "store" else f"train-{name}"
            yield f"Stage {name} is not finished ({status.detail}): `{run.command(target)}` resumes it."
    yield from training_warnings(run)
    missed = [] if benchmark is None else [line.name for line in benchmark.measurements if line.reached is False]
    if missed:
        yield f"The benchmark is below its targets in: {'; '.join(missed)}."


def training_warnings(run: Run) -> Iterator[str]:
    """Those that can be given while a training runs."""
    for training, log in run.logs.items():
        if log is not None:
            yield from _getting_worse(training, log)
    yield from _codebook(run)


def _no_better_than_copying(evaluation: Evaluation) -> Iterator[str]:
    worse, unclear = [], []
    for metric in METRICS:
        values = evaluation.metrics.get(metric.key)
        if values is None or metric.better is None or metric.key in OF_SINGLE_FRAMES:
            continue
        if values.copy_last is None or math.isnan(values.prediction):
            continue
        ours, copied = (number_text(value, metric.digits) for value in (values.prediction, values.copy_last))
        text = f"{metric.title} ({ours} against {copied})"
        if not metric.is_better(values.prediction, values.copy_last):
            worse.append(text)
        elif not _is_clear(values):
            unclear.append(text)
    if worse:
        yield f"The prediction is no better than copying the last frame by {', '.join(worse)}."
    if unclear:
        yield (
            f"The prediction is hardly better than copying the last frame by {', '.join(unclear)}: "
            "the 95 % intervals do not exclude that copying is as good."
        )


def _no_better_than_motion(evaluation: Evaluation) -> Iterator[str]:
    gains = evaluation.metrics["psnr"].gains if "psnr" in evaluation.metrics else None
    gain = (gains or {}).get("constant_motion")
    if gain is not None and not gain.is_clear:
        interval = "" if gain.interval is None else f" (95 %: {gain.interval[0]:.2f} to {gain.interval[1]:.2f})"
        yield (
            f"By PSNR the prediction is no better, or hardly, than letting the last motion go on: {gain.value:+.2f} dB"
            f"{interval}. It has learned little about what happens."
        )


def _is_clear(values: MetricValues) -> bool:
    """Whether the intervals say that a prediction whose number is better is better."""
    if values.gains is not None:
        return values.gains["copy_last"].is_clear
    intervals = values.interval or {}
    if not {"prediction", "copy_last"} <= intervals.keys():
        return True
    (low, high), (copied_low, copied_high) = intervals["prediction"], intervals["copy_last"]
    return low > copied_high or copied_low > high


def _out_of_date(run: Run, evaluation: Evaluation) -> Iterator[str]:
    flow, protocol = run.checkpoints["flow"], evaluation.protocol
    predictor = protocol.predictor
    if flow is None or not isinstance(predictor, RunPredictor):
        return
    if predictor.flow_step != flow.step:
        yield (
            f"The metrics belong to the flow at step {predictor.flow_step}, but the run is now at step {flow.step}: "
            f"`{run.command('evaluate')}` measures it."
        )
    autoencoder = flow.state.get("store", {}).get("autoencoder", predictor.autoencoder_sha256)
    if autoencoder != predictor.autoencoder_sha256:
        yield (
            f"The metrics belong to another autoencoder ({predictor.autoencoder_sha256[:12]}) than the flow's "
            f"({autoencoder[:12]}): `{run.command('evaluate')}` measures again."
        )


def _getting_worse(training: str, log: Log) -> Iterator[str]:
    if skipped := max((count for count, _ in log.finite("skipped_steps")), default=0):
        yield f"{skipped:g} steps of the {training} had a loss or gradients that are not finite, and changed nothing."
    losses, psnrs = log.finite("validation_loss"), log.finite("validation_psnr")
    if losses and losses[-1][0] > min(losses)[0] * (1 + LOSS_RISE):
        (least, best), (last, step) = min(losses), losses[-1]
        yield (
            f"The {training}'s validation loss rises: {number_text(last)} at step {step:g}, "
            f"{100 * (last / least - 1):.0f} % above its minimum, {number_text(least)} at step {best:g}."
        )
    if psnrs and psnrs[-1][0] < max(psnrs)[0] - PSNR_FALL:
        (best, step), (last, _) = max(psnrs), psnrs[-1]
        yield f"The {training}'s validation PSNR has fallen to {last:.2f} dB, from {best:.2f} dB at step {step:g}."


def _codebook(run: Run) -> Iterator[str]:
    """Codes in use by the store's training split, or else by the training's log."""
    codes, used, perplexity = run.config.autoencoder.model.codes, None, None
    for cache in run.splits[:1]:
        codes = cache.metadata.autoencoder.get("codes", codes)
        used, perplexity = cache.notes.get("codes_used"), cache.notes.get("code_perplexity")
    log = run.logs["autoencoder"]
    if used is None and log is not None and log.finite("codes_used"):
        used = log.finite("codes_used")[-1][0]
        perplexity = (log.finite("code_perplexity") or [(used, 0)])[-1][0]
    if used is not None and (used < MIN_USED * codes or perplexity < MIN_PERPLEXITY * codes):
        yield (
            f"The codebook has collapsed: {used:g} of {codes} codes are in use, with a perplexity of {perplexity:.0f}. "
            "Lower autoencoder.training.restart_every or autoencoder.model.codes, or set codebook_start: kmeans."
        )
