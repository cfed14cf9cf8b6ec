"""The protocol of an evaluation: everything that is needed to measure the same again."""

from pathlib import Path
from typing import Any

import torch

from pipelines.config import RiverConfig, find_protocol
from pipelines.config.literature import PITFALLS
from pipelines.evaluation.forecasts import Forecast
from pipelines.evaluation.measures.frechet import LATENT_DEFINITION, MAX_RESAMPLES, Segments
from pipelines.evaluation.measures.metrics import SHARPNESS_DEFINITION, SSIM_DEFINITION
from pipelines.evaluation.measures.perception import FEATURES_DEFINITION
from pipelines.evaluation.measures.sample_scores import SCORES_DEFINITION
from pipelines.evaluation.published import describe_preset
from pipelines.loading import weights_digest
from pipelines.prediction.frame_coding import FrameCoding
from pipelines.runtime.files import file_sha256
from pipelines.runtime.results import EvaluationProtocol
from stage1_autoencoder.videos.preprocessing import preprocessing_description
from stage1_autoencoder.videos.source import Recording

# Ends the definition of what is measured of latents, where these are not what was predicted.
ENCODED = ", of predicted frames that were encoded"


def describe_protocol(
    config: RiverConfig,
    forecast: Forecast,
    videos: list[int],
    recordings: list[Recording],
    missing: dict[str, str],
    *,
    split_videos: int,
    vgg: Path | None,
    i3d: Path | None,
    st_lpips: Path | None,
) -> EvaluationProtocol:
    """Everything that decides the numbers.

    Args:
        forecast: what was measured.
        videos, recordings: the video and the recording of each measured clip.
        missing: metric, or `interval`, that was not measured -> reason.
        split_videos: number of videos that the clips were chosen from.
        vgg, i3d, st_lpips: files of the networks.
    """
    evaluation, frames = config.evaluation, preprocessing_description(config.dataset)
    best_of = "per clip and metric, the sample with the best mean over the horizon by that metric"
    return EvaluationProtocol(
        **common_protocol(config, forecast.device, forecast.coding, recordings, missing, evaluation.resamples),
        predictor=forecast.description,
        protocol=describe_preset(config, split_videos),
        differs=[] if evaluation.protocol is None else list(find_protocol(evaluation.protocol).differs),
        pitfalls={name: PITFALLS[name] for name in evaluation.pitfalls},
        clips=len(videos),
        videos=len(set(videos)),
        window_seed=evaluation.seed,
        samples=evaluation.samples,
        aggregation="mean over clips, samples and predicted frames",
        best_of=best_of if evaluation.samples > 1 else None,
        sharpness=f"{SHARPNESS_DEFINITION}, sums over clips and samples",
        scores=SCORES_DEFINITION,
        latent_frechet=None if "latent_frechet" in missing else LATENT_DEFINITION + ENCODED * forecast.is_encoded,
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
        vgg_sha256=None if vgg is None or "lpips" in missing else file_sha256(vgg),
        st_lpips_sha256=None if st_lpips is None or "st_lpips" in missing else file_sha256(st_lpips),
        features=None if st_lpips is None or "st_lpips" in missing else FEATURES_DEFINITION,
        fvd=None if i3d is None or "fvd" in missing else _describe_fvd(config, i3d, "interval" not in missing),
        torch=torch.__version__,
    )


def common_protocol(
    config: RiverConfig,
    device: torch.device,
    coding: FrameCoding | None,
    recordings: list[Recording],
    missing: dict[str, str],
    resamples: int,
) -> dict[str, Any]:
    """The fields of `Protocol`.

    Args:
        coding: what reconstructions and latents are of.
        recordings: the recording of each measured clip.
        resamples: of the bootstrap.
    """
    seed = config.evaluation.seed
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
        "autoencoder_sha256": None if coding is None else weights_digest(coding.autoencoder),
        "device": str(device),
    }


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
