"""The study of quality against evaluations: what is measured, what is chosen, and what is told of it."""

import json
import math

import pytest
import torch
from PIL import Image

from pipelines.evaluation import sampler_study as module
from pipelines.evaluation.sampler_study import cheapest, describe_way, format_study, ways_to_sample
from pipelines.evaluation.study_plot import plot_study, solver_line
from pipelines.evaluation.study_points import StudyClips, latent_features, mean_gradient
from pipelines.prediction.clips import Clip
from stage2_flow.config import SamplingConfig
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.solvers import SOLVERS
from tests.pipelines.test_predictor import predictor

OPTIONS = SamplingConfig(seed=4, past_horizon=6, precision="bf16")


def clips(count: int) -> list[Clip]:
    generator = torch.Generator().manual_seed(0)
    return [Clip(f"clip {n}", n, torch.rand(5, 3, 16, 16, generator=generator) * 2 - 1) for n in range(count)]


@pytest.fixture(scope="module")
def measured() -> StudyClips:
    return StudyClips(predictor(), clips(4), 2, 0, None)


def point(nfe: int, **values) -> dict:
    usual = {"psnr_difference": 0.0, "frechet": 1.0, "frechet_difference_interval": [-0.1, 0.1], "lpips": None}
    return {"nfe": nfe, **usual, **values}


def test_every_solver_is_tried_at_every_number_of_evaluations():
    plans = [SamplingPlan.from_config(way) for way in ways_to_sample(OPTIONS)]
    assert (plans[0].solver.name, plans[0].evaluations) == ("rk4-38", 396)
    for solver in SOLVERS.values():
        tried = {plan.evaluations for plan in plans if plan.solver == solver}
        assert tried >= {nfe for nfe in (1, 2, 4, 8, 16, 32, 64, 128) if nfe % solver.evaluations_per_step == 0}
    ways = ways_to_sample(OPTIONS)
    assert {way.warm_start for way in ways} == {0.0, 0.1, 0.3, 0.5}
    assert {way.condition for way in ways} == {"per-evaluation", "per-frame"}
    assert {(way.past_horizon, way.precision) for way in ways} == {(6, "bf16")}
    assert {way.seed for way in ways} == {4, 5, 6}
    keys = [module._key(way) for way in ways]
    assert len(set(keys)) == len(keys)


def test_what_takes_longer_can_be_left_out():
    ways = ways_to_sample(OPTIONS, 18)
    evaluations = [SamplingPlan.from_config(way).evaluations for way in ways]
    assert (evaluations[0], ways[0].solver, max(evaluations)) == (16, "rk4-38", 16)
    assert len({module._key(way) for way in ways}) == len(ways) > 20


def test_a_point_has_the_metrics_of_its_predictions(measured):
    options = SamplingConfig(solver="heun", nfe=4, warm_start=0.25)
    found = measured.point("k", options, None)
    latents = measured.predictor.generate_latents(measured.given, 3, sampling=options, keys=measured.keys)
    frames = measured.predictor.decode_videos(latents)[:, 2:].double()
    truth = torch.stack([clip.frames for clip in clips(4)])[:, 2:].double()
    errors = (frames - truth).square().mean((2, 3, 4))
    assert found["psnr"] == pytest.approx((10 * torch.log10(4 / errors)).mean().item(), rel=1e-5)
    assert (found["solver"], found["nfe"], found["steps"], found["warm_start"]) == ("heun", 4, 2, 0.25)
    assert found["psnr_difference"] == 0
    assert found["psnr_interval"][0] < found["psnr"] < found["psnr_interval"][1]
    reconstructed = measured.predictor.decode_videos(measured.predictor.encode_videos(truth.float()))
    assert found["sharpness"] == pytest.approx((mean_gradient(frames) / mean_gradient(reconstructed)).mean().item())
    assert found["frechet"] > 0
    assert found["lpips"] is None
    assert found["milliseconds_per_frame"] > 0
    other = measured.point("l", SamplingConfig(nfe=2, seed=3), found)
    per_clip = [
        ours - theirs for ours, theirs in zip(other["per_clip"]["psnr"], found["per_clip"]["psnr"], strict=True)
    ]
    assert found["frechet_difference_interval"] == [0, 0]
    assert other["frechet_difference"] == pytest.approx(other["frechet"] - found["frechet"])
    low, high = other["frechet_difference_interval"]
    assert low < other["frechet_difference"] < high
    assert other["psnr_difference"] == pytest.approx(sum(per_clip) / 4, abs=1e-9)
    assert min(per_clip) - 1e-9 <= other["psnr_difference_interval"][0] <= other["psnr_difference"]


def test_features_are_means_of_places_and_of_changes():
    latents = torch.zeros(1, 4, 1, 4, 4)
    latents[0, 2, 0, :2, 2:] = 3.0  # the upper right of the first predicted frame
    features = latent_features(latents, 2)
    assert features.shape == (1, 2, 8)
    assert features[0, 0].tolist() == [0, 3, 0, 0, 0, 3, 0, 0]
    assert features[0, 1].tolist() == [0, 0, 0, 0, 0, 3, 0, 0]


def test_blur_lowers_the_gradient_and_leaves_the_mean():
    video = torch.rand(1, 2, 3, 16, 16)
    blurred = torch.nn.functional.avg_pool2d(video[0], 3, 1, 1, count_include_pad=False)[None]
    assert mean_gradient(blurred) < 0.5 * mean_gradient(video)
    step = torch.zeros(1, 1, 3, 2, 2)
    step[..., 1] = 1.0
    assert mean_gradient(step).item() == 1.0


@pytest.mark.parametrize(
    ("change", "chosen"),
    [
        ({}, 2),
        ({"psnr_difference": -0.11}, 1),
        ({"psnr_difference": -0.09}, 2),
        ({"frechet_difference_interval": [0.01, 0.2]}, 1),
        ({"frechet_difference_interval": [-0.9, -0.5]}, 2),  # better than the reference
    ],
)
def test_the_cheapest_loses_nothing(change, chosen):
    points = [point(396), point(16, psnr_difference=0.3), point(4, **change), point(1, psnr_difference=-3.0)]
    assert cheapest(points) == chosen


def test_lpips_counts_where_it_is_measured():
    same, worse = ({"lpips": 0.10, "lpips_difference_interval": ends} for ends in ([-0.1, 0.1], [0.01, 0.1]))
    assert cheapest([point(396, **same), point(8, **same), point(4, **worse)]) == 1


def test_a_solvers_line_has_its_plain_points_in_order():
    usual = {"warm_start": 0, "condition": "per-evaluation", "seed": 0}
    points = [point(396, solver="rk4-38", **usual), point(8, solver="rk4-38", **usual | {"seed": 1})]
    points += [point(nfe, solver="euler", **usual) for nfe in (4, 2)]
    points += [point(2, solver="euler", **usual | {name: 2}) for name in usual]
    points += [point(4, solver="rk4-38", **usual)]
    assert [found["nfe"] for found in solver_line(points, "rk4-38")] == [4, 396]
    assert [found["nfe"] for found in solver_line(points, "euler")] == [2, 4]


def test_table_and_plot(measured, tmp_path):
    ways = [SamplingConfig(preset="official", steps=3), SamplingConfig(solver="euler", nfe=2),
            SamplingConfig(solver="euler", nfe=1, warm_start=0.3, condition="per-frame")]  # fmt: skip
    points: list[dict] = []
    for way in ways:
        points.append(measured.point(module._key(way), way, points[0] if points else None))
    protocol = {"lpips": False, "dataset": "toy", "split": "test", "clips": ["a"], "context": 2, "horizon": 3}
    result = {"protocol": protocol, "points": points, "reference": 0, "cheapest": 1}
    table = format_study(result)
    assert "rk4-38, official grid" in table
    assert "euler, warm start 0.3, one condition a frame" in table
    assert "4 times fewer than 8" in table
    assert describe_way(points[1]) == "euler"
    plot_study(result, tmp_path / "quality.png")
    with Image.open(tmp_path / "quality.png") as picture:
        assert picture.width > 800
    assert all(math.isfinite(value) for value in json.loads(json.dumps(points[2]))["psnr_interval"])
