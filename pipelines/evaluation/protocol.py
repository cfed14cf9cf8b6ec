"""The protocol of an evaluation: everything that is needed to measure the same again."""

from pathlib import Path
from typing import Any

import torch

from pipelines.config import PROTOCOL_DATA, PROTOCOLS, RiverConfig
from pipelines.evaluation.frechet import LATENT_DEFINITION, MAX_RESAMPLES, Segments
from pipelines.evaluation.metrics import SHARPNESS_DEFINITION, SSIM_DEFINITION
from pipelines.loading import find_flow, find_refiner, weights_digest
from pipelines.predictor import VideoPredictor
from pipelines.runtime.context import sampling_precision
from pipelines.runtime.files import file_sha256
from pipelines.runtime.results import EvaluationProtocol
from stage1_autoencoder.videos.preprocessing import preprocessing_description
from stage1_autoencoder.videos.source import Recording
from stage2_flow.sampling_plan import SamplingPlan


def describe_protocol(
    config: RiverConfig,
    predictor: VideoPredictor,
    videos: list[int],
    recordings: list[Recording],
    missing: dict[str, str],
    *,
    refine: bool,
    vgg: Path | None,
    i3d: Path | None,
) -> EvaluationProtocol:
    """Everything that decides the numbers.

    Args:
        videos, recordings: the video and the recording of each measured clip.
        missing: metric, or `interval`, that was not measured -> reason.
        vgg, i3d: files of the networks.
    """
    evaluation, frames = config.evaluation, preprocessing_description(config.dataset)
    flow, refiner = find_flow(config.run_path), find_refiner(config.run_path) if refine else None
    assert flow is not None
    best_of = "per clip and metric, the sample with the best mean over the horizon by that metric"
    return EvaluationProtocol(
        **common_protocol(config, predictor, recordings, missing, evaluation.resamples),
        protocol=describe_preset(config),
        clips=len(videos),
        videos=len(set(videos)),
        window_seed=evaluation.seed,
        samples=evaluation.samples,
        aggregation="mean over clips, samples and predicted frames",
        best_of=best_of if evaluation.samples > 1 else None,
        sharpness=f"{SHARPNESS_DEFINITION}, sums over clips and samples",
        latent_frechet=None if "latent_frechet" in missing else LATENT_DEFINITION,
        pixels="clamped and compared as floats; data range 1 for values in [0, 1]",
        fps=config.dataset.fps,
        frame_step=config.dataset.frame_step,
        resize={
            "filter": frames["resize_filter"],
            "upscale_filter": frames["upscale_filter"],
            "crop": frames["crop"],
            "fit": config.dataset.fit,
            "size": config.dataset.image_size,
        },
        sampling=predictor.resolved_sampling(predictor.sampling, evaluation.context, evaluation.horizon).model_dump(
            mode="json"
        ),
        seed=predictor.sampling.seed,
        nfe=SamplingPlan.from_config(predictor.sampling).evaluations,
        description=predictor.describe_sampling(refine),
        flow_origin={key: flow.state[key] for key in ("imported", "fine_tuned_from") if key in flow.state},
        refine=refine,
        refiner_step=None if refiner is None else refiner.step,
        refiner_sha256=weights_digest(predictor.check_refiner()) if refine else None,
        store_fingerprint=flow.state["store"]["fingerprint"],
        vgg_sha256=None if vgg is None or "lpips" in missing else file_sha256(vgg),
        fvd=None if i3d is None or "fvd" in missing else _describe_fvd(config, i3d, "interval" not in missing),
        torch=torch.__version__,
    )


def common_protocol(
    config: RiverConfig,
    predictor: VideoPredictor,
    recordings: list[Recording],
    missing: dict[str, str],
    resamples: int,
) -> dict[str, Any]:
    """The fields of `Protocol`.

    Args:
        recordings: the recording of each measured clip.
        resamples: of the bootstrap.
    """
    flow, seed = find_flow(config.run_path), config.evaluation.seed
    assert flow is not None
    interval = f"95 %, bootstrap over recordings: percentiles of {resamples} resamples, seed {seed}"
    return {
        **config.evaluation.model_dump(include={"split", "window", "context", "horizon"}),
        "dataset": config.dataset.name,
        "recordings": len(set(recordings)),
        "persons": len({recording.person for recording in recordings} - {None}) or None,
        "ssim": None if "ssim" in missing else SSIM_DEFINITION,
        "interval": None if "interval" in missing else interval,
        "missing": missing,
        "image_size": config.dataset.image_size,
        "flow_step": flow.step,
        "flow_sha256": weights_digest(predictor.vector_field),
        "autoencoder_sha256": flow.state["store"]["autoencoder"],
        "precision": sampling_precision(predictor.sampling, predictor.device),
        "device": str(predictor.device),
    }


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


def _describe_fvd(config: RiverConfig, i3d: Path, intervals: bool) -> dict[str, Any]:
    segments = Segments.choose(config.evaluation)
    resamples = min(config.evaluation.resamples, MAX_RESAMPLES)
    height, width = config.dataset.frame_size
    distorted = "" if height == width else f", which distorts frames of {width}x{height}"
    given = "real ones against real clips, autoencoded ones against autoencoded clips"
    return {
        "network_sha256": file_sha256(i3d),
        "context": segments.context > 0,
        "frames": segments.frames,
        "clips_of_frames": segments.describe(),
        "resize": f"by the network: 224x224, bilinear{distorted}",
        "given_frames": given if segments.context else None,
        "statistics": "mean and covariance (n - 1) in float64",
        "samples": "one set per sample number, mean over the sets' distances",
        "interval": f"-+ 1.96 standard deviations of {resamples} resamples" if intervals else None,
    }
