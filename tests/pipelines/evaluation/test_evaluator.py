"""Summaries of metrics over clips, samples and frames, and an evaluation that is stopped."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.config import parse_config
from pipelines.evaluation.clip_records import RecordFolder
from pipelines.evaluation.evaluator import measure_clips
from pipelines.evaluation.measures.intervals import draw_counts
from pipelines.evaluation.measures.measure import ClipBatch, Measure, Records
from pipelines.evaluation.measures.metrics import PSNR, Metric, summarize_metric
from pipelines.prediction.clips import Clip, open_clips
from pipelines.runtime.context import RunContext
from pipelines.runtime.results import SUBJECTS, MetricValues

LOWER = Metric("lpips", PSNR.function, higher_is_better=False)


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
    written = MetricValues.model_validate_json(found.model_dump_json())
    assert written == found.model_copy(update={"resampled": None})  # which is not written


@pytest.mark.parametrize(("metric", "sign"), [(PSNR, 1), (LOWER, -1)])
def test_the_gain_over_copying_is_that_of_pairs(metric, sign):
    """Clips of very different levels, nearly all a bit better: intervals of means overlap, the gain is clear."""
    level, gain = torch.linspace(10, 50, 12)[:, None, None], 1 + numbers(12, 2, 4) / 20
    gain[0] -= 3  # the first clip is worse
    copied = level.expand(12, 1, 4)
    values = {"prediction": copied + sign * gain, "copy_last": copied, "reconstruction": copied}
    found = summarize_metric(metric, values, draw_counts(range(12), 500, 0))
    assert found.gains["copy_last"].value == pytest.approx(gain.mean().item(), abs=1e-5)
    assert found.gains["copy_last"].per_frame == pytest.approx(gain.mean((0, 1)).tolist(), abs=1e-5)
    assert found.gains["copy_last"].better == pytest.approx(11 / 12)
    assert found.gains["copy_last"].is_clear
    assert found.interval["prediction"][0] < found.interval["copy_last"][1]


def test_without_resamples_and_several_samples_there_are_means_only():
    found = summarize_metric(PSNR, {subject: numbers(2, 1, 3) for subject in SUBJECTS}, None)
    assert found.model_dump().keys() == {*SUBJECTS, "per_frame", "gains"}


class Brightness(Measure):
    """The mean of all true frames; the first batch can be measured, then it is interrupted."""

    name = "brightness"

    def __init__(self, batches: int = 100) -> None:
        self.batches = batches

    def measure(self, batch: ClipBatch) -> Records:
        if not self.batches:
            raise KeyboardInterrupt
        self.batches -= 1
        mean = batch.truth.mean((1, 2, 3, 4))
        # A file gives its records back in any order, in which two would often be right by chance.
        return {"mean": mean} | {f"{number} brighter": mean + number for number in range(9)}

    def results(self, records: Records, counts: Tensor | None) -> dict[str, Any]:
        raise NotImplementedError


def test_an_evaluation_that_was_stopped_goes_on(tmp_path):
    """After a batch of which one file is damaged, and of other settings nothing is taken over."""
    config = parse_config(
        {
            "dataset": {
                "name": "toy",
                "source": "shapes",
                "image_size": 16,
                "splits": {"test": 7},
                "shapes": {"frames": 5},
            },
            "evaluation": {"context": 2, "horizon": 3, "videos": 7},
        },
        "a test",
    )
    clips = open_clips(config, RunContext(torch.device("cpu")), 7)
    predicted = []

    def forecast(batch: list[Clip]) -> ClipBatch:
        predicted.extend(clip.video for clip in batch)
        frames = torch.stack([clip.frames for clip in batch])
        return ClipBatch(batch, frames[:, :2], frames[:, 2:], None, {}, {})

    def measured(brightness: Brightness, **about: int) -> dict[str, Records]:
        return measure_clips(clips, forecast, [brightness], 2, 1, RecordFolder(tmp_path, about))

    whole = measured(Brightness())
    assert whole["clip"]["number"].tolist() == [*range(7)]
    RecordFolder(tmp_path, {}).remove()
    with pytest.raises(KeyboardInterrupt):
        measured(Brightness(batches=2))
    predicted.clear()
    (_, second) = sorted(tmp_path.glob("*/*.safetensors"))
    second.write_bytes(second.read_bytes()[:-1] + b"x")
    again = measured(Brightness())
    assert predicted == [2, 3, 4, 5, 6]
    assert torch.equal(again["brightness"]["mean"], whole["brightness"]["mean"])
    assert [*again["brightness"]] == [*whole["brightness"]]
    predicted.clear()
    measured(Brightness(), seed=1)
    assert predicted == [*range(7)]
    assert len([*tmp_path.iterdir()]) == 1  # of the last one; what others left is removed
