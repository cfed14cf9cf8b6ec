"""Quality of predictions: measures of frames and of sets beside two baselines, on the clips of a protocol."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pipelines.config import RiverConfig
from pipelines.evaluation.frechet import LatentDistances, Segments, VideoDistances
from pipelines.evaluation.intervals import Tally, draw_counts, summarize
from pipelines.evaluation.metrics import Metric, choose_best, gradient_energy, load_frame_metrics, measure_frames
from pipelines.evaluation.networks import I3D, VGG16, VGG_SETTING, VideoNetwork
from pipelines.evaluation.object_audit import ObjectAudit
from pipelines.evaluation.protocol import describe_protocol
from pipelines.evaluation.table import format_table
from pipelines.prediction.clips import Clip, open_clips
from pipelines.prediction.pictures import save_picture
from pipelines.predictor import VideoPredictor, load_predictor
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import write_json
from pipelines.runtime.progress import progress, say
from pipelines.runtime.results import BestOf, Evaluation, MetricValues
from stage1_autoencoder.videos.shapes import ShapesSource
from stage1_autoencoder.videos.source import Recording

I3D_SETTING = "evaluation.video_network"
SUBJECTS = ("prediction", "copy_last", "reconstruction")


def find_networks(config: RiverConfig, run_context: RunContext) -> tuple[Path | None, Path | None]:
    """The files of VGG16 and of the I3D, downloaded if that is allowed; None: not on this machine.

    Raises:
        UserError: a configured file that does not exist; a damaged one.
        FetchError: a download failed.
    """
    download = run_context.download
    vgg = VGG16.find(config.autoencoder.training.vgg_weights, VGG_SETTING, download=download)
    return vgg, I3D.find(config.evaluation.video_network, I3D_SETTING, download=download)


def evaluate(config: RiverConfig, run_context: RunContext, refine: bool = False) -> Evaluation:
    """Measure a trained run on the clips of the protocol; write `evaluation.json` and print the table.

    Of `shapes`, the shapes are measured, too, and `objects.png` shows the best and the worst clips.

    Clips are read and predicted one batch at a time, and not kept.

    Args:
        refine: measure refined predictions.
    Raises:
        UserError: no clips; a file of weights that is of another network.
    """
    evaluation = config.evaluation
    vgg, i3d = find_networks(config, run_context)
    predictor = load_predictor(config, run_context)
    clips = open_clips(config, run_context, evaluation.videos)
    metrics, missing = load_frame_metrics(config, run_context)
    distances = None
    try:
        segments = Segments.choose(evaluation)
    except ValueError as error:
        missing["fvd"] = str(error)
    else:
        if i3d is None:
            missing["fvd"] = f"no I3D network: set {I3D_SETTING} to its file, or download it with --download"
        else:
            distances = VideoDistances(VideoNetwork(i3d, run_context.device, I3D_SETTING), segments)
    latent_distances = LatentDistances(evaluation.context)
    audit = None
    if isinstance(clips.source, ShapesSource):
        try:
            audit = ObjectAudit(clips.source, evaluation.context)
        except ValueError as error:
            missing["objects"] = str(error)

    videos: list[int] = []
    recordings: list[Recording] = []
    parts = defaultdict(list)  # (metric, subject) -> [b, samples, horizon] of each batch
    with progress(total=len(clips) * evaluation.samples, description="evaluate", unit="prediction") as bar:
        for batch in clips.batches(evaluation.batch_size):
            videos += [clip.video for clip in batch]
            recordings += [clip.recording for clip in batch]
            measured = _measure_batch(
                config, predictor, batch, metrics, distances, latent_distances, audit, refine, bar.update
            )
            for key, values in measured.items():
                parts[key].append(torch.stack(values, dim=1))

    try:
        counts = draw_counts(recordings, evaluation.resamples, evaluation.seed)
    except ValueError as error:
        counts, missing["interval"] = None, str(error)
    values: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for (name, subject), tensors in parts.items():
        values[name][subject] = torch.cat(tensors)
    results = {metric.name: summarize_metric(metric, values[metric.name], counts) for metric in metrics}
    energy = {subject: of_samples.mean(1) for subject, of_samples in values["sharpness"].items()}
    results["sharpness"] = summarize({subject: Tally(energy[subject], energy["truth"]) for subject in SUBJECTS}, counts)
    for name, of_sets in {"fvd": distances, "latent_frechet": latent_distances}.items():
        if of_sets is not None:
            try:
                results[name] = of_sets.results(counts)
            except ValueError as error:
                missing[name] = str(error)
    protocol = describe_protocol(config, predictor, videos, recordings, missing, refine=refine, vgg=vgg, i3d=i3d)
    result = Evaluation(protocol=protocol, metrics=results, objects=audit and audit.results(counts))
    if audit is not None:
        save_picture(config.run_path / "objects.png", audit.picture())
    path = config.run_path / "evaluation.json"
    write_json(path, result)
    say("")
    say(format_table(result))
    say(f"\nevaluate: {path}")
    return result


def _measure_batch(
    config: RiverConfig,
    predictor: VideoPredictor,
    batch: list[Clip],
    metrics: list[Metric],
    distances: VideoDistances | None,
    latent_distances: LatentDistances,
    audit: ObjectAudit | None,
    refine: bool,
    on_predictions: Callable[[int], object],
) -> dict[tuple[str, str], list[Tensor]]:
    """(metric, subject) -> [clips, horizon] of each sample; `sharpness` stands for the gradient energy.

    Features are added to `distances` and `latent_distances`, shapes to `audit`.
    """
    context, horizon = config.evaluation.context, config.evaluation.horizon
    frames = torch.stack([clip.frames for clip in batch]).to(predictor.device)
    latents, to_final = predictor.encode_videos(frames), predictor.standardization.to_final
    autoencoded = predictor.decode_videos(latents)
    given, truth = frames[:, :context], frames[:, context:]
    values: dict[tuple[str, str], list[Tensor]] = defaultdict(list)

    def measure(subject: str, videos: Tensor, sample: int = 0) -> None:
        for metric in metrics:
            values[metric.name, subject].append(measure_frames(metric, videos, truth))
        values["sharpness", subject].append(gradient_energy(videos))
        if audit is not None:
            audit.add(subject, videos, sample)

    def copy_last(videos: Tensor) -> Tensor:
        return videos[:, -1:].expand(-1, horizon, -1, -1, -1)

    values["sharpness", "truth"].append(gradient_energy(truth))
    given_latents = latents[:, :context]
    latent_distances.add("truth", to_final(latents))
    latent_distances.add("copy_last", to_final(torch.cat([given_latents, copy_last(given_latents)], dim=1)))

    if audit is not None:
        audit.begin(batch)
    measure("copy_last", copy_last(given))
    measure("reconstruction", autoencoded[:, context:])
    given_by_set = {"real": given, "autoencoded": autoencoded[:, :context]}
    if distances is not None:
        distances.add("real", "truth", given, truth)
        distances.add("autoencoded", "truth", autoencoded[:, :context], autoencoded[:, context:])
        for against, start in given_by_set.items():
            distances.add(against, "copy_last", start, copy_last(start))
    for sample in range(config.evaluation.samples):
        keys = [(clip.key, sample) for clip in batch]
        predicted_latents = predictor.generate_latents(given_latents, horizon, keys=keys)
        latent_distances.add("prediction", to_final(predicted_latents), sample)
        predicted = predictor.decode_predictions(predicted_latents, given, refine=refine)
        measure("prediction", predicted, sample)
        if distances is not None:
            for against, start in given_by_set.items():
                distances.add(against, "prediction", start, predicted, sample)
        on_predictions(len(batch))
    return values


def summarize_metric(metric: Metric, values: dict[str, Tensor], counts: Tensor | None) -> MetricValues:
    """One metric of all subjects, see `summarize`, and its best-of-K.

    Args:
        values: by subject [clips, samples, horizon]; baselines have one sample.
        counts: [resamples, clips] of the bootstrap; None: no intervals.
    """
    found = summarize({subject: Tally.of_values(values[subject].double().mean(1)) for subject in SUBJECTS}, counts)
    samples = values["prediction"].shape[1]
    if samples == 1:
        return found
    chosen = choose_best(values["prediction"], metric.higher_is_better)
    best = summarize({"prediction": Tally.of_values(chosen)}, counts)
    assert best.per_frame is not None
    best_of = BestOf(
        samples=samples,
        value=best.prediction,
        per_frame=best.per_frame["prediction"],
        interval=(best.interval or {}).get("prediction"),
    )
    return found.model_copy(update={"best_of": best_of})
