"""Quality of predictions: PSNR, SSIM, LPIPS and FVD beside two baselines, measured on the clips of a protocol."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipelines.config import RiverConfig
from pipelines.evaluation.frechet import Segments, VideoDistances
from pipelines.evaluation.intervals import draw_counts, mean_interval
from pipelines.evaluation.metrics import PSNR, SSIM, Metric, choose_best, lpips_metric, measure_frames
from pipelines.evaluation.networks import I3D, VGG16, VGG_SETTING, VideoNetwork, load_lpips
from pipelines.evaluation.protocol import describe_protocol
from pipelines.evaluation.results import BestOf, Evaluation, MetricValues
from pipelines.evaluation.table import format_table
from pipelines.prediction.clips import Clip, ClipReader, open_clips
from pipelines.predictor import VideoPredictor, load_predictor
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import write_json
from pipelines.runtime.progress import progress, say
from stage1_autoencoder.lpips import SMALLEST_SIDE

I3D_SETTING = "evaluation.video_network"
SUBJECTS = ("prediction", "copy_last", "reconstruction")


@dataclass(frozen=True)
class NetworkFiles:
    """Files of the public networks; None: not on this machine."""

    vgg: Path | None
    i3d: Path | None

    @classmethod
    def find(cls, config: RiverConfig, run_context: RunContext) -> "NetworkFiles":
        """Find and, where allowed, download them. Call it before a training, which may take days.

        Raises:
            UserError: a configured file that does not exist; a damaged one.
            FetchError: a download failed.
        """
        download = run_context.download
        return cls(
            vgg=VGG16.find(config.autoencoder.training.vgg_weights, VGG_SETTING, download=download),
            i3d=I3D.find(config.evaluation.video_network, I3D_SETTING, download=download),
        )


@dataclass(frozen=True, eq=False)
class Metrics:
    """Metrics and networks in use.

    Attributes:
        frames: metrics of single frames.
        videos: the Fréchet video distance; None: not measured.
        missing: metric -> why it is not measured.
    """

    frames: list[Metric]
    videos: VideoDistances | None
    missing: dict[str, str]


def evaluate(
    config: RiverConfig, run_context: RunContext, refine: bool = False, files: NetworkFiles | None = None
) -> Evaluation:
    """Measure a trained run on the clips of the protocol; write `evaluation.json` and print the table.

    Args:
        refine: measure refined predictions.
        files: from `NetworkFiles.find`, called before a training; None: find them now.
    Raises:
        UserError: no clips; a file of weights that is of another network.
    """
    files = NetworkFiles.find(config, run_context) if files is None else files
    predictor = load_predictor(config, run_context)
    clips = open_clips(config, run_context, config.evaluation.videos)
    metrics = load_metrics(config, run_context, files)
    values, videos = measure(config, predictor, clips, metrics, refine)
    protocol = describe_protocol(
        config,
        predictor,
        videos,
        metrics.missing,
        refine=refine,
        vgg=files.vgg if "lpips" in values else None,
        distances=metrics.videos if "fvd" in values else None,
    )
    evaluation = Evaluation(protocol=protocol, metrics=values)
    path = config.run_path / "evaluation.json"
    write_json(path, evaluation)
    say("")
    say(format_table(evaluation))
    say(f"\nevaluate: {path}")
    return evaluation


def load_metrics(config: RiverConfig, run_context: RunContext, files: NetworkFiles) -> Metrics:
    """Load the networks that are available."""
    missing, frames, videos = {}, [PSNR, SSIM], None
    if config.dataset.image_size < SMALLEST_SIDE:
        missing["lpips"] = f"LPIPS needs images of {SMALLEST_SIDE} pixels a side, dataset.image_size is smaller"
    elif files.vgg is None:
        missing["lpips"] = f"no weights of VGG16: set {VGG_SETTING}, or download them with --download"
    else:
        lpips = load_lpips(files.vgg, run_context.device, download=False)
        assert lpips is not None
        frames.append(lpips_metric(lpips))
    try:
        segments = Segments.choose(config.evaluation)
    except ValueError as error:
        missing["fvd"] = str(error)
    else:
        if files.i3d is None:
            missing["fvd"] = f"no I3D network: set {I3D_SETTING} to its file, or download it with --download"
        else:
            videos = VideoDistances(VideoNetwork(files.i3d, run_context.device, I3D_SETTING), segments)
    return Metrics(frames, videos, missing)


def measure(
    config: RiverConfig, predictor: VideoPredictor, clips: ClipReader, metrics: Metrics, refine: bool = False
) -> tuple[dict[str, MetricValues], list[int]]:
    """All metrics of all subjects. Clips are read and predicted one batch at a time, and not kept.

    What cannot be measured on these clips is added to `metrics.missing`.

    Returns:
        The values by metric, and the video of each clip.
    """
    evaluation, videos = config.evaluation, []
    values: dict[str, dict[str, list[Tensor]]] = {metric.name: defaultdict(list) for metric in metrics.frames}
    with progress(total=len(clips) * evaluation.samples, description="evaluate", unit="prediction") as bar:
        for batch in clips.batches(evaluation.batch_size):
            videos += [clip.video for clip in batch]
            for name, subjects in _measure_batch(config, predictor, batch, metrics, refine, bar.update).items():
                for subject, numbers in subjects.items():
                    values[name][subject].append(numbers)
    counts = None
    if not evaluation.resamples:
        metrics.missing["interval"] = "evaluation.resamples is 0"
    elif len(set(videos)) < 2:
        metrics.missing["interval"] = "it needs clips of two videos or more, and there is one video"
    else:
        counts = draw_counts(videos, evaluation.resamples, evaluation.seed)
    measured = {
        metric.name: summarize(metric, {name: torch.cat(parts) for name, parts in values[metric.name].items()}, counts)
        for metric in metrics.frames
    }
    if metrics.videos is not None:
        try:
            measured["fvd"] = metrics.videos.results(counts, evaluation.samples)
        except ValueError as error:
            metrics.missing["fvd"] = str(error)
    return measured, videos


def _measure_batch(
    config: RiverConfig,
    predictor: VideoPredictor,
    batch: list[Clip],
    metrics: Metrics,
    refine: bool,
    on_predictions: Callable[[int], object],
) -> dict[str, dict[str, Tensor]]:
    """By metric and subject [clips, samples, horizon]; features are added to `metrics.videos`."""
    context, horizon = config.evaluation.context, config.evaluation.horizon
    frames = torch.stack([clip.frames for clip in batch]).to(predictor.device)
    given, truth = frames[:, :context], frames[:, context:]
    latents = predictor.encode_videos(frames)
    autoencoded = predictor.decode_videos(latents)
    values: dict[str, dict[str, list[Tensor]]] = {
        metric.name: {subject: [] for subject in SUBJECTS} for metric in metrics.frames
    }

    def measure_subject(subject: str, videos: Tensor) -> None:
        for metric in metrics.frames:
            values[metric.name][subject].append(measure_frames(metric, videos, truth))

    copies = given[:, -1:].expand(-1, horizon, -1, -1, -1)
    measure_subject("copy_last", copies)
    measure_subject("reconstruction", autoencoded[:, context:])
    distances = metrics.videos
    if distances is not None:
        distances.add("real", given, truth)
        distances.add("autoencoded", autoencoded[:, :context], autoencoded[:, context:])
        distances.add("copy_last", given, copies)
        last = autoencoded[:, context - 1 : context].expand(-1, horizon, -1, -1, -1)
        distances.add("copy_last_autoencoded", autoencoded[:, :context], last)
    for number in range(config.evaluation.samples):
        keys = [(clip.key, number) for clip in batch]
        predicted = predict_frames(predictor, latents[:, :context], given, horizon, keys, refine)
        measure_subject("prediction", predicted)
        if distances is not None:
            distances.add(f"prediction {number}", given, predicted)
            if distances.segments.context:
                distances.add(f"prediction_autoencoded {number}", autoencoded[:, :context], predicted)
        on_predictions(len(batch))
    return {
        name: {subject: torch.stack(samples, dim=1) for subject, samples in subjects.items()}
        for name, subjects in values.items()
    }


def predict_frames(
    predictor: VideoPredictor, latents: Tensor, given: Tensor, horizon: int, keys: list[tuple[int, int]], refine: bool
) -> Tensor:
    """Predict clips, and decode the predicted frames only.

    Args:
        latents: [b, context, c, h, w] raw latents of `given`.
        given: [b, context, 3, h, w] in [-1, 1]; the refiner needs the last one.
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


def summarize(metric: Metric, values: dict[str, Tensor], counts: Tensor | None) -> MetricValues:
    """One metric of all subjects: means over clips, samples and frames, curves over frames, intervals, best-of-K.

    Args:
        values: by subject [clips, samples, horizon]; baselines have one sample.
        counts: [resamples, clips] of the bootstrap; None: no intervals.
    """
    curves = {subject: values[subject].double().mean(1) for subject in SUBJECTS}
    samples = values["prediction"].shape[1]
    if samples > 1:
        curves["best_of"] = choose_best(values["prediction"].double(), metric.higher_is_better)
    per_frame = {subject: clips.mean(0).tolist() for subject, clips in curves.items()}
    # The mean of the listed numbers, so that a reader who averages them gets the same.
    means = {subject: sum(curve) / len(curve) for subject, curve in per_frame.items()}
    intervals, frame_intervals = None, None
    if counts is not None:
        ends = {  # [2, horizon + 1]: of each frame, then of the mean
            subject: mean_interval(torch.cat([clips, clips.mean(1, keepdim=True)], dim=1), counts)
            for subject, clips in curves.items()
        }
        intervals = {subject: tuple(both[:, -1].tolist()) for subject, both in ends.items()}
        frame_intervals = {subject: both[:, :-1].T.tolist() for subject, both in ends.items() if subject in SUBJECTS}
    best = None
    if samples > 1:
        best = BestOf(
            samples=samples,
            value=means.pop("best_of"),
            per_frame=per_frame.pop("best_of"),
            interval=None if intervals is None else intervals.pop("best_of"),
        )
    return MetricValues(
        **means, per_frame=per_frame, interval=intervals, per_frame_interval=frame_intervals, best_of=best
    )
