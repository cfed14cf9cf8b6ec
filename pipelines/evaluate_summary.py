"""Of the numbers of every clip, sample and frame: means, best of several, and intervals."""

from typing import Any

import torch
from torch import Tensor

from pipelines.bootstrap import mean_interval
from pipelines.metrics import Metric, choose_best

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
