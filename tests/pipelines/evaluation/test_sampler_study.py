"""The study of quality against evaluations: which settings are measured, which is chosen, and how it is shown."""

import pytest
from PIL import Image

from pipelines.evaluation.sampler_study import cheapest, format_study, plot_study, sampler_settings
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
    usual = {"solver": "euler", "warm_start": 0.0, "condition": "per-evaluation", "seed": 0, "preset": "default"}
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


@pytest.mark.parametrize(
    ("change", "chosen"),
    [
        ({}, 2),
        ({"psnr_difference": -0.11}, 1),
        ({"psnr_difference": -0.09}, 2),
        ({"frechet_difference_interval": (0.01, 0.2)}, 1),
        ({"frechet_difference_interval": (-0.9, -0.5)}, 2),  # better than the reference
        ({"lpips": 0.1, "lpips_difference_interval": (0.01, 0.1)}, 1),
        ({"lpips": 0.1, "lpips_difference_interval": (-0.1, 0.1)}, 2),
    ],
)
def test_the_cheapest_loses_nothing(change, chosen):
    points = [point(396), point(16, psnr_difference=0.3), point(4, **change), point(1, psnr_difference=-3.0)]
    assert cheapest(points) == chosen


def without_intervals(found: StudyPoint) -> StudyPoint:
    """As it is measured on few recordings."""
    return found.model_copy(update=dict.fromkeys(name for name in StudyPoint.model_fields if name.endswith("interval")))


def test_without_intervals_none_is_chosen():
    assert cheapest([without_intervals(point(nfe)) for nfe in (396, 16, 4)]) is None


def study(points: list[StudyPoint], **missing: str) -> Study:
    protocol = StudyProtocol(
        dataset="toy", split="val", window="first", clips=["a"], context=2, horizon=3, image_size=16, flow_step=1,
        flow_sha256="f", autoencoder_sha256="a", past_horizon=None, precision="fp32", device="cpu", frechet="",
        sharpness="", recordings=12, persons=None, ssim="", interval=None, missing={"lpips": "no weights"} | missing,
    )  # fmt: skip
    return Study(protocol=protocol, points=points, reference=0, cheapest=None if missing else 1)


def test_the_line_of_a_solver_has_its_plain_points_in_order():
    points = [point(396, solver="rk4-38"), point(8, solver="rk4-38", seed=1)]
    points += [point(nfe) for nfe in (4, 2)]
    points += [point(2, warm_start=0.5), point(2, condition="per-frame"), point(2, seed=2), point(4, solver="rk4-38")]
    assert [found.nfe for found in study(points).solver_line("rk4-38")] == [4, 396]
    assert [found.nfe for found in study(points).solver_line("euler")] == [2, 4]


def test_table_and_plot(tmp_path):
    points = [
        point(8, solver="rk4-38", preset="official"), point(2),
        point(1, warm_start=0.3, condition="per-frame", seed=3, psnr_difference=-2.5),
    ]  # fmt: skip
    table = format_study(study(points))
    for part in ("rk4-38, official grid", "euler, warm start 0.3, one condition per frame, seed 3", "-2.50",
                 "measurable: 2 (euler), 4 times fewer than 8"):  # fmt: skip
        assert part in table
    assert "LPIPS not worse" not in table
    few = study(
        [without_intervals(found).model_copy(update={"ssim": None}) for found in points], interval="of 3 videos"
    )
    assert "of 3 videos" in format_study(few)
    plot_study(few, tmp_path / "few.png")
    plot_study(study(points), tmp_path / "quality.png")
    with Image.open(tmp_path / "quality.png") as picture:
        assert picture.width > 800
