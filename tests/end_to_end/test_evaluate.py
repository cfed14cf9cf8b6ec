"""`evaluate` as users meet it: all metrics with a small video network and a VGG16 of noise, and what may be missing."""

import hashlib
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipelines.config import load_config
from pipelines.evaluation.baselines import continue_motion
from pipelines.evaluation.measures.frechet import fit_gaussian, frechet_distance, latent_features
from pipelines.evaluation.measures.metrics import gradient_energy, psnr, ssim
from pipelines.evaluation.measures.networks import load_lpips, load_st_lpips
from pipelines.loading import weights_digest
from pipelines.prediction.clips import open_clips
from pipelines.predictor import VideoPredictor
from pipelines.runtime.context import RunContext

CPU = torch.device("cpu")
SCORES = ("crps", "energy_score", "latent_energy_score")
LONG = ("evaluation.horizon=10",)  # 2 + 10 frames, enough for the I3D


class Means(nn.Module):
    """Stands for the I3D: means of each half of the clip, three channels each."""

    def forward(
        self, video: Tensor, rescale: bool = True, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        assert not rescale
        assert resize
        assert return_features
        return video.unflatten(2, [2, -1]).mean((3, 4, 5)).flatten(1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, vgg: Path) -> dict[str, Path]:
    """Files of both networks."""
    folder = tmp_path_factory.mktemp("weights")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Means()).save(folder / "video.pt")
    return {"video": folder / "video.pt", "vgg": vgg}


@pytest.fixture
def everything(weights: dict[str, Path]) -> tuple[str, ...]:
    """Settings with which all is measured."""
    return (*LONG, f"evaluation.video_network={weights['video']}",
            f"autoencoder.training.vgg_weights={weights['vgg']}")  # fmt: skip


def result_of(place) -> dict[str, Any]:
    return json.loads((place.runs / "evaluation.json").read_text())


def test_all_metrics_equal_those_of_the_predictors_frames(copied, everything, weights, st_lpips) -> None:
    published = {"psnr_of_mean_mse", "ssim_8bit", "fvd_pooled"}
    options = ("evaluation.samples=2", "evaluation.batch_size=3", f"evaluation.pitfalls=[{','.join(published)}]")
    outcome = copied.run("evaluate", sets=[*everything, *options]).ok()
    result = result_of(copied)
    protocol, metrics, calibration = result["protocol"], result["metrics"], result["calibration"]
    assert protocol["missing"].keys() == {"interval"}  # of 4 recordings there is none
    features = {"st_lpips", "frame_frechet", "frame_mmd", "motion_frechet", "motion_mmd"}
    others = {"psnr", "ssim", "lpips", "sharpness", "fvd", "latent_frechet"}
    assert metrics.keys() == {*others, *features, *SCORES, *published}
    assert protocol["st_lpips_sha256"] == hashlib.sha256(st_lpips.read_bytes()).hexdigest()
    assert protocol["pitfalls"].keys() == published
    assert metrics["psnr_of_mean_mse"]["prediction"] < metrics["psnr"]["prediction"]
    assert all(name in outcome.out for name in published)

    config = load_config(copied.folder / "tiny.yaml", LONG)
    predictor = VideoPredictor.from_run(copied.runs, "cpu")
    clips = list(open_clips(config, RunContext(CPU), 4))
    frames = torch.stack([clip.frames for clip in clips])
    given, truth = frames[:, :2], frames[:, 2:]
    autoencoded = predictor.decode_videos(predictor.encode_videos(frames))
    samples = [
        predictor.generate_frames(given, 10, keys=[(clip.key, number) for clip in clips])[:, 2:] for number in (0, 1)
    ]
    copies = given[:, 1:].expand_as(truth)
    lpips = load_lpips(weights["vgg"], CPU, download=False)
    perceptual = load_st_lpips(st_lpips, CPU)
    functions = {"psnr": psnr, "ssim": ssim, "lpips": lpips, "st_lpips": perceptual}
    for name, function in functions.items():
        values = [function(x.flatten(0, 1), truth.flatten(0, 1)).view(4, 10).double() for x in samples]
        found, tolerance = metrics[name], {"rel": 1e-4, "abs": 1e-5}
        assert found["prediction"] == pytest.approx(torch.stack(values).mean().item(), **tolerance)
        assert found["per_frame"]["prediction"] == pytest.approx(torch.stack(values).mean((0, 1)).tolist(), **tolerance)
        of_clips = torch.stack([x.mean(1) for x in values])
        best = of_clips.amin(0) if name.endswith("lpips") else of_clips.amax(0)
        assert found["best_of"]["value"] == pytest.approx(best.mean().item(), **tolerance)
        copied_values = function(copies.flatten(0, 1), truth.flatten(0, 1))
        assert found["copy_last"] == pytest.approx(copied_values.mean().item(), **tolerance)
        again = function(autoencoded[:, 2:].flatten(0, 1), truth.flatten(0, 1))
        assert found["reconstruction"] == pytest.approx(again.mean().item(), **tolerance)
        moved = function(continue_motion(given, 10).flatten(0, 1), truth.flatten(0, 1))
        assert found["constant_motion"] == pytest.approx(moved.mean().item(), **tolerance)

    energy, true_energy = (gradient_energy(x) for x in (torch.cat(samples), truth))
    sharpness = energy.unflatten(0, (2, 4)).mean((0, 1)) / true_energy.mean(0)
    assert metrics["sharpness"]["per_frame"]["prediction"] == pytest.approx(sharpness.tolist(), rel=1e-4)
    assert metrics["sharpness"]["prediction"] == pytest.approx(sharpness.mean().item(), rel=1e-4)
    copied_sharpness = gradient_energy(copies).mean(0) / true_energy.mean(0)
    assert metrics["sharpness"]["per_frame"]["copy_last"] == pytest.approx(copied_sharpness.tolist(), rel=1e-4)
    assert "best_of" not in metrics["sharpness"]  # neither more nor less is better

    # [clip, frame, value] of two samples and the truth, in levels.
    first, second, real = (127.5 * (x.clamp(-1, 1).double().flatten(2) + 1) for x in (*samples, truth))
    error, spread = ((first - real).abs() + (second - real).abs()) / 2, (first - second).abs() / 2
    assert metrics["crps"]["per_frame"]["prediction"] == pytest.approx((error - spread).mean((0, 2)).tolist(), rel=1e-4)
    distances = [(x - y).square().mean(2).sqrt() for x, y in ((first, real), (second, real), (first, second))]
    expected = ((distances[0] + distances[1] - distances[2]) / 2).mean(0)
    assert metrics["energy_score"]["per_frame"]["prediction"] == pytest.approx(expected.tolist(), rel=1e-4)
    mean, variance = (first + second) / 2, (first - second).square() / 2
    ratio = (1.5 * variance.mean((0, 2)) / (mean - real).square().mean((0, 2))).sqrt()
    assert calibration["spread_skill"]["per_frame"]["prediction"] == pytest.approx(ratio.tolist(), rel=1e-4)
    order = torch.stack([first, second]).round() - real.round()
    below, equal = (order < 0).sum(0), (order == 0).sum(0)
    below, equal = below[equal < 2], equal[equal < 2]
    expected = [(((below <= rank) & (rank <= below + equal)) / (equal + 1.0)).mean().item() for rank in range(3)]
    assert calibration["ranks"] == pytest.approx(expected, abs=1e-4)

    def latent_distance(latents: Tensor) -> float:
        sets = (predictor.standardization.to_final(x) for x in (latents, encoded))
        return frechet_distance(*(fit_gaussian(latent_features(x, 2).flatten(0, 1)) for x in sets))

    encoded = predictor.encode_videos(frames)
    predicted = [
        predictor.generate_latents(encoded[:, :2], 10, keys=[(clip.key, number) for clip in clips]) for number in (0, 1)
    ]
    found, near = metrics["latent_frechet"], {"rel": 1e-3, "abs": 1e-7}
    assert found["prediction"] == pytest.approx(np.mean([latent_distance(x) for x in predicted]), **near)
    still = torch.cat([encoded[:, :2], encoded[:, 1:2].expand_as(encoded[:, 2:])], dim=1)
    assert found["copy_last"] == pytest.approx(latent_distance(still), **near)
    assert "reconstruction" not in found

    def frame_distance(videos: Tensor) -> float:
        sets = (perceptual.maps(x.flatten(0, 1).clamp(-1, 1))[-1].mean((2, 3)) for x in (videos, truth))
        return frechet_distance(*map(fit_gaussian, sets))

    found, coarse = metrics["frame_frechet"], {"rel": 0.01, "abs": 1e-5}  # of features in half precision
    assert found["prediction"] == pytest.approx(np.mean([frame_distance(x) for x in samples]), **coarse)
    assert found["copy_last"] == pytest.approx(frame_distance(copies), **coarse)
    assert metrics["motion_mmd"]["copy_last"] > 0

    def distance(first: Tensor, second: Tensor) -> float:
        halves = (x.unflatten(1, (2, 6)).mean((2, 4, 5)) for x in (first, second))
        # The network has the channels before the halves.
        return frechet_distance(*(fit_gaussian(x.transpose(1, 2).flatten(1)) for x in halves))

    fvd = metrics["fvd"]
    assert fvd["copy_last"] == pytest.approx(distance(torch.cat([given, copies], 1), frames), **near)
    assert fvd["reconstruction"] == pytest.approx(distance(autoencoded, frames), **near)
    both = [distance(torch.cat([given, x], 1), frames) for x in samples]
    assert fvd["prediction"] == pytest.approx(np.mean(both), **near)
    both = [distance(torch.cat([autoencoded[:, :2], x], 1), autoencoded) for x in samples]
    assert fvd["autoencoded"]["prediction"] == pytest.approx(np.mean(both), **near)
    last = autoencoded[:, 1:2].expand_as(truth)
    expected = distance(torch.cat([autoencoded[:, :2], last], 1), autoencoded)
    assert fvd["autoencoded"]["copy_last"] == pytest.approx(expected, **near)

    assert "FVD, lower is better" in outcome.out
    assert "LPIPS, lower is better" in outcome.out
    assert "Fréchet of features, lower is better" in outcome.out
    assert "prediction, best of 2" in outcome.out
    assert max(len(line) for line in outcome.out.splitlines() if str(copied.folder) not in line) <= 120
    assert "has sha256" in outcome.err  # of the stand-in: not the usual network
    assert "measured on 4 clips, and the network has 6 features" in outcome.err


def test_the_protocol_tells_weights_and_settings(copied, everything, weights) -> None:
    copied.run("evaluate", sets=[*everything, "evaluation.window=random", "evaluation.fvd_context=false"]).ok()
    protocol = result_of(copied)["protocol"]
    predictor = VideoPredictor.from_run(copied.runs, "cpu")
    assert protocol["predictor"]["flow_sha256"] == weights_digest(predictor.vector_field)
    assert protocol["autoencoder_sha256"] == weights_digest(predictor.autoencoder)
    assert protocol["vgg_sha256"] == hashlib.sha256(weights["vgg"].read_bytes()).hexdigest()
    assert protocol["fvd"]["network_sha256"] == hashlib.sha256(weights["video"].read_bytes()).hexdigest()
    assert protocol["fvd"]["context"] is False
    assert protocol["fvd"]["frames"] == 10
    assert (protocol["clips"], protocol["videos"], protocol["window"], protocol["window_seed"]) == (4, 4, "random", 0)
    assert (protocol["split"], protocol["recordings"], protocol["persons"]) == ("test", 4, None)
    assert (protocol["predictor"]["nfe"], protocol["predictor"]["seed"]) == (2, 0)
    assert protocol["resize"]["filter"] == "area"
    assert protocol["resize"]["size"] == 32


def test_the_batch_changes_no_number(copied, everything) -> None:
    copied.run("evaluate", sets=everything).ok()
    first = (copied.runs / "evaluation.json").read_bytes()
    copied.run("evaluate", sets=[*everything, "evaluation.batch_size=1"]).ok()
    for metric, values in json.loads(first)["metrics"].items():
        again = result_of(copied)["metrics"][metric]
        assert again["prediction"] == pytest.approx(values["prediction"], rel=1e-3, abs=1e-6)


def test_what_is_not_here_is_said_and_the_rest_is_measured(copied) -> None:
    shutil.rmtree(copied.store)
    outcome = copied.run("evaluate", sets=LONG).ok()
    result = result_of(copied)
    assert result["metrics"].keys() == {"psnr", "ssim", "sharpness", "latent_frechet", *SCORES}
    reasons = {
        "lpips": ("autoencoder.training.vgg_weights", "--download"),
        "st_lpips": ("pip install stlpips_pytorch",),
        "fvd": ("evaluation.video_network", "--download"),
        "nearest_clip": ("paths.latents",),
        "memorization": ("paths.latents",),
        "interval": (),
        "calibration": ("evaluation.samples",),
    }
    assert result["protocol"]["missing"].keys() == reasons.keys()
    assert not {"calibration", "memorization"} & result.keys()
    printed = " ".join(outcome.out.split())
    for name, reason in result["protocol"]["missing"].items():
        assert all(part in reason for part in reasons[name])
        assert f"{name} was not measured: {reason}" in printed
    assert outcome.err == ""


def test_training_clips_are_found_with_their_continuation(copied) -> None:
    copied.run("evaluate", sets=["evaluation.split=train", "evaluation.context=3"]).ok()
    result = result_of(copied)
    for metric in ("psnr", "ssim"):  # decoded from latents of 16 bits
        values = result["metrics"][metric]["per_frame"]
        assert values["nearest_clip"] == pytest.approx(values["reconstruction"], rel=0.01)
    found = result["memorization"]
    assert found["truth"] < 0.01 < found["smallest"]["prediction"]
    assert (found["nearer"], found["training_clips"]) == (0, 24 * 7)  # of 24 videos of 12 frames


def test_clips_too_short_for_the_i3d_and_few_recordings(copied, everything, st_lpips) -> None:
    copied.run("evaluate", sets=[*everything, "evaluation.horizon=6"]).ok()
    assert "needs 10 frames or more, and the clips have 8" in result_of(copied)["protocol"]["missing"]["fvd"]
    outcome = copied.run("evaluate", sets=[*everything, "evaluation.videos=1"]).ok()
    missing = result_of(copied)["protocol"]["missing"]
    of_sets = {"fvd", "latent_frechet", "frame_features", "motion_features"}
    assert missing.keys() == {"interval", "calibration", *of_sets}
    assert all("two clips or more" in missing[name] for name in of_sets)
    assert "interval was not measured" in outcome.out
    # Of shapes, clips may be longer than the stored videos of 12 frames.
    outcome = copied.run("evaluate", sets=["evaluation.resamples=0", "evaluation.horizon=24"]).ok()
    result = result_of(copied)
    assert "interval" not in result["metrics"]["psnr"]
    for values in (result["metrics"]["psnr"], result["metrics"]["sharpness"], result["objects"]["position"]):
        assert {subject: len(curve) for subject, curve in values["per_frame"].items()} == dict.fromkeys(
            ("prediction", "copy_last", "constant_motion", "reconstruction"), 24
        )
    assert "+24" in outcome.out


PROTOCOL = """\
title: two clips of shapes
paper: a test
source: this file
dataset: {source: shapes, image_size: 32, frame_step: 1}
test_videos: 4
evaluation: {split: test, context: 2, horizon: 4, videos: 2, samples: 1, window: first, fvd_context: true,
             fvd_frames: null, pitfalls: [psnr_of_mean_mse]}
aggregation: mean
fvd_sets: "2:2"
fvd_network: PyTorch
numbers: {psnr: psnr_of_mean_mse}
rows: [{method: Nobody, psnr: 12.34, source: nowhere}]
differs: [The clips are drawn by nobody.]
"""


def test_a_protocol_of_ones_own_is_listed_and_run_exactly(copied, tmp_path: Path, monkeypatch, command) -> None:
    (tmp_path / "configs" / "protocols").mkdir(parents=True)
    (tmp_path / "configs" / "protocols" / "mine.yaml").write_text(PROTOCOL)
    monkeypatch.chdir(tmp_path)
    listed = command(["protocols"]).ok().out
    assert re.search(r"^mine +2->4 +2/4 ", listed, re.MULTILINE)
    assert "12.34" in command(["protocols", "mine"]).ok().out
    outcome = copied.run("evaluate", "--protocol", "mine").ok()
    result = result_of(copied)
    assert (result["protocol"]["protocol"], result["protocol"]["clips"]) == ("mine", 2)
    assert result["protocol"]["differs"] == ["The clips are drawn by nobody."]
    assert "psnr_of_mean_mse" in result["metrics"]
    assert "12.34" in outcome.out
    assert "drawn by nobody" in outcome.out
    before = (copied.runs / "evaluation.json").read_bytes()
    refused = copied.run("evaluate", "--protocol", "mine", sets=["evaluation.videos=3", "evaluation.seed=5"])
    refused.refused(2, "videos is 3, expected 2", "evaluation.protocol=mine")
    copied.run("evaluate", "--protocol", "mine", "--quick").refused(2, "--quick", "--protocol mine")
    copied.run("evaluate", "--protocol", "yours").refused(2, "yours", "mine")
    assert (copied.runs / "evaluation.json").read_bytes() == before


def test_a_strict_protocol_is_refused_before_anything_is_trained(place) -> None:
    place.run("evaluate", "--protocol", "kth_srvp_10_30").refused(2, "dataset.source is shapes, expected kth")
    assert not place.runs.exists()


def test_a_named_file_is_looked_for_before_anything_is_trained(place) -> None:
    for setting in ("evaluation.video_network", "autoencoder.training.vgg_weights"):
        place.run("evaluate", sets=[f"{setting}=gone"]).refused(2, f"{setting}: gone")
    assert not place.runs.exists()


def test_a_network_that_is_no_network_changes_no_result(copied, tmp_path: Path) -> None:
    before = (copied.runs / "evaluation.json").read_bytes()
    (tmp_path / "page.pt").write_text("<html>")
    copied.run("evaluate", sets=[*LONG, f"evaluation.video_network={tmp_path / 'page.pt'}"]).refused(
        2, "evaluation.video_network", "page.pt", "i3d_torchscript.pt"
    )
    assert (copied.runs / "evaluation.json").read_bytes() == before
