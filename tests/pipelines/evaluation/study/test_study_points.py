"""One sampler setting of a study: its metrics against their definitions."""

import numpy as np
import pytest
import torch

from pipelines.evaluation.measures.intervals import draw_counts
from pipelines.evaluation.measures.metrics import PSNR, SSIM, gradient_energy, lpips_metric
from pipelines.evaluation.study.study_points import StudyClips, point_key
from pipelines.prediction.clips import Clip
from pipelines.runtime.results import StudyPoint
from stage1_autoencoder.videos.source import Recording
from stage2_flow.config import SamplingConfig
from tests.pipelines.test_predictor import predictor


def clips(count: int) -> list[Clip]:
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(count, 5, 3, 16, 16, generator=generator) * 2 - 1
    frames[4:5] = 0.5
    return [Clip(f"clip {n}", n, Recording(str(n)), 10.0, frames[n]) for n in range(count)]


@pytest.fixture(scope="module")
def measured() -> StudyClips:
    metrics = [PSNR, SSIM, lpips_metric(lambda images, truth: (images - truth).abs().mean((1, 2, 3)))]
    return StudyClips(predictor(), clips(10), 2, draw_counts(range(10), 300, 0), metrics)


def test_a_point_has_the_metrics_of_its_predictions(measured):
    options = SamplingConfig(solver="heun", nfe=4, warm_start=0.25, restore_detail=True)
    found = measured.measure(options, None)
    latents = measured.predictor.generate_latents(measured.given, 3, sampling=options, keys=measured.keys)
    given = torch.stack([clip.frames for clip in clips(10)])[:, :2]
    frames = measured.predictor.decode_predictions(latents, given, sampling=options).double()
    truth = torch.stack([clip.frames for clip in clips(10)])[:, 2:].double()
    errors = (frames - truth).square().mean((2, 3, 4))
    assert found.psnr == pytest.approx((10 * torch.log10(4 / errors)).mean().item(), rel=1e-5)
    assert found.lpips == pytest.approx((frames - truth).abs().mean().item(), rel=1e-5)
    assert found.key == point_key(options)
    assert (found.solver, found.nfe, found.steps, found.warm_start) == ("heun", 4, 2, 0.25)
    assert found.psnr_interval[0] < found.psnr < found.psnr_interval[1]
    # Also of the clip that has no gradient.
    assert gradient_energy(truth)[4].sum() == 0
    sharpness = (gradient_energy(frames).sum() / gradient_energy(truth).sum()).item()
    assert found.sharpness == pytest.approx(sharpness, rel=1e-5) == np.mean(found.per_clip["sharpness"])
    assert found.sharpness_interval[0] < found.sharpness < found.sharpness_interval[1]
    assert found.frechet > 0
    assert found.milliseconds_per_frame > 0
    assert found.psnr_difference == found.frechet_difference == 0
    assert found.lpips_difference_interval == found.frechet_difference_interval == (0, 0)


def test_differences_to_the_reference_are_taken_clip_by_clip(measured):
    reference = measured.measure(SamplingConfig(solver="heun", nfe=4), None)
    other = measured.measure(SamplingConfig(nfe=2, seed=3), reference)
    pairs = zip(other.per_clip["psnr"], reference.per_clip["psnr"], strict=True)
    per_clip = [ours - theirs for ours, theirs in pairs]
    assert other.psnr_difference == pytest.approx(sum(per_clip) / 10, abs=1e-9)
    assert min(per_clip) - 1e-9 <= other.psnr_difference_interval[0] <= other.psnr_difference
    assert other.frechet_difference == pytest.approx(other.frechet - reference.frechet)
    low, high = other.frechet_difference_interval
    half = 1.959964 * np.subtract(other.frechet_resampled, reference.frechet_resampled).std(ddof=1)
    assert (high - low) / 2 == pytest.approx(half)


def test_few_recordings_have_differences_without_intervals(measured):
    few = StudyClips(measured.predictor, clips(3), 2, None, [PSNR])
    reference = few.measure(SamplingConfig(nfe=4), None)
    other = few.measure(SamplingConfig(nfe=2), reference)
    assert other.psnr_difference == pytest.approx(other.psnr - reference.psnr)
    assert other.frechet_difference == pytest.approx(other.frechet - reference.frechet)
    assert other.ssim is None
    ends = [value for name, value in other.model_dump().items() if name.endswith("interval")]
    assert set(ends) == {None}
    assert StudyPoint.model_validate_json(other.model_dump_json()) == other
