"""Several predictors on the same clips: their evaluations, and paired differences with intervals."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.evaluation.clip_records import RECORDS_NAME
from pipelines.evaluation.evaluator import Evaluator, find_coding
from pipelines.evaluation.forecasts import FileForecast, Forecast, RunForecast
from pipelines.evaluation.measures.intervals import half_width, percentile_interval
from pipelines.evaluation.prediction_files import PredictionFiles
from pipelines.evaluation.table import format_comparison
from pipelines.predictor import VideoPredictor, load_predictor
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import write_json
from pipelines.runtime.progress import say
from pipelines.runtime.results import SUBJECTS, Comparison, Difference, Evaluation, MetricValues

# Stands for the run of the configuration.
RUN = "run"
BASELINES = SUBJECTS.keys() - {"prediction"}


def compare(
    config: RiverConfig, run_context: RunContext, names: Sequence[str], black: int | None, refine: bool = False
) -> Comparison:
    """Measure several predictors on the clips of the protocol; write `comparison.json` and print a table.

    Latents, of runs too, are those of the predicted frames in the autoencoder of the configuration's run.

    Args:
        names: `run`, folders of runs, and predictions as `PredictionFiles` takes them; differences are taken to the
            first.
        black: as `PredictionFiles`.
        refine: measure refined predictions of runs.
    Raises:
        UserError, VideoError: as `evaluate` and `PredictionFiles`; a name that is there twice, or is a baseline's.
    """
    if len({*names} - BASELINES) < len(names):
        raise UserError(
            f"--compare {' '.join(names)}: each predictor can be there once, and baselines are always there; a folder "
            f"that is called as one is ./{min(BASELINES)}"
        )
    evaluation = config.evaluation
    coding, missing = find_coding(config, run_context.device)
    evaluator = Evaluator(config, run_context, coding, missing)
    forecasts: dict[str, Forecast] = {}
    for name in names:  # all are checked before the first is measured
        path = config.run_path if name == RUN else Path(name).expanduser()
        if name == RUN:
            predictor = load_predictor(config, run_context)
        elif (path / "flow" / "checkpoints").is_dir():
            predictor = VideoPredictor.from_run(path, run_context.device)
        else:
            files = PredictionFiles(config, evaluator.clips, path, black)
            forecasts[name] = FileForecast(files, evaluation, coding, run_context.device)
            continue
        forecasts[name] = RunForecast(path, predictor, evaluation, coding, refine)
    folder, evaluations = config.run_path / RECORDS_NAME, {}
    for number, (name, forecast) in enumerate(forecasts.items(), start=1):
        say(f"{name} ({number} of {len(forecasts)})")
        evaluations[name] = evaluator.measure(forecast, folder / str(number)).evaluation
    differences = {part: found for part in Evaluation.model_fields if (found := _differences(evaluations, part))}
    comparison = Comparison(evaluations=evaluations, reference=names[0], differences=differences)
    path = config.run_path / "comparison.json"
    write_json(path, comparison)
    shutil.rmtree(folder, ignore_errors=True)
    say("")
    say(format_comparison(comparison))
    say(f"\nevaluate: {path}")
    return comparison


def _differences(evaluations: Mapping[str, Evaluation], part: str) -> dict[str, dict[str, Difference]]:
    """Metric -> predictor, or baseline -> difference to the first predictor; nothing for parts without metrics."""
    parts = [(name, getattr(evaluation, part)) for name, evaluation in evaluations.items()]
    (_, first), *others = [(name, values if isinstance(values, dict) else {}) for name, values in parts]
    found: dict[str, dict[str, Difference]] = {}
    for metric, reference in first.items():
        if not isinstance(reference, MetricValues):
            continue
        found[metric] = {
            name: _difference(own[metric], "prediction", reference) for name, own in others if metric in own
        }
        baselines = [subject for subject in BASELINES if getattr(reference, subject) is not None]
        found[metric] |= {subject: _difference(reference, subject, reference) for subject in baselines}
    return found


def _difference(values: MetricValues, subject: str, reference: MetricValues) -> Difference:
    """What a subject has more than the prediction of the reference."""
    value = getattr(values, subject) - reference.prediction
    if values.resampled is None or reference.resampled is None:
        return Difference(value=value)
    resampled = np.subtract(values.resampled[subject], reference.resampled["prediction"])
    if values.per_frame is None:  # of sets, see `normal_interval`
        half = half_width(resampled)
        return Difference(value=value, interval=(value - half, value + half))
    low, high = percentile_interval(torch.from_numpy(resampled)).tolist()
    return Difference(value=value, interval=(low, high))
