"""Summaries of metrics over clips, samples and frames."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.evaluation.intervals import draw_counts
from pipelines.evaluation.metrics import PSNR, Metric, summarize_metric
from pipelines.runtime.results import MetricValues

LOWER = Metric("lpips", PSNR.function, higher_is_better=False)
SUBJECTS = ("prediction", "copy_last", "reconstruction")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 20


@pytest.mark.parametrize("metric", [PSNR, LOWER])
def test_means_curves_intervals_and_the_best(metric):
    values = {subject: numbers(12, 1, 4, seed=seed) for seed, subject in enumerate(SUBJECTS)}
    values["prediction"] = numbers(12, 3, 4, seed=5)
    found = summarize_metric(metric, values, draw_counts(range(12), 200, 0))
    for subject, of_subject in values.items():
        assert getattr(found, subject) == pytest.approx(of_subject.mean().item())
        assert found.per_frame[subject] == pytest.approx(of_subject.mean((0, 1)).tolist())
        low, high = found.interval[subject]
        assert low < getattr(found, subject) < high
        ends = found.per_frame_interval[subject]
        assert all(low < mean < high for mean, (low, high) in zip(found.per_frame[subject], ends, strict=True))
    best = found.best_of
    assert best.samples == 3
    of_clips = values["prediction"].mean(2)
    expected = of_clips.amax(1) if metric.higher_is_better else of_clips.amin(1)
    assert best.value == pytest.approx(expected.mean().item())
    assert np.mean(best.per_frame) == pytest.approx(best.value)
    assert best.interval[0] < best.value < best.interval[1]
    assert "best_of" not in found.interval
    assert MetricValues.model_validate_json(found.model_dump_json()) == found


def test_without_resamples_and_several_samples_there_are_means_only():
    found = summarize_metric(PSNR, {subject: numbers(2, 1, 3) for subject in SUBJECTS}, None)
    assert found.model_dump().keys() == {*SUBJECTS, "per_frame"}
