"""The study of quality against evaluations: which settings are measured, which is chosen, and how it is shown."""

import math

import pytest
from PIL import Image

from pipelines.evaluation.study.sampler_choice import choose, score_points
from pipelines.evaluation.study.sampler_study import few_settings, sampler_settings
from pipelines.evaluation.study.study_table import format_study, plot_study
from pipelines.runtime.results import Study, StudyPoint, StudyProtocol
from stage2_flow.config import SamplingConfig
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.solvers import SOLVERS

OPTIONS = SamplingConfig(seed=4, past_horizon=6, precision="bf16")


def point(nfe: int, **values) -> StudyPoint:
    measured = {}
    for name, value in {"psnr": 20.0, "ssim": 0.8, "sharpness": 0.9, "frechet": 1.0}.items():
        measured |= {name: value, f"{name}_interval": (value - 0.1, value + 0.1)}
        measured |= {f"{name}_difference": 0.0, f"{name}_difference_interval": (-0.1, 0.1)}
    usual = {
        "solver": "euler",
        "warm_start": 0.0,
        "condition": "per-evaluation",
        "seed": 0,
        "preset": "default",
        "whole": None,
    }
    rest = {"key": str(nfe), "steps": nfe, "frechet_resampled": [1.0], "per_clip": {}, "milliseconds_per_frame": 1.0}
    return StudyPoint(nfe=nfe, **usual | rest | measured | values)


def test_every_solver_is_tried_at_every_number_of_evaluations():
    settings = sampler_settings(OPTIONS)
    plans = [SamplingPlan.from_config(options) for options in settings]
    assert (plans[0].solver.name, plans[0].evaluations) == ("rk4-38", 396)
    for solver in SOLVERS.values():
        tried = {plan.evaluations for plan in plans if plan.solver == solver}
        assert tried >= {nfe for nfe in (1, 2, 4, 8, 16, 32, 64, 128) if nfe % solver.evaluations_per_step == 0}
    assert {options.warm_start for options in settings} == {0.0, 0.1, 0.3, 0.5}
    assert {options.condition for options in settings} == {"per-evaluation", "per-frame"}
    assert {(options.past_horizon, options.precision) for options in settings} == {(6, "bf16")}
    assert {options.seed for options in settings} == {4, 5, 6}
    assert all(options not in settings[:number] for number, options in enumerate(settings))


def test_settings_with_more_evaluations_can_be_left_out():
    settings = sampler_settings(OPTIONS, 18)
    evaluations = [SamplingPlan.from_config(options).evaluations for options in settings]
    assert (evaluations[0], settings[0].solver, max(evaluations)) == (16, "rk4-38", 16)
    assert all(options not in settings[:number] for number, options in enumerate(settings))
    assert len(settings) > 20


NAMES = ("solver", "nfe", "psnr", "frechet", "whole", "sharpness")
CHOICES = {
    # kth_small after 2500 steps: the others are sharper in PSNR because they predict nearer to the mean.
    "people": ([("midpoint", 8, 25.52, 0.088, None, 1.0), ("euler", 8, 25.97, 0.133, None, 1.0),
                ("euler", 4, 26.13, 0.192, None, 1.0), ("euler", 2, 26.00, 0.258, None, 1.0)], 0),
    # The demo: many evaluations keep fewer objects whole.
    "shapes": ([("midpoint", 8, 20.95, 0.0191, 0.52, 1.0), ("euler", 4, 21.50, 0.0198, 0.78, 1.0),
                ("euler", 2, 21.73, 0.0325, 0.69, 1.0), ("euler", 1, 19.44, 1.06, 0.06, 1.0)], 1),
    "fewest of equals": ([("midpoint", 8, 20.09, 0.1, None, 1.0), ("euler", 4, 20.0, 0.1, None, 1.0)], 1),
    "beyond the margin": ([("midpoint", 8, 20.11, 0.1, None, 1.0), ("euler", 4, 20.0, 0.1, None, 1.0)], 0),
    "best of as few": ([("euler", 4, 20.0, 0.1, None, 1.0), ("midpoint", 4, 20.05, 0.1, None, 1.0)], 1),
    "blurred": ([("midpoint", 8, 20.0, 0.1, None, 0.9), ("euler", 4, 20.3, 0.1, None, 0.8)], 0),
    "too sharp": ([("midpoint", 8, 20.0, 0.1, None, 1.25), ("euler", 4, 20.0, 0.1, None, 0.8)], 1),
    "wholeness instead of sharpness": ([("midpoint", 8, 20.0, 0.1, 0.5, 1.0), ("euler", 4, 20.0, 0.1, 0.6, 0.5)], 1),
    "nothing varies": ([("midpoint", 8, 20.0, 0.0, None, 0.0), ("euler", 4, 20.0, 0.0, None, 0.0)], 1),
    "not a number": ([("midpoint", 8, 20.0, 0.1, None, 1.0), ("euler", 4, 20.0, 0.1, None, math.nan)], 0),
    "none": ([("midpoint", 8, math.nan, 0.1, None, 1.0)], None),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "chosen"), CHOICES.values(), ids=CHOICES)
def test_a_sampler_is_chosen_by_all_measures(rows, chosen):
    points = score_points([point(**dict(zip(NAMES, row, strict=True))) for row in rows])
    assert choose(points) == chosen
    # A distance that only other seeds have moves all scores alike.
    scatter = point(1, seed=7, psnr=50.0, frechet=1e-3, whole=None if rows[0][4] is None else 1.0)
    assert choose(score_points([*points, scatter])) == chosen


def test_a_score_is_in_decibels():
    halved, first, whole = score_points(
        [point(4, psnr=20.0, frechet=0.1, sharpness=0.5), point(4, psnr=20.0, frechet=0.2, sharpness=2.0),
         point(4, psnr=20.0, frechet=0.1, sharpness=0.5, whole=0.5)]
    )  # fmt: skip
    assert [halved.score, first.score, whole.score] == pytest.approx([15, 14, 25])


def without_intervals(found: StudyPoint) -> StudyPoint:
    """As it is measured on few recordings."""
    return found.model_copy(update=dict.fromkeys(name for name in StudyPoint.model_fields if name.endswith("interval")))


def test_after_a_training_few_settings_are_compared_with_the_default():
    settings = few_settings(OPTIONS)
    plans = [SamplingPlan.from_config(options) for options in settings]
    assert plans[0] == SamplingPlan.from_config(SamplingConfig())
    assert {(plan.solver.name, plan.evaluations) for plan in plans} == {
        *(("euler", nfe) for nfe in (2, 4, 8, 16)), *(("midpoint", nfe) for nfe in (4, 8, 16))
    }  # fmt: skip
    assert {(options.past_horizon, options.precision, options.seed) for options in settings} == {(6, "bf16", 4)}


def study(points: list[StudyPoint], **missing: str) -> Study:
    protocol = StudyProtocol(
        dataset="toy", split="val", window="first", clips=["a"], context=2, horizon=3, image_size=16, flow_step=1,
        flow_sha256="f", autoencoder_sha256="a", past_horizon=None, precision="fp32", device="cpu", frechet="",
        sharpness="", recordings=12, persons=None, ssim="", interval=None, missing={"lpips": "no weights"} | missing,
    )  # fmt: skip
    return Study(protocol=protocol, points=points, reference=0, chosen=None if missing else 1)


def test_the_line_of_a_solver_has_its_plain_points_in_order():
    points = [point(396, solver="rk4-38"), point(8, solver="rk4-38", seed=1)]
    points += [point(nfe) for nfe in (4, 2)]
    points += [point(2, warm_start=0.5), point(2, condition="per-frame"), point(2, seed=2), point(4, solver="rk4-38")]
    assert [found.nfe for found in study(points).solver_line("rk4-38")] == [4, 396]
    assert [found.nfe for found in study(points).solver_line("euler")] == [2, 4]


def test_table_and_plot(tmp_path):
    points = [
        point(8, solver="rk4-38", preset="official", whole=0.5, score=20.0), point(2, whole=0.725, score=20.5),
        point(1, warm_start=0.3, condition="per-frame", seed=3, psnr_difference=-2.5, whole=0.1, score=3.0),
    ]  # fmt: skip
    table = format_study(study(points))
    for part in ("rk4-38, official grid", "euler, warm start 0.3, one condition per frame, seed 3", "-2.50",
                 "euler, 2 evaluations per frame", "0.725"):  # fmt: skip
        assert part in table
    few = study(
        [without_intervals(found).model_copy(update={"ssim": None}) for found in points], interval="of 3 videos"
    )
    assert format_study(few)
    plot_study(few, tmp_path / "few.png")
    plot_study(study(points), tmp_path / "quality.png")
    with Image.open(tmp_path / "quality.png") as picture:
        assert picture.width > 800
