"""What a reader of a report should be warned of, in plain words."""

from collections.abc import Iterator

import latent_cache
from latent_cache import StoreError
from pipelines.report.forms import Evaluation
from pipelines.report.inputs import Log, Problem, Run
from pipelines.report.quality import METRICS
from pipelines.report.scales import number_text

# A validation loss so much above its least value, relatively, is no scatter.
RISE = 0.05
# Fewer clips say little.
FEW_CLIPS = 20
# Less than these shares of the codes: the codebook has collapsed.
LEAST_USED, LEAST_PERPLEXITY = 0.5, 0.1


def warnings_of(run: Run) -> list[str]:
    """All warnings, the gravest first; none about files that are damaged, which their sections name."""
    evaluation: Evaluation | None = run.sound("evaluation")
    found: list[str] = []
    if evaluation is not None:
        found += [*_against_copying(evaluation), *_stale(run, evaluation), *_few_clips(evaluation)]
    for training in ("autoencoder", "flow", "refiner"):
        log = _log(run, training)
        if log is not None:
            found += [*_unfinished(run, training, log), *_rising(training, log), *_lost_quality(training, log)]
    found += _codebook(run)
    benchmark = run.sound("benchmark")
    missed = [] if benchmark is None else [line.name for line in benchmark.measurements if line.reached is False]
    if missed:
        found.append(f"The benchmark is below what is wanted in: {'; '.join(missed)}.")
    return found


def _against_copying(evaluation: Evaluation) -> Iterator[str]:
    for metric in METRICS:
        values = evaluation.metrics.get(metric.key)
        if values is None or values.prediction is None or values.copy_last is None:
            continue
        ours, copied = (number_text(value, metric.digits) for value in (values.prediction, values.copy_last))
        if not metric.is_better(values.prediction, values.copy_last):
            yield f"By {metric.title} the prediction ({ours}) is no better than copying the last frame ({copied})."
            continue
        intervals = [values.interval.get(subject) for subject in ("prediction", "copy_last")]
        if None in intervals or any(None in interval for interval in intervals):
            continue
        (low, high), (copied_low, copied_high) = intervals
        if (low <= copied_high) if metric.better == "higher" else (high >= copied_low):
            yield (
                f"By {metric.title} the prediction ({ours}) is hardly better than copying the last frame ({copied}): "
                "their 95 % intervals overlap."
            )


def _stale(run: Run, evaluation: Evaluation) -> Iterator[str]:
    flow, protocol = run.checkpoint("flow"), evaluation.protocol
    if flow is None:
        return
    measured = protocol.get("flow_step")
    if isinstance(measured, int) and measured != flow.step:
        yield (
            f"The metrics are of the flow at step {measured}, and the run is now at step {flow.step}: "
            f"`{run.command('evaluate')}` measures it."
        )
    store = flow.state.get("store")
    now = store.get("autoencoder") if isinstance(store, dict) else None
    then = protocol.get("autoencoder_sha256")
    if isinstance(now, str) and isinstance(then, str) and now != then:
        yield (
            f"The metrics are of another autoencoder ({then[:12]}) than the flow's ({now[:12]}): "
            f"`{run.command('evaluate')}` measures anew."
        )


def _few_clips(evaluation: Evaluation) -> Iterator[str]:
    clips = evaluation.protocol.get("clips")
    if isinstance(clips, int) and clips < FEW_CLIPS:
        yield f"The metrics are of {clips} clips only: they scatter widely."


def _log(run: Run, training: str) -> Log | None:
    try:
        return run.log(training)
    except Problem:
        return None


def _unfinished(run: Run, training: str, log: Log) -> Iterator[str]:
    steps, checkpoint = getattr(run.config, training).training.steps, run.checkpoint(training)
    reached = log.records[-1]["step"] if log.records else 0
    if reached < steps and not (checkpoint is not None and "imported" in checkpoint.state):
        yield (
            f"The training of the {training} is at step {reached:g} of {steps}: "
            f"`{run.command(f'train-{training}')}` goes on."
        )


def _rising(training: str, log: Log) -> Iterator[str]:
    steps, losses = log.series("validation_loss")
    there = [(loss, step) for step, loss in zip(steps, losses, strict=True) if loss is not None]
    if len(there) < 2:
        return
    (least, best), (last, at) = min(there), there[-1]
    if last > least * (1 + RISE):
        yield (
            f"The {training}'s validation loss rises: {number_text(last)} at step {at:g}, "
            f"{100 * (last / least - 1):.0f} % above its least, {number_text(least)} at step {best:g}."
        )


def _lost_quality(training: str, log: Log) -> Iterator[str]:
    steps, values = log.series("validation_psnr")
    there = [(value, step) for step, value in zip(steps, values, strict=True) if value is not None]
    if there and there[-1][0] < max(there)[0] - 0.5:
        best, at = max(there)
        yield (
            f"The {training}'s validation PSNR has fallen to {there[-1][0]:.2f} dB, from {best:.2f} dB at step {at:g}."
        )


def _codebook(run: Run) -> Iterator[str]:
    """By the store's notes of the training split, or else by the training's log."""
    total = run.config.autoencoder.model.codes
    used = distribution = None
    try:
        if latent_cache.is_complete(run.config.store_path):
            cache = latent_cache.open(run.config.store_path)
            total = cache.metadata.autoencoder.get("codes", total)
            used, distribution = cache.notes.get("codes_used"), cache.notes.get("code_perplexity")
    except StoreError:
        pass  # its section names it
    log = _log(run, "autoencoder")
    if used is None and log is not None:
        used, distribution = log.last("codes_used"), log.last("code_perplexity")
    if not isinstance(used, int | float) or not isinstance(total, int) or not total:
        return
    perplexity = distribution if isinstance(distribution, int | float) else used
    if used < LEAST_USED * total or perplexity < LEAST_PERPLEXITY * total:
        yield (
            f"The codebook has collapsed: {used:g} of {total} codes are in use, with a perplexity of {perplexity:.0f}. "
            "Lower autoencoder.training.restart_every or autoencoder.model.codes, and take codebook_start: kmeans."
        )
