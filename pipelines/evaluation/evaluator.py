"""Quality of predictions: measures of frames and of sets beside baselines, on the clips of a protocol."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

import pipelines
from pipelines.config import RiverConfig
from pipelines.evaluation.baselines import choose_baselines
from pipelines.evaluation.clip_records import RECORDS_NAME, RecordFolder
from pipelines.evaluation.forecasts import FileForecast, Forecast, RunCoding, RunForecast
from pipelines.evaluation.measures.feature_cache import FeatureCache, feature_file
from pipelines.evaluation.measures.frechet import LatentDistances, Segments, VideoDistances
from pipelines.evaluation.measures.intervals import draw_counts
from pipelines.evaluation.measures.measure import NO_AUTOENCODER, ClipBatch, Measure, Records
from pipelines.evaluation.measures.metrics import (
    PSNR,
    SSIM,
    SSIM_8BIT,
    FrameMeasure,
    PooledErrorMeasure,
    SharpnessMeasure,
    load_frame_metrics,
)
from pipelines.evaluation.measures.networks import (
    I3D,
    NO_ST_LPIPS,
    VGG16,
    VGG_SETTING,
    VideoNetwork,
    find_st_lpips,
    load_st_lpips,
)
from pipelines.evaluation.measures.object_audit import ObjectAudit
from pipelines.evaluation.measures.perception import FeatureDistances, FeatureReader, PerceptualMeasure
from pipelines.evaluation.measures.sample_scores import sample_scores
from pipelines.evaluation.measures.silhouette_audit import SilhouetteAudit
from pipelines.evaluation.prediction_files import PredictionFiles
from pipelines.evaluation.protocol import describe_protocol
from pipelines.evaluation.table import format_table
from pipelines.loading import weights_digest
from pipelines.prediction.clips import Clip, ClipReader, open_clips
from pipelines.prediction.frame_coding import FrameCoding
from pipelines.prediction.pictures import file_name, save_picture
from pipelines.predictor import load_predictor
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import file_sha256, write_json
from pipelines.runtime.progress import progress, say
from pipelines.runtime.results import Evaluation
from stage1_autoencoder.st_lpips import STLPIPS
from stage1_autoencoder.videos.shapes import ShapesSource

Predict = Callable[[Sequence[Clip]], ClipBatch]

I3D_SETTING = "evaluation.video_network"


def find_networks(config: RiverConfig, run_context: RunContext) -> tuple[Path | None, Path | None, Path | None]:
    """The files of VGG16 and of the I3D, downloaded if that is allowed, and of ST-LPIPS; None: not on this machine.

    Raises:
        UserError: a configured file that does not exist; a damaged one.
        FetchError: a download failed.
    """
    download = run_context.download
    vgg = VGG16.find(config.autoencoder.training.vgg_weights, VGG_SETTING, download=download)
    return vgg, I3D.find(config.evaluation.video_network, I3D_SETTING, download=download), find_st_lpips()


def evaluate(
    config: RiverConfig, run_context: RunContext, refine: bool = False, name: str = "evaluation.json"
) -> Evaluation:
    """Measure a trained run on the clips of the protocol; write the result and print the table.

    Of `shapes`, the shapes are measured, too, and `objects.png` shows the best and the worst clips.

    Args:
        refine: measure refined predictions.
        name: of the result in the run's folder.
    Raises:
        UserError: no clips; a file of weights that is of another network.
    """
    predictor = load_predictor(config, run_context)
    forecast = RunForecast(config.run_path, predictor, config.evaluation, predictor, refine)
    return Evaluator(config, run_context, predictor).evaluate(forecast, config.run_path / name)


def evaluate_files(config: RiverConfig, run_context: RunContext, path: Path, black: int | None) -> Evaluation:
    """Measure the predictions of any other predictor on the clips of the protocol, and print the table.

    The result is `evaluation_of_<path>.json` in the run's folder. No trained network is needed: what needs an
    autoencoder is measured with that of the run, or left out.

    Args:
        path, black: as `PredictionFiles`.
    Raises:
        UserError, VideoError: as `PredictionFiles`, and as `evaluate`.
    """
    coding, missing = find_coding(config, run_context.device)
    evaluator = Evaluator(config, run_context, coding, missing)
    files = PredictionFiles(config, evaluator.clips, path, black)
    forecast = FileForecast(files, config.evaluation, coding, run_context.device)
    return evaluator.evaluate(forecast, config.run_path / f"evaluation_of_{file_name(str(path))}.json")


def find_coding(config: RiverConfig, device: torch.device) -> tuple[FrameCoding | None, dict[str, str]]:
    """The autoencoder of a run; if there is none, what cannot be measured -> reason."""
    try:
        return RunCoding(config, device), {}
    except LookupError as error:
        return None, {"reconstruction": str(error)}


@dataclass(frozen=True, eq=False)
class Measured:
    """A forecast that was measured.

    Attributes:
        records: measure -> records of all clips; `clip` has their keys and numbers.
        evaluation: the result.
        folder: of the records.
    """

    records: dict[str, Records]
    evaluation: Evaluation
    folder: RecordFolder


class Evaluator:
    """Measures forecasts on the clips of the protocol.

    Clips are read and predicted one batch at a time, and not kept. What was measured of them is, until all is done: an
    evaluation that was stopped goes on where it was.

    Attributes:
        clips: of the protocol.
        baselines: beside those that every forecast has.
        measures: of what can be measured of them.
    """

    def __init__(
        self,
        config: RiverConfig,
        run_context: RunContext,
        coding: FrameCoding | None,
        missing: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Choose clips and measures.

        Args:
            coding: the autoencoder of reconstructions and latents; None: there is none.
            missing: what cannot be measured -> reason.
        Raises:
            UserError: no clips; a file of weights that is of another network.
        """
        self._config, self._device, self._coding = config, run_context.device, coding
        self._networks = find_networks(config, run_context)
        self.clips = open_clips(config, run_context, config.evaluation.videos)
        self.measures, self._missing = choose_measures(config, run_context, self.clips, *self._networks[1:])
        self._missing |= missing
        if coding is None:
            left_out = [measure for measure in self.measures if measure.needs_autoencoder]
            self._missing |= {measure.name: NO_AUTOENCODER for measure in left_out}
            self.measures = [measure for measure in self.measures if measure not in left_out]
        self.baselines, of_training, without = choose_baselines(config, coding)
        self.measures += of_training
        self._missing |= without

    def evaluate(self, forecast: Forecast, path: Path) -> Evaluation:
        """Measure a forecast, write the result to `path` and pictures beside it, print the table."""
        measured = self.measure(forecast, self._config.run_path / RECORDS_NAME)
        numbers = measured.records["clip"]["number"]

        def predict_again(chosen: Sequence[int]) -> ClipBatch:
            return self._predict(forecast, self.clips.read(numbers[list(chosen)].tolist()))

        for measure in self.measures:
            for name, picture in measure.pictures(measured.records[measure.name], predict_again).items():
                ending = path.stem.removeprefix("evaluation")
                save_picture(path.with_name(f"{Path(name).stem}{ending}{Path(name).suffix}"), picture)
        write_json(path, measured.evaluation)
        measured.folder.remove()
        say("")
        say(format_table(measured.evaluation))
        say(f"\nevaluate: {path}")
        return measured.evaluation

    def measure(self, forecast: Forecast, folder: Path) -> Measured:
        """Measure a forecast.

        Args:
            folder: for the records, until they are removed.
        Raises:
            UserError: no video can be decoded.
        """
        evaluation, clips = self._config.evaluation, self.clips
        record_folder = RecordFolder(folder, self._what_decides(forecast))
        size = max(1, evaluation.batch_size // forecast.samples)  # as many predictions, or all of one clip
        predict = functools.partial(self._predict, forecast)
        records = measure_clips(clips, predict, self.measures, size, forecast.samples, record_folder)

        missing, videos = dict(self._missing), (records["clip"]["key"] & 0xFFFFFFFF).tolist()
        recordings = [clips.source.recording(video) for video in videos]
        try:
            counts = draw_counts(recordings, evaluation.resamples, evaluation.seed)
        except ValueError as error:
            counts, missing["interval"] = None, str(error)
        parts: dict[str, dict[str, Any]] = defaultdict(dict)
        for measure in self.measures:
            try:
                results = measure.results(records[measure.name], counts)
            except ValueError as error:
                missing[measure.name] = str(error)
            else:
                parts[measure.part] |= results
        vgg, i3d, st_lpips = self._networks
        protocol = describe_protocol(
            self._config,
            forecast,
            videos,
            recordings,
            missing,
            split_videos=len(clips.source.videos),
            vgg=vgg,
            i3d=i3d,
            st_lpips=st_lpips,
        )
        psnr = {subject: values.double().mean((1, 2)) for subject, values in records[PSNR.name].items()}
        gains = (psnr["prediction"] - psnr["copy_last"]).tolist()
        names = map(clips.name, records["clip"]["key"].tolist())
        result = Evaluation(protocol=protocol, **parts, clips=dict(zip(names, gains, strict=True)))
        return Measured(records, result, record_folder)

    def _predict(self, forecast: Forecast, clips: Sequence[Clip]) -> ClipBatch:
        return self.baselines.add(forecast(clips))

    def _what_decides(self, forecast: Forecast) -> dict[str, Any]:
        """Everything that the records of the clips depend on."""
        config, windows, source = self._config, self.clips.windows, self.clips.source
        description = forecast.description.model_dump(mode="json")
        for name in ("batch_size", "compile", "cuda_graphs"):
            description.get("sampling", {}).pop(name, None)
        return {
            "version": pipelines.__version__,
            "dataset": config.dataset.model_dump(mode="json"),
            "evaluation": config.evaluation.model_dump(mode="json", exclude={"resamples"}),
            "clips": [astuple(window) for window in windows],
            "videos": [source.videos[video].fingerprint for video in sorted({window.video for window in windows})],
            "predictor": description,
            "autoencoder": self._coding and weights_digest(self._coding.autoencoder),
            "networks": [path and file_sha256(path) for path in self._networks],
            "training_clips": self.baselines.training and self.baselines.training.cache.fingerprint,
            "measures": [measure.name for measure in self.measures],
            "device": str(self._device),
        }


def choose_measures(
    config: RiverConfig, run_context: RunContext, clips: ClipReader, i3d: Path | None, st_lpips: Path | None
) -> tuple[list[Measure], dict[str, str]]:
    """Everything that can be measured of these clips; measure -> reason of what cannot.

    Raises:
        UserError, FetchError: of a network's file.
    """
    metrics, missing = load_frame_metrics(config, run_context)
    measures = [*(FrameMeasure(metric) for metric in metrics), SharpnessMeasure(), *sample_scores(), LatentDistances()]
    if st_lpips is None:
        missing["st_lpips"] = NO_ST_LPIPS
    elif min(config.dataset.frame_size) < STLPIPS.smallest_side:
        missing["st_lpips"] = f"it needs images of {STLPIPS.smallest_side} pixels a side (dataset.image_size)"
    else:
        reader = FeatureReader(load_st_lpips(st_lpips, run_context.device))
        measures += [PerceptualMeasure(reader), FeatureDistances(reader, "frame"), FeatureDistances(reader, "motion")]
    if "psnr_of_mean_mse" in config.evaluation.pitfalls:
        measures.append(PooledErrorMeasure())
    if "ssim_8bit" in config.evaluation.pitfalls and SSIM in metrics:
        measures.append(FrameMeasure(SSIM_8BIT))
    try:
        segments = Segments.choose(config.evaluation)
    except ValueError as error:
        missing["fvd"] = str(error)
    else:
        if i3d is None:
            missing["fvd"] = f"no I3D network: set {I3D_SETTING} to its file, or download it with --download"
        else:
            network = VideoNetwork(i3d, run_context.device, I3D_SETTING)
            cache = FeatureCache(feature_file(config.store_path))
            measures.append(VideoDistances(network, segments, cache, config.evaluation.pitfalls))
    if isinstance(clips.source, ShapesSource):
        try:
            measures.append(ObjectAudit(clips.source))
        except ValueError as error:
            missing["objects"] = str(error)
    else:
        measures.append(SilhouetteAudit())
    return measures, missing


def measure_clips(
    clips: ClipReader,
    predict: Predict,
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
    batches = [range(first, min(first + size, len(clips))) for first in range(0, len(clips), size)]
    known = {number: records for number in range(len(batches)) if (records := folder.read(number)) is not None}
    if known:
        say(f"evaluate: {sum(len(batches[number]) for number in known)} of {len(clips)} clips were measured before")
    coming = _reading_ahead(clips, [numbers for batch, numbers in enumerate(batches) if batch not in known])
    with progress(total=len(clips) * samples, description="evaluate", unit="prediction") as bar, closing(coming):
        for batch, numbers in enumerate(batches):
            records = known.pop(batch, None)
            if records is None:
                records = _measure_batch(next(coming), predict, measures)
                if len(records.get("clip/number", [])) == len(numbers):  # broken videos are reported each time
                    folder.write(batch, records)
            for name, tensor in records.items():
                measure, _, record = name.partition("/")
                parts[measure][record].append(tensor)
            bar.update(len(numbers) * samples)
    if not parts:
        raise clips.nothing_found()
    return {
        # In this order whether a batch was just measured or comes from its file, so that results are equal to the byte.
        measure: {record: torch.cat(tensors) for record, tensors in sorted(records.items())}
        for measure, records in parts.items()
    }


def _reading_ahead(clips: ClipReader, batches: Sequence[range]) -> Iterator[dict[int, Clip]]:
    """The clips of each batch by number; while one is measured, the next one is read."""

    def read(numbers: range) -> dict[int, Clip]:
        return {number: clip for number in numbers for clip in clips.read([number])}

    if not batches:
        return
    with ThreadPoolExecutor(1, "clips") as pool:
        coming = pool.submit(read, batches[0])
        for following in batches[1:]:
            now, coming = coming.result(), pool.submit(read, following)
            yield now
        yield coming.result()


def _measure_batch(read: Mapping[int, Clip], predict: Predict, measures: Sequence[Measure]) -> Records:
    """`<measure>/<record>` -> [clips, ...] of clips by number; nothing if there are none."""
    if not read:
        return {}
    keys = torch.tensor([clip.key for clip in read.values()])
    records = {"clip/number": torch.tensor([*read]), "clip/key": keys}
    batch = predict([*read.values()])
    for measure in measures:
        records |= {f"{measure.name}/{record}": tensor for record, tensor in measure.measure(batch).items()}
    return records
