"""The protocol of an evaluation: everything that is needed to measure the same again."""

from pathlib import Path
from typing import Any

import torch

from pipelines.config import PROTOCOL_DATA, PROTOCOLS, RiverConfig
from pipelines.evaluation.frechet import MAX_RESAMPLES, VideoDistances
from pipelines.evaluation.results import EvaluationProtocol
from pipelines.loading import find_flow, find_refiner, weights_digest
from pipelines.predictor import VideoPredictor
from pipelines.runtime.context import sampling_precision
from pipelines.runtime.files import file_sha256
from stage1_autoencoder.videos.preprocessing import preprocessing_description
from stage2_flow.sampling_plan import SamplingPlan


def describe_protocol(
    config: RiverConfig,
    predictor: VideoPredictor,
    videos: list[int],
    missing: dict[str, str],
    *,
    refine: bool,
    vgg: Path | None,
    distances: VideoDistances | None,
) -> EvaluationProtocol:
    """Everything that decides the numbers.

    Args:
        videos: the video of each measured clip.
        missing: metric that was not measured -> reason.
        vgg: the file of VGG16; None where LPIPS was not measured.
        distances: with the network of FVD; None where FVD was not measured.
    """
    evaluation, frames = config.evaluation, preprocessing_description(config.dataset)
    flow, refiner = find_flow(config.run_path), find_refiner(config.run_path) if refine else None
    assert flow is not None
    interval = f"95 %, bootstrap over videos: percentiles of {evaluation.resamples} resamples, seed {evaluation.seed}"
    best_of = "per clip and metric, the sample with the best mean over the horizon by that metric"
    return EvaluationProtocol(
        protocol=describe_preset(config),
        dataset=config.dataset.name,
        split=evaluation.split,
        clips=len(videos),
        videos=len(set(videos)),
        window=evaluation.window,
        window_seed=evaluation.seed,
        context=evaluation.context,
        horizon=evaluation.horizon,
        samples=evaluation.samples,
        aggregation="mean over clips, samples and predicted frames",
        best_of=best_of if evaluation.samples > 1 else None,
        interval=None if "interval" in missing else interval,
        pixels="clamped to [-1, 1], compared as floats with data range 2",
        image_size=config.dataset.image_size,
        frame_step=config.dataset.frame_step,
        resize={
            "filter": frames["resize_filter"],
            "upscale_filter": frames["upscale_filter"],
            "crop": frames["crop"],
            "size": config.dataset.image_size,
        },
        sampling=config.sampling.model_dump(mode="json"),
        seed=config.sampling.seed,
        precision=sampling_precision(config.sampling, predictor.device),
        nfe=SamplingPlan.from_config(config.sampling).evaluations,
        description=predictor.describe_sampling(refine),
        flow_step=flow.step,
        flow_sha256=weights_digest(predictor.vector_field),
        flow_origin={key: flow.state[key] for key in ("imported", "fine_tuned_from") if key in flow.state},
        refine=refine,
        refiner_step=None if refiner is None else refiner.step,
        refiner_sha256=weights_digest(predictor.check_refiner()) if refine else None,
        autoencoder_sha256=flow.state["store"]["autoencoder"],
        store_fingerprint=flow.state["store"]["fingerprint"],
        vgg_sha256=None if vgg is None else file_sha256(vgg),
        fvd=None if distances is None else _describe_fvd(config, distances, intervals="interval" not in missing),
        device=str(predictor.device),
        torch=torch.__version__,
        missing=missing,
    )


def describe_preset(config: RiverConfig) -> str | None:
    """The preset, and where the settings differ from it: `kth_10_30, with videos=64`; None without a preset."""
    evaluation, dataset = config.evaluation.model_dump(), config.dataset.model_dump()
    name = evaluation["protocol"]
    if name is None:
        return None
    preset = PROTOCOLS[name]
    changes = [f"{key}={value}" for key, value in evaluation.items() if key in preset and preset[key] != value]
    for path, value in PROTOCOL_DATA[name].items():
        key, _, inner = path.partition(".")
        ours = dataset[key].get(inner) if inner else dataset[key]
        changes += [f"dataset.{path}={ours}"] if ours != value else []
    return name + (f", with {', '.join(changes)}" if changes else "")


def _describe_fvd(config: RiverConfig, distances: VideoDistances, intervals: bool) -> dict[str, Any]:
    segments = distances.segments
    resamples = min(config.evaluation.resamples, MAX_RESAMPLES)
    given = "real ones against real clips, autoencoded ones against autoencoded clips"
    return {
        "network_sha256": distances.network.sha256,
        "context": segments.context > 0,
        "frames": segments.frames,
        "clips_of_frames": segments.describe(),
        "resize": "by the network: 224x224, bilinear",
        "given_frames": given if segments.context else None,
        "statistics": "mean and covariance (n - 1) in float64",
        "samples": "one set per sample number, mean over the sets' distances",
        "interval": f"-+ 1.96 standard deviations of {resamples} resamples" if intervals else None,
    }
