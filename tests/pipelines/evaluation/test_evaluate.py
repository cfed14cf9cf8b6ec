"""What `evaluate` makes of numbers and features: presets, summaries, distances of sets, protocol, table."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.config import PROTOCOLS, EvaluationConfig, RiverConfig, load_config, parse_config
from pipelines.errors import UserError
from pipelines.evaluation.fvd import ShownFrames, VideoDistances
from pipelines.evaluation.metrics import PSNR, Metric, draw_counts, fit_gaussian, frechet_distance
from pipelines.evaluation.protocol import describe_preset
from pipelines.evaluation.table import format_table, summarise

LOWER = Metric("lpips", PSNR.function, higher_is_better=False)


def config(dataset: dict | None = None, **evaluation) -> RiverConfig:
    data = {"name": "toy", "source": "kth", "image_size": 64, "splits": {"test": "21-25"}} | (dataset or {})
    return parse_config({"dataset": data, "evaluation": evaluation}, "test")


def test_a_preset_sets_what_is_not_set():
    evaluation = EvaluationConfig(protocol="kth_10_40", videos=64)
    assert (evaluation.context, evaluation.horizon, evaluation.window, evaluation.videos) == (10, 40, "random", 64)
    assert evaluation.fvd_frames is None
    assert EvaluationConfig().fvd_frames == 16
    for name, preset in PROTOCOLS.items():
        evaluation = EvaluationConfig(protocol=name)
        assert (evaluation.context, evaluation.horizon) == tuple(int(n) for n in name.split("_")[1:])
        # Every preset is a whole protocol, and its values last through a run's config.yaml.
        assert preset.keys() >= {"split", "videos", "samples", "window", "fvd_context", "fvd_frames"}
        assert EvaluationConfig.model_validate(evaluation.model_dump()) == evaluation


def test_the_result_says_where_it_differs_from_the_preset():
    assert describe_preset(config()) is None
    assert describe_preset(config(protocol="kth_10_30")) == "kth_10_30"
    assert describe_preset(config(protocol="kth_10_30", videos=1000)) == "kth_10_30"  # set, and no other
    assert describe_preset(config(protocol="kth_10_30", videos=64, horizon=20)) == (
        "kth_10_30, with horizon=20, videos=64"
    )
    other = {"image_size": 128, "splits": {"test": "17-25"}}
    assert describe_preset(config(other, protocol="kth_10_30")) == (
        "kth_10_30, with dataset.image_size=128, dataset.splits.test=17-25"
    )


@pytest.mark.parametrize(
    ("name", "preset"),
    [("kth", "kth_10_30"), ("bair_64", "bair_1_15"), ("bair_256", "bair_1_15"), ("clevrer", "clevrer_2_14")],
)
def test_the_papers_configurations_measure_by_the_literatures_protocols(repository, name, preset):
    assert describe_preset(load_config(repository / "configs" / f"{name}.yaml")) == preset


def test_the_configurations_of_smaller_things_claim_no_protocol(repository):
    for name in ("kth_small", "shapes", "videos"):
        assert load_config(repository / "configs" / f"{name}.yaml").evaluation.protocol is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("protocol", "kth_10_20", "'kth_10_30', 'kth_10_40'"),
        ("samples", 0, "greater than 0"),
        ("fvd_frames", 9, "greater than or equal to 10"),
        ("resamples", -1, "greater than or equal to 0"),
    ],
)
def test_impossible_settings_are_refused_by_name(key, value, message):
    with pytest.raises(UserError, match=rf"evaluation\.{key}: .*is not allowed.*{message}"):
        config(**{key: value})


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 20


@pytest.mark.parametrize("metric", [PSNR, LOWER])
def test_a_summary_has_means_curves_intervals_and_the_best(metric):
    values = {"prediction": numbers(12, 3, 4), "copy_last": numbers(12, 1, 4, seed=1),
              "reconstruction": numbers(12, 1, 4, seed=2)}  # fmt: skip
    counts = draw_counts(range(12), 200, 0)
    found = summarise(metric, values, counts)
    for subject, of_subject in values.items():
        assert found[subject] == pytest.approx(of_subject.mean().item())
        assert found["per_frame"][subject] == pytest.approx(of_subject.mean((0, 1)).tolist())
        low, high = found["interval"][subject]
        assert low < found[subject] < high
        assert len(found["per_frame_interval"][subject]) == 4
        for mean, (low, high) in zip(found["per_frame"][subject], found["per_frame_interval"][subject], strict=True):
            assert low < mean < high
    best = found["best_of"]
    assert best["samples"] == 3
    of_clips = values["prediction"].mean(2)
    expected = of_clips.amax(1) if metric.higher_is_better else of_clips.amin(1)
    assert best["value"] == pytest.approx(expected.mean().item())
    assert np.mean(best["per_frame"]) == pytest.approx(best["value"])
    assert best["interval"][0] < best["value"] < best["interval"][1]
    json.dumps(found)


def test_without_resamples_and_several_samples_a_summary_is_means_alone():
    values = {subject: numbers(2, 1, 3) for subject in ("prediction", "copy_last", "reconstruction")}
    assert summarise(PSNR, values, None).keys() == {"prediction", "copy_last", "reconstruction", "per_frame"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"context": 1, "horizon": 15}, (1, 16, 1)),
        ({"context": 10, "horizon": 30}, (10, 16, 2)),
        ({"context": 10, "horizon": 30, "fvd_frames": None}, (10, 40, 1)),
        ({"context": 10, "horizon": 30, "fvd_context": False, "fvd_frames": 10}, (0, 10, 3)),
        ({"context": 2, "horizon": 10}, (2, 12, 1)),
    ],
)
def test_which_frames_the_network_sees(settings, expected):
    shown = ShownFrames.choose(EvaluationConfig(**settings))
    assert (shown.context, shown.frames, shown.looks) == expected
    given = torch.arange(settings["context"]).float().view(1, -1, 1, 1, 1).expand(2, -1, 3, 2, 2)
    following = 100 + torch.arange(settings["horizon"]).float().view(1, -1, 1, 1, 1).expand(2, -1, 3, 2, 2)
    cut = shown.cut(given, following)
    assert cut.shape == (2, expected[2], expected[1], 3, 2, 2)
    numbers_shown = cut[0, :, :, 0, 0, 0].flatten().tolist()
    whole = [*range(settings["context"] - expected[0], settings["context"])] if expected[0] else []
    whole += [100 + i for i in range(settings["horizon"])]
    assert numbers_shown == whole[len(whole) - len(numbers_shown) :]  # the clip's end, in order


def test_clips_that_are_too_short_for_the_i3d_have_a_reason():
    assert "needs 10 frames or more, and the clips have 8" in ShownFrames.choose(EvaluationConfig(context=2, horizon=6))
    without = ShownFrames.choose(EvaluationConfig(context=5, horizon=6, fvd_context=False))
    assert "fvd_context: false" in without


class Means:
    """A video network whose features are the means of the frames, and of their squares, of one channel."""

    def features(self, videos: Tensor) -> Tensor:
        assert videos.abs().max() <= 1
        return torch.cat([videos[:, :, 0].mean((2, 3)), videos[:, :, 1].square().mean((2, 3))], 1)


def clips(seed: int, n: int = 40, frames: int = 12, noise: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, frames, 3, 2, 2, generator=generator) * noise).clamp(-1, 1)


def collect(shown: ShownFrames, subjects: dict[str, Tensor], context: int = 2) -> VideoDistances:
    distances = VideoDistances(Means(), shown)
    for name, videos in subjects.items():
        for part in videos.split(16):
            distances.add(name, part[:, :context], part[:, context:])
    return distances


def expected_distance(first: Tensor, second: Tensor) -> float:
    return frechet_distance(*(fit_gaussian(Means().features(x)) for x in (first, second)))


SUBJECTS = {"real": clips(0), "autoencoded": clips(0) * 0.9, "copy_last": clips(1, noise=0.2),
            "copy_last_autoencoded": clips(1, noise=0.1), "prediction 0": clips(2), "prediction 1": clips(3),
            "prediction_autoencoded 0": clips(4), "prediction_autoencoded 1": clips(5)}  # fmt: skip


def test_distances_of_all_subjects_from_both_sets():
    distances = collect(ShownFrames(2, 10, 12, 1), SUBJECTS)
    found = distances.results(draw_counts(range(40), 50, 0), samples=2)
    real, autoencoded = SUBJECTS["real"], SUBJECTS["autoencoded"]
    assert found["copy_last"] == pytest.approx(expected_distance(SUBJECTS["copy_last"], real))
    assert found["reconstruction"] == pytest.approx(expected_distance(autoencoded, real))
    # A set of each sample number, and the mean over these.
    each = [expected_distance(SUBJECTS[f"prediction {n}"], real) for n in (0, 1)]
    assert found["prediction"] == pytest.approx(np.mean(each))
    each = [expected_distance(SUBJECTS[f"prediction_autoencoded {n}"], autoencoded) for n in (0, 1)]
    assert found["autoencoded"]["prediction"] == pytest.approx(np.mean(each))
    copied = expected_distance(SUBJECTS["copy_last_autoencoded"], autoencoded)
    assert found["autoencoded"]["copy_last"] == pytest.approx(copied)
    assert "reconstruction" not in found["autoencoded"]
    for values in (found, found["autoencoded"]):
        for subject, (low, high) in values["interval"].items():
            assert low < values[subject] < high
    assert "interval" not in distances.results(None, samples=2)


def test_without_given_frames_a_prediction_is_compared_with_both():
    subjects = {name: videos for name, videos in SUBJECTS.items() if "prediction_autoencoded" not in name}
    found = collect(ShownFrames(0, 10, 10, 1), subjects).results(None, samples=2)
    each = [expected_distance(SUBJECTS[f"prediction {n}"][:, 2:], SUBJECTS["autoencoded"][:, 2:]) for n in (0, 1)]
    assert found["autoencoded"]["prediction"] == pytest.approx(np.mean(each))


def test_resampled_distances_are_those_of_clips_drawn_with_all_their_looks():
    subjects = {name: clips(number, 12, 22) for number, name in enumerate(SUBJECTS)}
    counts = draw_counts([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5], 30, 0)
    shown = ShownFrames(2, 20, 11, 2)
    found = collect(shown, subjects).results(counts, samples=1)
    values = []
    for row in counts:
        chosen = torch.arange(12).repeat_interleave(row.long())
        drawn = [subjects[name][chosen].reshape(-1, 11, 3, 2, 2) for name in ("copy_last", "real")]
        values.append(expected_distance(*drawn))
    half = 1.959964 * np.std(values, ddof=1)
    expected = expected_distance(*(subjects[name].reshape(-1, 11, 3, 2, 2) for name in ("copy_last", "real")))
    assert found["copy_last"] == pytest.approx(expected)
    low, high = found["interval"]["copy_last"]
    assert high - expected == pytest.approx(half, rel=1e-6)
    assert low == pytest.approx(max(0, expected - half), rel=1e-6)


def test_few_clips_are_measured_with_a_warning_and_one_is_refused(capsys):
    few = {name: videos[:20] for name, videos in SUBJECTS.items()}
    assert collect(ShownFrames(2, 10, 12, 1), few).results(None, samples=1)["prediction"] > 0
    assert "measured on 20 clips, and the network has 24 features" in capsys.readouterr().err
    collect(ShownFrames(2, 10, 12, 1), SUBJECTS).results(None, samples=1)
    assert capsys.readouterr().err == ""
    one = {name: videos[:1] for name, videos in SUBJECTS.items()}
    with pytest.raises(ValueError, match="two clips or more, and there is one"):
        collect(ShownFrames(2, 10, 12, 1), one).results(None, samples=1)


def protocol(**changes) -> dict:
    return {
        "protocol": "kth_10_30, with videos=64", "dataset": "kth", "split": "test", "clips": 64, "videos": 60,
        "window": "random", "window_seed": 3, "context": 10, "horizon": 30, "samples": 2,
        "description": "rk4-38, 396 evaluations a frame, warm start 0", "frame_step": 5, "image_size": 64,
        "resize": {"filter": "area", "upscale_filter": "bicubic", "crop": "centred square of the short side, offset "
                   "(long - short) // 2", "size": 64}, "aggregation": "mean over clips, samples and predicted frames",
        "best_of": "of each clip the best", "interval": "95 %", "precision": "fp32", "seed": 7, "refine": True,
        "autoencoder_sha256": "a" * 64, "flow_sha256": "f" * 64, "flow_step": 300000, "refiner_sha256": "b" * 64,
        "vgg_sha256": "c" * 64, "missing": {},
        "fvd": {"network_sha256": "d" * 64, "clips_of_frames": "40 frames", "resize": "by the network: 224x224",
                "statistics": "float64", "interval": "-+", "samples": "a set of each"},
    } | changes  # fmt: skip


def table_of(**changes) -> str:
    values = {subject: numbers(6, 1, 30) for subject in ("copy_last", "reconstruction")}
    values["prediction"] = numbers(6, 2, 30)
    counts = draw_counts(range(6), 50, 0)
    metrics = {"psnr": summarise(PSNR, values, counts), "ssim": summarise(PSNR, values, None)}
    interval = {"prediction": [1234.5, 12345.6], "copy_last": [1.0, 2.0], "reconstruction": [0.0, 1.0]}
    fvd = {"prediction": 2345.6, "copy_last": 1.5, "reconstruction": 0.5, "interval": interval}
    metrics["fvd"] = fvd | {"autoencoded": {"prediction": 99.9, "copy_last": 1.0, "interval": interval}}
    return format_table({"protocol": protocol(**changes), "metrics": metrics})


def test_the_table_has_all_that_is_needed_to_measure_again_and_stays_narrow():
    text = table_of()
    assert max(len(line) for line in text.splitlines()) <= 120
    for part in ("64 clips of 60 videos", "10 frames given, 30 predicted", "kth_10_30, with videos=64", "seed 3",
                 "one frame in 5", "396 evaluations", "seed 7", "filter area", "fp32", "a" * 12, "f" * 12, "b" * 12,
                 "c" * 12, "d" * 12, "best of 2", "+15", "+30", "2345.6", "[1234.5, 12345.6]"):  # fmt: skip
        assert part in text, part
    assert "not measured" not in text
    assert "LPIPS" not in text


def test_the_table_says_what_is_missing_and_leaves_no_trace_of_it():
    bare = protocol(
        samples=1, missing={"lpips": "no weights", "fvd": "no network"}, fvd=None, vgg_sha256=None, best_of=None,
        interval=None, protocol=None, frame_step=1, refine=False, refiner_sha256=None,
    )  # fmt: skip
    values = {subject: numbers(6, 1, 30) for subject in ("prediction", "copy_last", "reconstruction")}
    text = format_table({"protocol": bare, "metrics": {"psnr": summarise(PSNR, values, None)}})
    assert text.splitlines()[-2:] == [
        "  lpips was not measured: no weights",
        "  fvd was not measured: no network",
    ]
    for part in ("best of", "FVD", "VGG16", "refiner", "LPIPS"):
        assert part not in text
