"""An evaluation as a table on the terminal."""

import math
import textwrap

from pipelines.runtime.results import (
    SUBJECTS,
    Calibration,
    Comparison,
    Difference,
    Distances,
    Evaluation,
    EvaluationProtocol,
    Interval,
    Memorization,
    MetricValues,
    RunPredictor,
)

# Metrics whose blocks have a row for every subject; the others have one for each of the main ones.
OF_ALL_SUBJECTS = ("psnr", "ssim", "lpips")
MAIN_SUBJECTS = ("prediction", "copy_last", "reconstruction")
# Metric -> heading, digits
METRICS = {
    "psnr": ("PSNR [dB], higher is better", 2),
    "ssim": ("SSIM, higher is better", 3),
    "lpips": ("LPIPS, lower is better", 3),
    "st_lpips": ("ST-LPIPS, lower is better", 3),
    "sharpness": ("sharpness, 1 is that of the true frames", 3),
}
FEATURE_DISTANCES = {
    "frame_frechet": "frames, Fréchet",
    "frame_mmd": "frames, MMD",
    "motion_frechet": "motion, Fréchet",
    "motion_mmd": "motion, MMD",
}
COMPARED = METRICS | {
    "crps": ("CRPS [levels of 255], lower is better", 2),
    "energy_score": ("energy score [levels of 255], lower is better", 2),
    "latent_energy_score": ("energy score of latents, lower is better", 3),
    "fvd": ("FVD, lower is better", 1),
    "latent_frechet": ("Fréchet of latents, lower is better", 4),
    **{name: (f"features of {title}, lower is better", 4) for name, title in FEATURE_DISTANCES.items()},
}
# Predicted frames of the curves that are shown, and the last one.
FRAMES_SHOWN = (1, 5, 10, 30, 100, 300, 1000)
# Measures of `object_audit.audit_bounces`.
BOUNCES = {
    "bounces": "bounce off walls",
    "collisions": "bounce off each other",
    "elastic": "keep their speed at that",
    "on_time": "are on time",
}
WIDTH = 120
CLIPS_SHOWN = 3


def format_table(evaluation: Evaluation) -> str:
    """The metrics, what is needed to measure them again, and what was not measured; at most 120 characters a line."""
    protocol, metrics = evaluation.protocol, evaluation.metrics
    lines = _wrap(
        f"{protocol.dataset}, {protocol.split} split: {protocol.clips} clips of {protocol.describe_recordings()}, "
        f"{protocol.context} frames given, {protocol.horizon} predicted, {protocol.samples} sample(s) per clip, "
        f"{protocol.predictor.describe()}",
        "",
    )
    for metric in METRICS:
        if metric in metrics:
            lines += ["", *_frames_table(metric, metrics[metric], protocol.horizon)]
    if "fvd" in metrics:
        lines += ["", *_distances_table("FVD, lower is better", metrics["fvd"])]
    if "latent_frechet" in metrics:
        lines += ["", *_distances_table("Fréchet of latents, lower is better", metrics["latent_frechet"])]
    if metrics.keys() >= FEATURE_DISTANCES.keys():
        lines += ["", *_features_table(metrics)]
    if protocol.pitfalls:
        lines += ["", *_pitfalls_table(protocol, metrics)]
    if (gain := evaluation.describe_gain()) is not None:
        lines += ["", *_wrap(gain, "  ")]
        worst = sorted((evaluation.clips or {}).items(), key=lambda clip: clip[1])[:CLIPS_SHOWN]
        lines += _wrap("Worst clips: " + ", ".join(f"{name} ({value:+.1f} dB)" for name, value in worst), "  ")
    if "crps" in metrics:
        lines += _wrap(_describe_scores(metrics), "  ")
    if evaluation.calibration is not None:
        lines += _wrap(_describe_calibration(evaluation.calibration), "  ")
    if evaluation.objects is not None:
        lines += _wrap(_describe_objects(evaluation.objects, protocol.horizon), "  ")
    if evaluation.silhouettes is not None:
        lines += _wrap(_describe_silhouettes(evaluation.silhouettes), "  ")
    if evaluation.memorization is not None:
        lines += _wrap(_describe_memorization(evaluation.memorization), "  ")
    lines.append("")
    for name, fact in _facts(protocol).items():
        lines += _wrap(fact, f"  {name:<10}")
    for what, reason in protocol.missing.items():
        lines += _wrap(f"{what} was not measured: {reason}", "  ")
    return "\n".join(lines)


def format_comparison(comparison: Comparison) -> str:
    """Of each metric a line per predictor, with the difference to the first; at most 120 characters a line."""
    first = comparison.evaluations[comparison.reference]
    protocol = first.protocol
    lines = _wrap(
        f"{protocol.dataset}, {protocol.split} split: {protocol.clips} clips of {protocol.describe_recordings()}, "
        f"{protocol.context} frames given, {protocol.horizon} predicted, {protocol.samples} sample(s) per clip; "
        f"differences to {comparison.reference} on the same clips",
        "",
    )
    for metric, differences in comparison.differences.get("metrics", {}).items():
        heading, digits = COMPARED.get(metric, (metric, 4))
        widths = (8, 20, 12, 20, 10)
        sign = 1 if "higher is better" in heading else -1 if "lower is better" in heading else 0
        lines += ["", _row(heading, "mean", "95 % interval", "difference", "95 % interval", widths=widths)]
        for name, evaluation in comparison.evaluations.items():
            values = evaluation.metrics.get(metric)
            if values is not None:
                cells = _compared(values, "prediction", differences.get(name), digits, sign)
                lines.append(_row(name if len(name) <= 44 else f"...{name[-41:]}", *cells, widths=widths))
        for subject, title in SUBJECTS.items():
            is_shown = metric in OF_ALL_SUBJECTS or subject in MAIN_SUBJECTS
            if subject in differences and subject != "reconstruction" and is_shown:
                cells = _compared(first.metrics[metric], subject, differences[subject], digits, sign)
                lines.append(_row(title, *cells, widths=widths))
    lines.append("")
    lines += _wrap(protocol.interval or "", "  interval  ") if protocol.interval else []
    for what, reason in protocol.missing.items():
        lines += _wrap(f"{what} was not measured: {reason}", "  ")
    return "\n".join(lines)


def _compared(values: MetricValues, subject: str, difference: Difference | None, digits: int, sign: int) -> list[str]:
    """Cells of a subject: its number, and what that is more than the reference's.

    Args:
        sign: 1 where more is better, -1 where less is, 0 where neither is.
    """
    cells = [f"{getattr(values, subject):.{digits}f}", _interval((values.interval or {}).get(subject), digits)]
    if difference is None:
        return cells
    ends = difference.interval
    cells += [f"{difference.value:+.{digits}f}", _interval(ends, digits)]
    if ends is not None and sign:
        worst, best = sorted(sign * end for end in ends)
        cells.append("better" if worst > 0 else "worse" if best < 0 else "unclear")
    return cells


def _frames_table(metric: str, values: MetricValues, horizon: int) -> list[str]:
    """Means, intervals, and a few frames of the curves."""
    assert values.per_frame is not None
    heading, digits = METRICS[metric]
    columns = _columns(horizon)
    rows = [
        (title, getattr(values, subject), (values.interval or {}).get(subject), values.per_frame[subject])
        for subject, title in SUBJECTS.items()
        if subject in values.per_frame and (metric in OF_ALL_SUBJECTS or subject in MAIN_SUBJECTS)
    ]
    best = values.best_of
    if best is not None:
        rows.insert(1, (f"prediction, best of {best.samples}", best.value, best.interval, best.per_frame))
    lines = [_row(heading, "mean", "95 % interval", *(f"+{column + 1}" for column in columns))]
    for title, mean, interval, curve in rows:
        numbers = (f"{curve[column]:.{digits}f}" for column in columns)
        lines.append(_row(title, f"{mean:.{digits}f}", _interval(interval, digits), *numbers))
    return lines


def _columns(horizon: int) -> list[int]:
    """At most six predicted frames, counted from 0."""
    shown = [frame for frame in FRAMES_SHOWN if frame < horizon] + [horizon]
    return [frame - 1 for frame in (shown if len(shown) <= 6 else shown[:1] + shown[-5:])]


def _describe_scores(metrics: dict[str, MetricValues]) -> str:
    """Of the prediction, and of copying in parentheses."""

    def both(metric: str, digits: int, word: str = "") -> str:
        values = metrics[metric]
        copying = "" if values.copy_last is None else f" ({word}{values.copy_last:.{digits}f})"
        return f"{values.prediction:.{digits}f}{copying}"

    latents = f", of latents {both('latent_energy_score', 3)}" if "latent_energy_score" in metrics else ""
    pixels = f"CRPS {both('crps', 2, 'copying ')}, energy score {both('energy_score', 2)} levels of 255"
    return f"{pixels}{latents}; lower is better."


def _describe_calibration(found: Calibration) -> str:
    ratio = found.spread_skill
    interval = _interval((ratio.interval or {}).get("prediction"), 2)
    spread = f"Spread/skill of {found.samples} samples {ratio.prediction:.2f} {interval}".rstrip()
    flat = 200 / len(found.ranks)
    return (
        f"{spread} (calibrated 1); {100 * found.outside:.0f} % of pixels outside all samples (calibrated {flat:.0f} %)."
    )


def _describe_objects(objects: dict[str, MetricValues], horizon: int) -> str:
    whole, position = ((objects[measure].per_frame or {})["prediction"] for measure in ("whole", "position"))
    columns = _columns(horizon)
    shares = ", ".join(f"{100 * whole[column]:.0f} %" for column in columns)
    distances = ", ".join(f"{position[column]:.1f}" for column in columns)
    frames = ", ".join(f"+{column + 1}" for column in columns)
    bounces = ", ".join(
        f"{100 * objects[measure].prediction:.0f} % {words}"
        for measure, words in BOUNCES.items()
        if measure in objects and math.isfinite(objects[measure].prediction)
    )
    return (
        f"All objects are whole in {shares} of the clips at {frames}; they are {distances} pixels of 64 off there"
        + (f"; {bounces}." if bounces else ".")
    )


def _describe_silhouettes(silhouettes: dict[str, MetricValues]) -> str:
    words = {
        "kept": "has about its true area in {} of the frames",
        "speed": "{} of the true speed",
        "identity": "and looks like the same person in {}",
    }
    measured = {measure: values for measure, values in silhouettes.items() if measure in words}
    parts = [words[measure].format(_percent(values)) for measure, values in measured.items()]
    limits = any(values.reconstruction is not None for values in measured.values())
    return f"What moves {', '.join(parts)}{'; in brackets the reconstruction' if limits else ''}."


def _percent(values: MetricValues) -> str:
    limit = "" if values.reconstruction is None else f" ({100 * values.reconstruction:.0f})"
    return f"{100 * values.prediction:.0f} %{limit}"


def _describe_memorization(found: Memorization) -> str:
    return (
        f"Nearest training clip: {found.prediction:.2f} from the predictions (smallest "
        f"{found.smallest['prediction']:.2f}, a copy: 0), {found.truth:.2f} from the truth; error {found.error:.2f}."
    )


def _distances_table(heading: str, values: MetricValues) -> list[str]:
    widths = (8, 18, 18, 18)
    heads = ("to real", "95 % interval", *(("to autoencoded", "95 % interval") if values.autoencoded else ()))
    lines = [_row(heading, *heads, widths=widths)]
    digits = 1 if max(getattr(values, subject) or 0.0 for subject in MAIN_SUBJECTS) >= 10 else 4
    for subject in MAIN_SUBJECTS:
        cells = []
        for distances in (values, values.autoencoded or Distances()):
            value = getattr(distances, subject)
            if value is not None:
                cells += [f"{value:.{digits}f}", _interval((distances.interval or {}).get(subject), digits)]
        if cells:
            lines.append(_row(SUBJECTS[subject], *cells, widths=widths))
    return lines


def _pitfalls_table(protocol: EvaluationProtocol, metrics: dict[str, MetricValues]) -> list[str]:
    """The numbers that published code computes in its own way."""
    widths = (12, 20, 12, 12)
    lines = [_row("as published code (pitfalls)", "prediction", "95 % interval", "best", "copying", widths=widths)]
    for name in protocol.pitfalls:
        if name in metrics:
            values, best = metrics[name], metrics[name].best_of
            digits = 3 if name.startswith("ssim") else 2
            numbers = (values.prediction, best and best.value, values.copy_last)
            mean, chosen, copied = ("" if number is None else f"{number:.{digits}f}" for number in numbers)
            interval = _interval((values.interval or {}).get("prediction"), digits)
            lines.append(_row(name, mean, interval, chosen, copied, widths=widths))
    return lines


def _features_table(metrics: dict[str, MetricValues]) -> list[str]:
    """The Fréchet distances of ST-LPIPS' features side by side; intervals and kernel distances are in the file."""
    columns = {name.removesuffix("_frechet"): metrics[name] for name in FEATURE_DISTANCES if name.endswith("_frechet")}
    widths = (8,) * len(columns)
    lines = [_row("Fréchet of features, lower is better", *columns, widths=widths)]
    for subject in MAIN_SUBJECTS:
        values = [getattr(of, subject) for of in columns.values()]
        if None not in values:
            lines.append(_row(SUBJECTS[subject], *(f"{value:.4f}" for value in values), widths=widths))
    return lines


def _row(title: str, *cells: str, widths: tuple[int, ...] = (8, 18, 8, 8, 8, 8, 8, 8)) -> str:
    return f"  {title:<44}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False))


def _interval(ends: Interval | None, digits: int) -> str:
    return "" if ends is None else f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def _facts(protocol: EvaluationProtocol) -> dict[str, str]:
    """What is needed to measure the same again, in short; `evaluation.json` has the rest."""
    window = {
        "first": "the first frames of each video",
        "random": f"windows drawn with seed {protocol.window_seed}",
        "moving": "where the given frames of a video move most",
    }.get(protocol.window, f"chosen as by {protocol.window}, seed {protocol.window_seed}")
    step = "every frame" if protocol.frame_step == 1 else f"one frame in {protocol.frame_step}"
    step += "" if protocol.fps is None else f" of videos resampled to {protocol.fps:g} frames per second"
    resize, size = protocol.resize, protocol.image_size
    height, width = (size, size) if isinstance(size, int) else size
    fitted = {"pad": "padded", "stretch": "stretched"}.get(resize.get("fit", ""), "resized")
    predictor, weights, sampling = protocol.predictor, {"autoencoder": protocol.autoencoder_sha256}, None
    if isinstance(predictor, RunPredictor):
        weights |= {f"flow (step {predictor.flow_step})": predictor.flow_sha256, "refiner": predictor.refiner_sha256}
        weights["fast decoder"] = predictor.decoder_sha256
        sampling = f"{predictor.description}, {predictor.precision}, seed {predictor.seed}"
    else:
        weights["predictions"] = predictor.sha256
    weights |= {
        "VGG16": protocol.vgg_sha256,
        "ST-LPIPS": protocol.st_lpips_sha256,
        "I3D": protocol.fvd and protocol.fvd["network_sha256"],
    }
    facts = {
        "protocol": protocol.protocol or "none of the literature's (evaluation.protocol)",
        "clips": f"{window}, {step}, {fitted} to {width}x{height} (filter {resize['filter']})",
        "FVD": protocol.fvd and protocol.fvd["clips_of_frames"],
        "SSIM": protocol.ssim,
        "interval": protocol.interval,
        "sampling": sampling,
        "weights": ", ".join(f"{name} {digest[:12]}" for name, digest in weights.items() if digest),
    }
    return {name: fact for name, fact in facts.items() if fact}


def _wrap(text: str, first: str) -> list[str]:
    rest = " " * max(len(first), 2)
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
