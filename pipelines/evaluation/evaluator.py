"""`evaluate`: PSNR, SSIM, LPIPS and FVD of the prediction beside two baselines, with the protocol of all that."""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.config import RiverConfig
from pipelines.evaluation.fvd import ShownFrames, VideoDistances
from pipelines.evaluation.metrics import PSNR, SSIM, Metric, draw_counts, lpips_metric, measure_frames
from pipelines.evaluation.networks import I3D, VideoNetwork, load_lpips
from pipelines.evaluation.protocol import describe_protocol
from pipelines.evaluation.table import SUBJECTS, format_table, summarise
from pipelines.prediction.clips import Clip, ClipReader, open_clips
from pipelines.predictor import VideoPredictor, load_predictor
from pipelines.runtime.context import RunContext
from pipelines.runtime.progress import progress, say
from stage1_autoencoder.lpips import SMALLEST_SIDE

NETWORK_SETTING = "evaluation.video_network"


@dataclass(frozen=True, eq=False)
class Judges:
    """What is measured with.

    Attributes:
        metrics: of frames.
        distances: the Fréchet video distance's features; None: not measured.
        missing: metric -> why it is not measured.
    """

    metrics: list[Metric]
    distances: VideoDistances | None
    missing: dict[str, str]


def evaluate(config: RiverConfig, run_context: RunContext, refine: bool = False) -> dict[str, Any]:
    """Measure the run on the protocol's clips; trains what lacks first. Writes `runs/<name>/evaluation.json`.

    Args:
        refine: measure refined predictions.

    Returns:
        What was written: `{"protocol": {...}, "metrics": {"psnr": {"prediction": .., "per_frame": {..}}, ...}}`.
    Raises:
        UserError: no clips; a file of weights that is configured and missing, or not what it must be.
    """
    network = I3D.find(config.evaluation.video_network, NETWORK_SETTING, download=run_context.download)
    predictor = load_predictor(config, run_context)
    clips = open_clips(config, run_context, config.evaluation.videos)
    judges = load_judges(config, run_context, network)
    metrics, videos = measure(config, predictor, clips, judges, refine)
    video_network = judges.distances.network if judges.distances is not None and "fvd" in metrics else None
    protocol = describe_protocol(config, predictor, videos, judges.missing, refine=refine, network=video_network)
    result = {"protocol": protocol, "metrics": metrics}
    path = config.run_path / "evaluation.json"
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    say("")
    say(format_table(result))
    say(f"\nevaluate: {path}")
    return result


def load_judges(config: RiverConfig, run_context: RunContext, network: Path | None) -> Judges:
    """Load the networks that are there.

    Args:
        network: the file of the video network, if there is one.
    """
    missing, metrics = {}, [PSNR, SSIM]
    if config.dataset.image_size < SMALLEST_SIDE:
        missing["lpips"] = f"LPIPS needs images of {SMALLEST_SIDE} pixels a side, dataset.image_size is smaller"
    else:
        lpips = load_lpips(config.autoencoder.training.vgg_weights, run_context.device, download=run_context.download)
        if lpips is None:
            missing["lpips"] = (
                "no weights of VGG16: set autoencoder.training.vgg_weights, or fetch them with --download"
            )
        else:
            metrics.append(lpips_metric(lpips))
    shown, distances = ShownFrames.choose(config.evaluation), None
    if isinstance(shown, str):
        missing["fvd"] = shown
    elif network is None:
        missing["fvd"] = f"no I3D network: set {NETWORK_SETTING} to its file, or fetch it with --download"
    else:
        distances = VideoDistances(VideoNetwork(network, run_context.device, NETWORK_SETTING), shown)
    return Judges(metrics, distances, missing)


def measure(
    config: RiverConfig, predictor: VideoPredictor, clips: ClipReader, judges: Judges, refine: bool = False
) -> tuple[dict[str, Any], list[int]]:
    """All metrics of all subjects; clips are read, predicted and forgotten a batch at a time.

    What cannot be measured on these clips is added to `judges.missing`.

    Returns:
        The metrics, and the video of each clip.
    """
    evaluation, videos = config.evaluation, []
    values: dict[str, dict[str, list[Tensor]]] = {metric.name: defaultdict(list) for metric in judges.metrics}
    with progress(total=len(clips) * evaluation.samples, description="evaluate", unit="prediction") as bar:
        for batch in clips.batches(evaluation.batch_size):
            videos += [clip.video for clip in batch]
            for name, subjects in _measure_batch(config, predictor, batch, judges, refine, bar.update).items():
                for subject, numbers in subjects.items():
                    values[name][subject].append(numbers)
    counts = None
    if not evaluation.resamples:
        judges.missing["interval"] = "evaluation.resamples is 0"
    elif len(set(videos)) < 2:
        judges.missing["interval"] = "clips of two videos or more are needed to resample, and there is one video"
    else:
        counts = draw_counts(videos, evaluation.resamples, evaluation.seed)
    metrics = {
        metric.name: summarise(metric, {name: torch.cat(parts) for name, parts in values[metric.name].items()}, counts)
        for metric in judges.metrics
    }
    if judges.distances is not None:
        try:
            metrics["fvd"] = judges.distances.results(counts, evaluation.samples)
        except ValueError as error:
            judges.missing["fvd"] = str(error)
    return metrics, videos


def _measure_batch(
    config: RiverConfig,
    predictor: VideoPredictor,
    batch: list[Clip],
    judges: Judges,
    refine: bool,
    on_predictions: Callable[[int], object],
) -> dict[str, dict[str, Tensor]]:
    """By metric and subject [clips, samples, horizon]; features go to `judges.distances`."""
    context, horizon = config.evaluation.context, config.evaluation.horizon
    frames = torch.stack([clip.frames for clip in batch]).to(predictor.device)
    given, truth = frames[:, :context], frames[:, context:]
    latents = predictor.encode_videos(frames)
    autoencoded = predictor.decode_videos(latents)
    values: dict[str, dict[str, list[Tensor]]] = {
        metric.name: {subject: [] for subject in SUBJECTS} for metric in judges.metrics
    }

    def measure_subject(subject: str, videos: Tensor) -> None:
        for metric in judges.metrics:
            values[metric.name][subject].append(measure_frames(metric, videos, truth))

    copies = given[:, -1:].expand(-1, horizon, -1, -1, -1)
    measure_subject("copy_last", copies)
    measure_subject("reconstruction", autoencoded[:, context:])
    distances = judges.distances
    if distances is not None:
        distances.add("real", given, truth)
        distances.add("autoencoded", autoencoded[:, :context], autoencoded[:, context:])
        distances.add("copy_last", given, copies)
        last = autoencoded[:, context - 1 : context].expand(-1, horizon, -1, -1, -1)
        distances.add("copy_last_autoencoded", autoencoded[:, :context], last)
    for number in range(config.evaluation.samples):
        predicted = predict_frames(
            predictor, latents[:, :context], given, horizon, [(c.key, number) for c in batch], refine
        )
        measure_subject("prediction", predicted)
        if distances is not None:
            distances.add(f"prediction {number}", given, predicted)
            if distances.shown.context:
                distances.add(f"prediction_autoencoded {number}", autoencoded[:, :context], predicted)
        on_predictions(len(batch))
    return {
        name: {subject: torch.stack(samples, dim=1) for subject, samples in subjects.items()}
        for name, subjects in values.items()
    }


def predict_frames(
    predictor: VideoPredictor, latents: Tensor, given: Tensor, horizon: int, keys: list[tuple[int, int]], refine: bool
) -> Tensor:
    """Predict clips, and decode what was predicted alone.

    Args:
        latents: [b, context, c, h, w] raw ones of `given`.
        given: [b, context, 3, h, w] in [-1, 1], of which refining needs the last.
        keys: (video, sample) of each clip, which decide its random draws.
    Returns:
        [b, horizon, 3, h, w] in [-1, 1].
    Raises:
        UserError: `refine` without a refiner.
    """
    context = latents.shape[1]
    predicted = predictor.generate_latents(latents, horizon, keys=keys)
    if refine:
        return predictor.decode_refined(predicted[:, context - 1 :], given[:, -1:])[:, 1:]
    return predictor.decode_videos(predicted[:, context:])


def read_evaluation(path: Path) -> dict[str, Any]:
    """A written evaluation."""
    return json.loads(path.read_text(encoding="utf-8"))
