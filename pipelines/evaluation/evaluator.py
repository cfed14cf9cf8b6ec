"""Quality of predictions: measures of frames and of sets beside two baselines, on the clips of a protocol."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pipelines
from pipelines.config import RiverConfig
from pipelines.evaluation.clip_records import RecordFolder
from pipelines.evaluation.forecasts import RunForecast
from pipelines.evaluation.frechet import LatentDistances, Segments, VideoDistances
from pipelines.evaluation.intervals import draw_counts
from pipelines.evaluation.measures import ClipBatch, Forecast, Measure, Records
from pipelines.evaluation.metrics import FrameMeasure, SharpnessMeasure, load_frame_metrics
from pipelines.evaluation.networks import I3D, VGG16, VGG_SETTING, VideoNetwork
from pipelines.evaluation.object_audit import ObjectAudit
from pipelines.evaluation.protocol import describe_protocol
from pipelines.evaluation.table import format_table
from pipelines.loading import weights_digest
from pipelines.prediction.clips import ClipReader, open_clips
from pipelines.prediction.pictures import save_picture
from pipelines.predictor import VideoPredictor, load_predictor
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import file_sha256, write_json
from pipelines.runtime.progress import progress, say
from pipelines.runtime.results import Evaluation
from stage1_autoencoder.videos.shapes import ShapesSource

I3D_SETTING = "evaluation.video_network"


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

    Clips are read and predicted one batch at a time, and not kept. What was measured of them is, until all is done: an
    evaluation that was stopped goes on where it was.

    Args:
        refine: measure refined predictions.
    Raises:
        UserError: no clips; a file of weights that is of another network.
    """
    evaluation = config.evaluation
    networks = find_networks(config, run_context)
    predictor = load_predictor(config, run_context)
    clips = open_clips(config, run_context, evaluation.videos)
    measures, missing = choose_measures(config, run_context, clips, networks[1])
    forecast = RunForecast(predictor, evaluation.context, evaluation.samples, refine)
    about = _what_decides(config, predictor, clips, measures, networks, refine)
    folder = RecordFolder(config.run_path / "evaluation_records", about)
    records = measure_clips(clips, forecast, measures, _clips_at_once(config), evaluation.samples, folder)

    videos = (records["clip"]["key"] & 0xFFFFFFFF).tolist()
    recordings = [clips.source.recording(video) for video in videos]
    try:
        counts = draw_counts(recordings, evaluation.resamples, evaluation.seed)
    except ValueError as error:
        counts, missing["interval"] = None, str(error)
    parts: dict[str, dict[str, Any]] = defaultdict(dict)
    for measure in measures:
        try:
            parts[measure.part] |= measure.results(records[measure.name], counts)
        except ValueError as error:
            missing[measure.name] = str(error)
    vgg, i3d = networks
    protocol = describe_protocol(config, predictor, videos, recordings, missing, refine=refine, vgg=vgg, i3d=i3d)
    result = Evaluation(protocol=protocol, **parts)

    def predict_again(numbers: Sequence[int]) -> ClipBatch:
        return forecast(clips.read(records["clip"]["number"][list(numbers)].tolist()))

    for measure in measures:
        for name, picture in measure.pictures(records[measure.name], predict_again).items():
            save_picture(config.run_path / name, picture)
    path = config.run_path / "evaluation.json"
    write_json(path, result)
    folder.remove()
    say("")
    say(format_table(result))
    say(f"\nevaluate: {path}")
    return result


def choose_measures(
    config: RiverConfig, run_context: RunContext, clips: ClipReader, i3d: Path | None
) -> tuple[list[Measure], dict[str, str]]:
    """Everything that can be measured of these clips; measure -> reason of what cannot.

    Raises:
        UserError, FetchError: of a network's file.
    """
    metrics, missing = load_frame_metrics(config, run_context)
    measures = [*(FrameMeasure(metric) for metric in metrics), SharpnessMeasure(), LatentDistances()]
    try:
        segments = Segments.choose(config.evaluation)
    except ValueError as error:
        missing["fvd"] = str(error)
    else:
        if i3d is None:
            missing["fvd"] = f"no I3D network: set {I3D_SETTING} to its file, or download it with --download"
        else:
            measures.append(VideoDistances(VideoNetwork(i3d, run_context.device, I3D_SETTING), segments))
    if isinstance(clips.source, ShapesSource):
        try:
            measures.append(ObjectAudit(clips.source))
        except ValueError as error:
            missing["objects"] = str(error)
    return measures, missing


def measure_clips(
    clips: ClipReader,
    forecast: Forecast,
    measures: Sequence[Measure],
    size: int,
    samples: int,
    folder: RecordFolder,
) -> dict[str, Records]:
    """Measure all clips, one batch at a time; batches that are in the folder are not measured again.

    Args:
        size: clips of a batch.
        samples: predictions per clip.
        folder: gets the records of each batch.
    Returns:
        Measure -> records of all clips; and `clip`: `key` [clips] and `number` [clips] among those of the reader.
    Raises:
        UserError: no video can be decoded.
    """
    parts: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    with progress(total=len(clips) * samples, description="evaluate", unit="prediction") as bar:
        for batch, first in enumerate(range(0, len(clips), size)):
            numbers = range(first, min(first + size, len(clips)))
            records = folder.read(batch)
            if records is None:
                records = _measure_batch(clips, numbers, forecast, measures)
                if len(records.get("clip/number", [])) == len(numbers):  # broken videos are reported each time
                    folder.write(batch, records)
            for name, tensor in records.items():
                measure, _, record = name.partition("/")
                parts[measure][record].append(tensor)
            bar.update(len(numbers) * samples)
    if not parts:
        raise clips.nothing_found()
    return {
        measure: {record: torch.cat(tensors) for record, tensors in records.items()}
        for measure, records in parts.items()
    }


def _measure_batch(
    clips: ClipReader, numbers: Sequence[int], forecast: Forecast, measures: Sequence[Measure]
) -> Records:
    """`<measure>/<record>` -> [clips, ...]; nothing if no video of the batch can be decoded."""
    read = {number: clip for number in numbers for clip in clips.read([number])}
    if not read:
        return {}
    keys = torch.tensor([clip.key for clip in read.values()])
    records = {"clip/number": torch.tensor([*read]), "clip/key": keys}
    batch = forecast([*read.values()])
    for measure in measures:
        records |= {f"{measure.name}/{record}": tensor for record, tensor in measure.measure(batch).items()}
    return records


def _clips_at_once(config: RiverConfig) -> int:
    """Clips of a batch: `evaluation.batch_size` predictions, or all predictions of one clip."""
    return max(1, config.evaluation.batch_size // config.evaluation.samples)


def _what_decides(
    config: RiverConfig,
    predictor: VideoPredictor,
    clips: ClipReader,
    measures: Sequence[Measure],
    networks: Sequence[Path | None],
    refine: bool,
) -> dict[str, Any]:
    """Everything that the records of the clips depend on."""
    chosen = {window.video for window in clips.windows}
    return {
        "version": pipelines.__version__,
        "dataset": config.dataset.model_dump(mode="json"),
        "evaluation": config.evaluation.model_dump(mode="json", exclude={"resamples"}),
        "clips": [(window.video, window.start) for window in clips.windows],
        "videos": [clips.source.videos[video].fingerprint for video in sorted(chosen)],
        "sampling": predictor.sampling.model_dump(mode="json", exclude={"batch_size", "compile", "cuda_graphs"}),
        "weights": [weights_digest(module) for module in (predictor.autoencoder, predictor.vector_field)],
        "refiner": weights_digest(predictor.check_refiner()) if refine else None,
        "networks": [path and file_sha256(path) for path in networks],
        "measures": [measure.name for measure in measures],
        "device": str(predictor.device),
    }
