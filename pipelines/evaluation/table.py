"""An evaluation as a table for people."""

import textwrap
from typing import Any

import torch
from torch import Tensor

from pipelines.evaluation.metrics import Metric, choose_best, mean_interval

SUBJECTS = ("prediction", "copy_last", "reconstruction")


def summarise(metric: Metric, values: dict[str, Tensor], counts: Tensor | None) -> dict[str, Any]:
    """One metric of all subjects.

    Args:
        values: by subject [clips, samples, horizon]; baselines have one sample.
        counts: [resamples, clips] of the bootstrap; None: no intervals.
    Returns:
        By subject the mean over clips, samples and frames; `per_frame`, `interval`, `per_frame_interval` by subject;
        and where there are several samples `best_of`: `samples`, `value`, `per_frame`, `interval`.
    """
    found: dict[str, Any] = {}
    of_clips = {subject: values[subject].double().mean(1) for subject in SUBJECTS}
    if values["prediction"].shape[1] > 1:
        of_clips["best_of"] = choose_best(values["prediction"].double(), metric.higher_is_better)
    parts = {subject: _of_subject(clips, counts) for subject, clips in of_clips.items()}
    best = parts.pop("best_of", None)
    for subject, part in parts.items():
        found[subject] = part["value"]
    for key in ("per_frame", "interval", "per_frame_interval"):
        if key in parts["prediction"]:
            found[key] = {subject: part[key] for subject, part in parts.items()}
    if best is not None:
        best.pop("per_frame_interval", None)
        found["best_of"] = {"samples": values["prediction"].shape[1], **best}
    return found


def _of_subject(clips: Tensor, counts: Tensor | None) -> dict[str, Any]:
    """Of [clips, horizon]: mean and curve, each with its interval."""
    per_frame = clips.mean(0)
    # The mean of the listed numbers, so that who averages them again finds the same.
    found: dict[str, Any] = {"value": sum(per_frame.tolist()) / len(per_frame), "per_frame": per_frame.tolist()}
    if counts is not None:
        both = mean_interval(torch.cat([clips, clips.mean(1, keepdim=True)], dim=1), counts)
        found["interval"] = both[:, -1].tolist()
        found["per_frame_interval"] = both[:, :-1].T.tolist()
    return found


TITLES = {
    "prediction": "prediction",
    "best_of": "prediction, best of",
    "copy_last": "copying the last frame",
    "reconstruction": "autoencoder's reconstruction (upper bound)",
}
HEADINGS = {"psnr": "PSNR [dB], higher is better", "ssim": "SSIM, higher is better", "lpips": "LPIPS, lower is better"}
WIDTH = 120


def format_table(result: dict[str, Any]) -> str:
    """The metrics, the protocol below them, and what is missing; no line is longer than 120 characters.

    Args:
        result: as `evaluate` returns it.
    """
    protocol, metrics = result["protocol"], result["metrics"]
    lines = _wrap(
        f"{protocol['dataset']}, {protocol['split']} split: {protocol['clips']} clips of {protocol['videos']} videos, "
        f"{protocol['context']} frames given, {protocol['horizon']} predicted, {protocol['samples']} sample(s) a clip, "
        f"{protocol['description']}",
        "",
    )
    for metric, heading in HEADINGS.items():
        if metric in metrics:
            lines += ["", *_frames_table(heading, metrics[metric], protocol["horizon"], 2 if metric == "psnr" else 3)]
    if "fvd" in metrics:
        lines += ["", *_fvd_table(metrics["fvd"])]
    gain = metrics["psnr"]["prediction"] - metrics["psnr"]["copy_last"]
    lines += [
        "",
        f"  The prediction is {abs(gain):.2f} dB {'better' if gain >= 0 else 'WORSE'} than copying the last frame.",
        "",
        *_protocol_lines(protocol),
    ]
    for what, reason in protocol["missing"].items():
        lines += _wrap(f"{what} was not measured: {reason}", "  ")
    return "\n".join(lines)


def _frames_table(heading: str, values: dict[str, Any], horizon: int, digits: int) -> list[str]:
    columns = sorted({0, (horizon - 1) // 2, horizon - 1})
    lines = [f"  {heading:<44}{'mean':>8}{'95 % interval':>18}" + "".join(f"{'+' + str(c + 1):>8}" for c in columns)]
    for subject, title in TITLES.items():
        if subject == "best_of":
            if subject not in values:
                continue
            best = values[subject]
            title = f"{title} {best['samples']}"
            mean, curve, interval = best["value"], best["per_frame"], best.get("interval")
        else:
            mean, curve = values[subject], values["per_frame"][subject]
            interval = values.get("interval", {}).get(subject)
        numbers = "".join(f"{curve[c]:>8.{digits}f}" for c in columns)
        lines.append(f"  {title:<44}{mean:>8.{digits}f}{_interval(interval, digits):>18}{numbers}")
    return lines


def _fvd_table(values: dict[str, Any]) -> list[str]:
    lines = [f"  {'FVD, lower is better':<44}{'to real':>8}{'95 % interval':>18}{'to autoencoded':>18}{'95 %':>18}"]
    digits = 1 if max(values[subject] for subject in TITLES if subject in values) >= 10 else 4
    for subject, title in TITLES.items():
        if subject not in values:
            continue
        line = f"  {title.removesuffix(' (upper bound)'):<44}"
        for against, width in ((values, 8), (values["autoencoded"], 18)):
            if subject in against:
                interval = _interval(against.get("interval", {}).get(subject), digits)
                line += f"{against[subject]:>{width}.{digits}f}{interval:>18}"
        lines.append(line)
    return lines


def _interval(ends: list[float] | None, digits: int) -> str:
    return "" if ends is None else f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def _protocol_lines(protocol: dict[str, Any]) -> list[str]:
    """What is needed to measure the same again."""
    window = {
        "first": "the first frames of each video",
        "random": f"windows drawn with seed {protocol['window_seed']}",
        "moving": "where the given frames of a video move most",
    }[protocol["window"]]
    resize, size = protocol["resize"], protocol["image_size"]
    facts = {
        "protocol": protocol["protocol"] or "none of the literature's (evaluation.protocol)",
        "clips": f"{window}, every frame" if protocol["frame_step"] == 1
        else f"{window}, one frame in {protocol['frame_step']}",
        "frames": f"{resize['crop']}, resized to {size}x{size}, filter {resize['filter']} "
        f"({resize['upscale_filter']} where smaller)",
        "means": protocol["aggregation"],
        "best of": protocol["best_of"],
        "interval": protocol["interval"],
        "sampling": f"{protocol['description']}, {protocol['precision']}, seed {protocol['seed']}",
        "weights": f"autoencoder {protocol['autoencoder_sha256'][:12]}, flow {protocol['flow_sha256'][:12]} (step "
        f"{protocol['flow_step']})" + (f", refiner {protocol['refiner_sha256'][:12]}" if protocol["refine"] else "")
        + (f", VGG16 {protocol['vgg_sha256'][:12]}" if protocol["vgg_sha256"] else ""),
    }  # fmt: skip
    fvd = protocol["fvd"]
    if fvd is not None:
        facts["FVD"] = (
            f"network {fvd['network_sha256'][:12]}, {fvd['clips_of_frames']}; resized {fvd['resize']}; "
            f"{fvd['statistics']}"
            + (f"; interval {fvd['interval']}" if fvd["interval"] else "")
            + (f"; {fvd['samples']}" if protocol["samples"] > 1 else "")
        )
    return [line for name, fact in facts.items() if fact for line in _wrap(fact, f"  {name:<10}")]


def _wrap(text: str, first: str) -> list[str]:
    rest = " " * max(len(first), 2)
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
