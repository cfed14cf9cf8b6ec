"""An evaluation as a table on the terminal."""

import textwrap

from pipelines.evaluation.results import Distances, Evaluation, EvaluationProtocol, Interval, MetricValues

TITLES = {
    "prediction": "prediction",
    "copy_last": "copying the last frame",
    "reconstruction": "autoencoder's reconstruction (upper bound)",
}
# Metric -> heading, digits
METRICS = {
    "psnr": ("PSNR [dB], higher is better", 2),
    "ssim": ("SSIM, higher is better", 3),
    "lpips": ("LPIPS, lower is better", 3),
}
WIDTH = 120


def format_table(evaluation: Evaluation) -> str:
    """The metrics, the protocol below them, and what was not measured; no line is longer than 120 characters."""
    protocol, metrics = evaluation.protocol, evaluation.metrics
    lines = _wrap(
        f"{protocol.dataset}, {protocol.split} split: {protocol.clips} clips of {protocol.videos} videos, "
        f"{protocol.context} frames given, {protocol.horizon} predicted, {protocol.samples} sample(s) per clip, "
        f"{protocol.description}",
        "",
    )
    for metric, (heading, digits) in METRICS.items():
        if metric in metrics:
            lines += ["", *_frames_table(heading, metrics[metric], protocol.horizon, digits)]
    if "fvd" in metrics:
        lines += ["", *_fvd_table(metrics["fvd"])]
    gain = metrics["psnr"].prediction - (metrics["psnr"].copy_last or 0.0)
    lines += [
        "",
        f"  The prediction is {abs(gain):.2f} dB {'better' if gain >= 0 else 'WORSE'} than copying the last frame.",
        "",
        *_protocol_lines(protocol),
    ]
    for what, reason in protocol.missing.items():
        lines += _wrap(f"{what} was not measured: {reason}", "  ")
    return "\n".join(lines)


def _frames_table(heading: str, values: MetricValues, horizon: int, digits: int) -> list[str]:
    """Means, intervals, and a few frames of the curves."""
    assert values.per_frame is not None
    columns = sorted({0, (horizon - 1) // 2, horizon - 1})
    rows = [
        (title, getattr(values, subject), values.per_frame[subject], (values.interval or {}).get(subject))
        for subject, title in TITLES.items()
    ]
    best = values.best_of
    if best is not None:
        rows.insert(1, (f"prediction, best of {best.samples}", best.value, best.per_frame, best.interval))
    lines = [f"  {heading:<44}{'mean':>8}{'95 % interval':>18}" + "".join(f"{'+' + str(c + 1):>8}" for c in columns)]
    for title, mean, curve, interval in rows:
        numbers = "".join(f"{curve[c]:>8.{digits}f}" for c in columns)
        lines.append(f"  {title:<44}{mean:>8.{digits}f}{_interval(interval, digits):>18}{numbers}")
    return lines


def _fvd_table(values: MetricValues) -> list[str]:
    lines = [f"  {'FVD, lower is better':<44}{'to real':>8}{'95 % interval':>18}{'to autoencoded':>18}{'95 %':>18}"]
    digits = 1 if max(getattr(values, subject) for subject in TITLES) >= 10 else 4
    for subject, title in TITLES.items():
        line = f"  {title.removesuffix(' (upper bound)'):<44}"
        for distances, width in ((values, 8), (values.autoencoded or Distances(), 18)):
            value = getattr(distances, subject)
            if value is not None:
                interval = _interval((distances.interval or {}).get(subject), digits)
                line += f"{value:>{width}.{digits}f}{interval:>18}"
        lines.append(line)
    return lines


def _interval(ends: Interval | None, digits: int) -> str:
    return "" if ends is None else f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def _protocol_lines(protocol: EvaluationProtocol) -> list[str]:
    """What is needed to measure the same again."""
    window = {
        "first": "the first frames of each video",
        "random": f"windows drawn with seed {protocol.window_seed}",
        "moving": "where the given frames of a video move most",
    }[protocol.window]
    step = "every frame" if protocol.frame_step == 1 else f"one frame in {protocol.frame_step}"
    resize, size = protocol.resize, protocol.image_size
    weights = {"autoencoder": protocol.autoencoder_sha256, "flow": protocol.flow_sha256,
               "refiner": protocol.refiner_sha256, "VGG16": protocol.vgg_sha256}  # fmt: skip
    digests = [
        f"{name} {digest[:12]}" + (f" (step {protocol.flow_step})" if name == "flow" else "")
        for name, digest in weights.items()
        if digest is not None
    ]
    facts = {
        "protocol": protocol.protocol or "none of the literature's (evaluation.protocol)",
        "clips": f"{window}, {step}",
        "frames": f"{resize['crop']}, resized to {size}x{size}, filter {resize['filter']} ({resize['upscale_filter']} "
        "for smaller frames)",
        "means": protocol.aggregation,
        "best of": protocol.best_of,
        "interval": protocol.interval,
        "sampling": f"{protocol.description}, {protocol.precision}, seed {protocol.seed}",
        "weights": ", ".join(digests),
    }
    fvd = protocol.fvd
    if fvd is not None:
        parts = [
            f"network {fvd['network_sha256'][:12]}, {fvd['clips_of_frames']}",
            f"resized {fvd['resize']}",
            fvd["statistics"],
            fvd["interval"] and f"interval {fvd['interval']}",
            protocol.samples > 1 and fvd["samples"],
        ]
        facts["FVD"] = "; ".join(part for part in parts if part)
    return [line for name, fact in facts.items() if fact for line in _wrap(fact, f"  {name:<10}")]


def _wrap(text: str, first: str) -> list[str]:
    rest = " " * max(len(first), 2)
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
