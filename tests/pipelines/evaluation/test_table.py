"""The table of an evaluation: what it tells, what it leaves out, and its width."""

import pytest
import torch

from pipelines.evaluation.measures.intervals import draw_counts
from pipelines.evaluation.measures.metrics import PSNR, summarize_metric
from pipelines.evaluation.table import format_table
from pipelines.runtime.results import (
    SUBJECTS,
    Calibration,
    Distances,
    Evaluation,
    EvaluationProtocol,
    Gain,
    Memorization,
    MetricValues,
    RunPredictor,
)

RUN = RunPredictor(
    sampling={}, seed=7, precision="fp32", nfe=396, description="rk4-38, 396 evaluations per frame, warm start 0",
    flow_step=300000, flow_sha256="f" * 64, flow_origin={}, refine=True, refiner_step=5, refiner_sha256="b" * 64,
    autoencoder_sha256="a" * 64, store_fingerprint="e" * 64,
)  # fmt: skip
PROTOCOL = EvaluationProtocol(
    predictor=RUN,
    protocol="kth_10_30, with videos=64", dataset="kth", split="test", clips=64, videos=60, recordings=40, persons=5,
    window="random", window_seed=3, ssim="Gaussian windows", context=10, horizon=30, samples=2,
    aggregation="mean over clips, samples and predicted frames", best_of="per clip the best",
    interval="95 %", pixels="floats", image_size=64, frame_step=5,
    resize={"filter": "area", "upscale_filter": "bicubic", "crop": "centred square of the short side, offset "
            "(long - short) // 2", "size": 64},
    autoencoder_sha256="a" * 64, vgg_sha256="c" * 64, device="cpu", torch="2",
    fvd={"network_sha256": "d" * 64, "clips_of_frames": "1 segment of 40 frames", "resize": "by the network: 224x224",
         "statistics": "float64", "interval": "-+", "samples": "one set per sample number"}, missing={},
)  # fmt: skip


def values(samples: int, counts: torch.Tensor | None) -> MetricValues:
    generator = torch.Generator().manual_seed(0)
    subjects = {**dict.fromkeys(SUBJECTS, 1), "prediction": samples}
    numbers = {name: 20 * torch.rand(12, count, 30, generator=generator) for name, count in subjects.items()}
    return summarize_metric(PSNR, numbers, counts)


@pytest.fixture
def everything() -> Evaluation:
    interval = {"prediction": (1234.5, 12345.6), "copy_last": (1.0, 2.0), "reconstruction": (0.0, 1.0)}
    fvd = MetricValues(
        prediction=2345.6, copy_last=1.5, constant_motion=7777.7, reconstruction=0.5, interval=interval,
        autoencoded=Distances(prediction=99.9, copy_last=1.0, interval=interval),
    )  # fmt: skip
    metrics = {"psnr": values(2, draw_counts(range(12), 50, 0)), "ssim": values(2, None), "fvd": fvd}
    return Evaluation(protocol=PROTOCOL, metrics=metrics)


def test_the_table_tells_everything_that_is_needed_to_measure_again(everything):
    text = format_table(everything)
    assert max(len(line) for line in text.splitlines()) <= 120
    for part in ("64 clips of 40 recordings of 5 persons", "10 frames given, 30 predicted",
                 "kth_10_30, with videos=64", "seed 3", "one frame in 5",
                 "396 evaluations", "seed 7", "filter area", "fp32", "a" * 12, "f" * 12, "b" * 12,
                 "c" * 12, "d" * 12, "best of 2", "+10", "+30", "2345.6", "[1234.5, 12345.6]"):  # fmt: skip
        assert part in text, part
    assert "not measured" not in text
    assert "LPIPS" not in text


def test_the_table_says_what_is_missing_and_leaves_no_trace_of_it():
    nothing = {"protocol", "persons", "ssim", "best_of", "interval", "fvd", "vgg_sha256"}
    changes = {"samples": 1, "frame_step": 1, "missing": {"lpips": "no weights", "fvd": "no network"}}
    changes["predictor"] = RUN.model_copy(update={"refiner_sha256": None})
    protocol = PROTOCOL.model_copy(update=dict.fromkeys(nothing) | changes)
    text = format_table(Evaluation(protocol=protocol, metrics={"psnr": values(1, None)}))
    assert [line.strip() for line in text.splitlines()[-2:]] == [
        "lpips was not measured: no weights",
        "fvd was not measured: no network",
    ]
    for part in ("best of", "FVD", "VGG16", "refiner", "LPIPS", "SSIM", "person"):
        assert part not in text


def test_the_prediction_is_compared_with_copying_the_last_frame(everything):
    curve = [5.0] * 20 + [-1.0] * 10
    for gain, parts in (
        (Gain(value=2.5, better=0.75, per_frame=curve, interval=(1.25, 3.5)),
         ["2.50 dB better (95 %: 1.25 to 3.50)", "48 of 64 clips", "after frame +20",
          "jump (-1.2 dB), walk (+3.0 dB)"]),
        (Gain(value=-2.5, better=0.25, per_frame=[-2.5] * 30), ["2.50 dB WORSE", "16 of 64 clips", "at no frame"]),
    ):  # fmt: skip
        psnr = everything.metrics["psnr"].model_copy(update={"gains": {"copy_last": gain}})
        changes = {"metrics": {"psnr": psnr}, "clips": {"walk": 3.0, "jump": -1.2}}
        text = " ".join(format_table(everything.model_copy(update=changes)).split())
        for part in parts:
            assert part in text, part


def test_more_baselines_have_rows_for_image_metrics_only_and_memorization_one_sentence(everything):
    found = Memorization(prediction=0.41, truth=0.42, error=0.37, nearer=0.5, smallest={"prediction": 0.01},
                         training_clips=10, store_fingerprint="f" * 64)  # fmt: skip
    text = format_table(everything.model_copy(update={"memorization": found}))
    for subject in ("constant_motion", "nearest_clip"):
        assert sum(line.strip().startswith(f"{SUBJECTS[subject]}  ") for line in text.splitlines()) == 2  # PSNR, SSIM
    assert all(number in text for number in ("0.41", "0.42", "0.37", "0.01"))
    assert "7777.7" not in text  # FVD
    assert max(map(len, text.splitlines())) <= 120


def test_objects_in_one_line(everything):
    curve = [1 - 0.01 * frame for frame in range(30)]
    objects = {
        name: MetricValues(prediction=0.5, per_frame={"prediction": [scale * value for value in curve]})
        for name, scale in (("whole", 1.0), ("position", 10.0))
    }
    text = format_table(everything.model_copy(update={"objects": objects}))
    line = next(line for line in text.splitlines() if "objects" in line)
    for part in ("100 %, 96 %, 91 %, 71 %", "+1, +5, +10, +30", "10.0, 9.6, 9.1, 7.1"):
        assert part in line
    assert max(map(len, text.splitlines())) <= 120
    shares = {"bounces": 0.98, "collisions": float("nan"), "elastic": 0.77, "on_time": 0.4}
    objects |= {name: MetricValues(prediction=share) for name, share in shares.items()}
    text = format_table(everything.model_copy(update={"objects": objects}))
    assert all(part in text for part in ("98 %", "77 %", "40 %"))
    assert "nan" not in text


def test_scores_and_calibration_in_two_lines(everything):
    before = format_table(everything).splitlines()
    scores = {
        name: MetricValues(prediction=value, copy_last=2 * value)
        for name, value in {"crps": 23.456, "energy_score": 101.25, "latent_energy_score": 0.4567}.items()
    }
    found = Calibration(
        samples=9, ranks=[0.25, *[0.05] * 8, 0.35],
        spread_skill=MetricValues(prediction=0.625, interval={"prediction": (0.51, 0.74)}),
    )  # fmt: skip
    update = {"metrics": everything.metrics | scores, "calibration": found}
    after = format_table(everything.model_copy(update=update)).splitlines()
    assert len(after) - len(before) == 2
    text = " ".join(line.strip() for line in after if line not in before)
    for part in (
        "23.46 (copying 46.91)",
        "101.25 (202.50)",
        "0.457 (0.913)",
        "9 samples",
        "0.62 [0.51, 0.74]",
        "60 %",
        "20 %",
    ):
        assert part in text
    assert max(map(len, after)) <= 120


def test_silhouettes_in_one_sentence(everything):
    silhouettes = {
        name: MetricValues(prediction=share, reconstruction=limit)
        for name, share, limit in (("kept", 0.78, 0.99), ("speed", 0.87, 1.09), ("identity", 0.59, None))
    }
    text = format_table(everything.model_copy(update={"silhouettes": silhouettes}))
    assert all(part in text for part in ("78 % (99)", "87 % (109)", "59 %"))
    assert max(map(len, text.splitlines())) <= 120
    del silhouettes["identity"]
    assert "59 %" not in format_table(everything.model_copy(update={"silhouettes": silhouettes}))
