"""The sampler of a trained run: solvers and numbers of evaluations are compared, by `study` or after a training.

One is chosen for predictions. It is measured on the validation split, since the test split must not decide.
"""

import itertools
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.evaluation.measures.frechet import LATENT_DEFINITION
from pipelines.evaluation.measures.intervals import draw_counts
from pipelines.evaluation.measures.metrics import PSNR, SHARPNESS_DEFINITION, Metric, load_frame_metrics
from pipelines.evaluation.measures.object_audit import check_shapes, true_shapes
from pipelines.evaluation.protocol import common_protocol
from pipelines.evaluation.study.sampler_choice import choose, score_points
from pipelines.evaluation.study.study_points import StudyClips, point_key
from pipelines.evaluation.study.study_table import format_study, plot_study
from pipelines.loading import find_autoencoder, find_flow, flow_digest, weights_digest
from pipelines.prediction.clips import Clip, ClipReader, open_clips
from pipelines.predictor import load_predictor
from pipelines.runtime.context import RunContext, sampling_precision
from pipelines.runtime.files import read_json, write_json
from pipelines.runtime.logs import read_log
from pipelines.runtime.progress import duration, progress, say, warn
from pipelines.runtime.results import Study, StudyPoint, StudyProtocol
from pipelines.runtime.run_folder import is_imported, is_student
from pipelines.runtime.status import Status
from stage1_autoencoder.videos.shapes import ShapesSource
from stage1_autoencoder.videos.source import VideoError
from stage2_flow.config import SAMPLER_KEYS, SamplingConfig
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.solvers import SOLVERS

EVALUATIONS = (1, 2, 4, 8, 16, 32, 64, 128)
FEW_EVALUATIONS = (1, 2, 4, 8)
# Enough that the error of Euler steps does not matter.
MANY_EVALUATIONS = 32
WARM_STARTS = (0.1, 0.3, 0.5)
# Further seeds, which show how much a metric varies with the random draws only.
OTHER_SEEDS = 2
# Of the bootstrap.
RESAMPLES = 2000
# Of the choice after a training. The first one is the default.
FEW_SETTINGS = (
    ("midpoint", 8), ("euler", 2), ("euler", 4), ("euler", 8), ("euler", 16), ("midpoint", 4), ("midpoint", 16)
)  # fmt: skip
CLIPS, LEAST_CLIPS = 24, 8
# The time it takes: seconds, or as a share of the training's time.
SECONDS, SHARE_OF_TRAINING = 60.0, 0.1
NOT_NEEDED = "the choice does not depend on it; `study` measures it"


def study_config(config: RiverConfig) -> RiverConfig:
    """The configuration with the protocol's clips taken from the validation split, whatever `evaluate` takes."""
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"split": "val"})})


def open_study_clips(config: RiverConfig, run_context: RunContext, wanted: int) -> ClipReader:
    """The clips that are predicted, of the validation split.

    Raises:
        UserError: fewer than two, or no validation videos.
    """
    try:
        clips = open_clips(study_config(config), run_context, wanted)
    except VideoError as error:
        raise UserError(
            f"settings are compared on the validation split, and the test split decides nothing: {error}"
        ) from None
    if len(clips) < 2:
        raise UserError(
            f"sets of clips are compared, and {len(clips)} clip of the validation split is no set: take two or more "
            "(`study --videos`), or add videos to it"
        )
    return clips


def study(
    config: RiverConfig, run_context: RunContext, clips: ClipReader, most_evaluations: int | None = None
) -> Study:
    """Predict clips with all of `sampler_settings`, compare the predictions, and choose the sampler of the run.

    Writes `quality.json` after each setting, and `quality.png` at the end, to the run's folder. Settings that an
    earlier call measured with the same weights, clips and reference are not measured again.

    Args:
        clips: of `open_study_clips`.
        most_evaluations: per predicted frame; settings with more are left out, and rk4-38 with that many (a multiple of
            four) replaces the paper's 396.
    Raises:
        UserError: fewer than two clips can be decoded.
    """
    metrics, missing = load_frame_metrics(config, run_context)
    comparison = Comparison(config, run_context, clips, metrics, missing)
    protocol, measured = comparison.open_clips(comparison.clips)
    for what, reason in protocol.missing.items():
        say(f"study: continuing without {what}: {reason}")
    flow = find_flow(config.run_path)
    if flow is not None and is_student(flow):
        settings = student_settings(comparison.sampling, flow.state["sampler"])
    else:
        settings = sampler_settings(comparison.sampling, most_evaluations)
    path = config.run_path / "quality.json"
    known = _known_points(path, protocol, point_key(settings[0]))
    resumed = sum(point_key(options) in known for options in settings)
    say(
        f"study: {protocol.split} split: {len(protocol.clips)} clips of {protocol.describe_recordings()}, "
        f"{protocol.context} frames given, "
        f"{protocol.horizon} predicted, "
        f"{len(settings)} sampler settings" + (f", {resumed} of them measured before" if resumed else "")
    )
    points: list[StudyPoint] = []
    with progress(total=sum(map(evaluations, settings)), description="study", unit="NFE") as bar:
        for options in settings:
            point = known.get(point_key(options)) or measured.measure(options, points[0] if points else None)
            points.append(point)
            write_json(path, Study(protocol=protocol, points=points, reference=0, chosen=None))
            bar.update(point.nfe)
    result = _decide(protocol, points)
    write_json(path, result)
    plot_study(result, config.run_path / "quality.png")
    say("")
    say(format_study(result))
    if not config.sampling.leaves_sampler_open and not is_student(flow):
        say(f"  Not used as long as `sampling` sets {SamplingPlan.from_config(config.sampling).describe()}.")
    say(f"\nstudy: {path} and quality.png")
    return result


def sampler_status(config: RiverConfig) -> Status:
    """Which sampler predictions use, and whether one is still to be chosen for the flow's weights."""
    path, default = config.run_path / "quality.json", SamplingPlan.from_config(config.sampling).describe()
    if not config.sampling.leaves_sampler_open:
        return Status("done", f"{default}, as `sampling` sets it", path)
    flow = find_flow(config.run_path)
    if flow is None:
        return Status("missing", "is chosen when the flow is trained", path)
    found = None
    with suppress(UserError):  # missing, or damaged, which loading reports
        read = read_json(path, Study, "")
        found = read if read.protocol.flow_sha256 == flow_digest(flow, config.sampling.weights) else None
    if found is None:
        if is_imported(flow):
            return Status("done", f"{default}, the default: for imported weights, `study` chooses", path)
        return Status("missing", f"{default}, the default, until one is chosen", path)
    if found.choice is None:
        return Status("done", f"{default}, the default: {path} has no choice, `study` makes it", path)
    sampler = f"{found.choice.describe()}, {found.choice.nfe} evaluations per frame"
    return Status("done", f"{sampler}, chosen on {len(found.protocol.clips)} clips", path)


def choose_sampler(config: RiverConfig, run_context: RunContext) -> None:
    """Choose the sampler of a trained flow from `few_settings` within a minute, and write `quality.json`.

    Nothing is measured where the sampler is known, see `sampler_status`, and in other processes than the first. Where
    none can be chosen, a line says why: the training before it is as good as ever.
    """
    if run_context.processes.is_first:
        _choose_if_possible(config, run_context)
    run_context.processes.wait()


def _choose_if_possible(config: RiverConfig, run_context: RunContext) -> None:
    status = sampler_status(config)
    if status.is_done:
        say(f"sampler: {status.detail}")
        return
    # Broken videos are no failure of the command that trained or that predicts other ones.
    run_context = replace(run_context, strict=False, skipped={})
    without = f"sampler: none is chosen ({status.detail}):"
    if find_autoencoder(config.shared.run_path) is None:
        say(f"{without} {config.training_folder('autoencoder')} has no checkpoint")
        return
    try:
        clips = open_study_clips(config, run_context, CLIPS)
    except UserError as error:
        say(f"{without} {error}")
        return
    try:
        _choose_in_time(config, run_context, clips)
    except (UserError, VideoError) as error:
        warn(f"{without} {str(error).partition(chr(10))[0]}")


def _choose_in_time(config: RiverConfig, run_context: RunContext, clips: ClipReader) -> None:
    """Measure the default, and of the other settings as many as there is time for, those with few evaluations first."""
    started, seconds = time.perf_counter(), _seconds_to_choose(config)
    comparison = Comparison(config, run_context, clips, [PSNR], {"ssim": NOT_NEEDED, "lpips": NOT_NEEDED})
    settings = few_settings(comparison.sampling)
    few = evenly(comparison.clips, LEAST_CLIPS)
    protocol, measured = comparison.open_clips(few)
    begun = time.perf_counter()
    reference = measured.measure(settings[0], None)
    whole = time.perf_counter() - begun
    predicting = reference.milliseconds_per_frame / 1000 * len(few) * protocol.horizon

    def cost(options: SamplingConfig) -> float:
        """Seconds for one clip: all but the prediction takes the same time for any number of evaluations."""
        return (whole - predicting + predicting * evaluations(options) / reference.nfe) / len(few)

    def left() -> float:
        return seconds - (time.perf_counter() - started)

    cheap = sum(cost(options) for options in settings if evaluations(options) <= reference.nfe)
    count = min(len(comparison.clips), int(left() / cheap))
    if count > len(few):
        protocol, measured = comparison.open_clips(evenly(comparison.clips, count))
        reference = measured.measure(settings[0], None)
    others = sorted(settings[1:], key=evaluations)
    ends = itertools.accumulate(cost(options) * len(protocol.clips) for options in others)
    now = left()
    fitting = [options for options, end in zip(others, ends, strict=True) if end <= now]
    if out := others[len(fitting) :]:
        names = "; ".join(SamplingPlan.from_config(options).describe() for options in out)
        say(f"sampler: not compared, since it would take longer than {duration(seconds)}: {names}")
    points = [reference]
    with progress(total=sum(map(evaluations, fitting)), description="sampler", unit="NFE") as bar:
        for options in fitting:
            points.append(measured.measure(options, reference))
            bar.update(points[-1].nfe)
    result = _decide(protocol, points)
    path = config.run_path / "quality.json"
    write_json(path, result)
    path.with_suffix(".png").unlink(missing_ok=True)  # of the study that was there before
    say(f"sampler: {sampler_status(config).detail}, from {len(points)} settings: {path}")


def _seconds_to_choose(config: RiverConfig) -> float:
    """A minute, or a share of the time that the flow's training took, if that is longer."""
    log = read_log(config.run_path / "flow" / "log.jsonl")
    rate = None if log is None else log.median("steps_per_second")
    return max(SECONDS, SHARE_OF_TRAINING * log.step / rate) if rate else SECONDS


class Comparison:
    """What all settings of a study share.

    Attributes:
        clips: the clips that can be decoded.
        sampling: the run's settings, in one precision for all, also where auto means another for preset official.
    """

    def __init__(
        self,
        config: RiverConfig,
        run_context: RunContext,
        clips: ClipReader,
        metrics: list[Metric],
        missing: dict[str, str],
    ) -> None:
        """Load the run and read the clips.

        Args:
            clips: of `open_study_clips`.
            metrics: to measure.
            missing: metric that is not measured -> reason.
        Raises:
            UserError: fewer than two clips can be decoded; a part of the run is missing.
        """
        self._config, self._metrics, self._missing = study_config(config), metrics, missing
        self._predictor, self._source, self.clips = load_predictor(config, run_context), clips.source, list(clips)
        if len(self.clips) < 2:
            raise UserError("sets of clips are compared, and only one clip can be decoded: take more with --videos")
        precision = sampling_precision(config.sampling, self._predictor.device)
        self.sampling = config.sampling.model_copy(update={"precision": precision})

    def open_clips(self, clips: list[Clip]) -> tuple[StudyProtocol, StudyClips]:
        """Some of the clips, ready to be predicted, and what decides the numbers of that."""
        config, missing, flow = self._config, dict(self._missing), find_flow(self._config.run_path)
        assert flow is not None
        context, recordings = config.evaluation.context, [clip.recording for clip in clips]
        counts = shapes = None
        try:
            counts = draw_counts(recordings, RESAMPLES, config.evaluation.seed)
        except ValueError as error:
            missing["interval"] = str(error)
        if isinstance(self._source, ShapesSource):
            try:
                check_shapes(self._source)
                shapes = true_shapes(self._source, clips, context)
            except ValueError as error:
                missing["objects"] = str(error)
        protocol = StudyProtocol(
            **common_protocol(config, self._predictor.device, self._predictor, recordings, missing, RESAMPLES),
            flow_step=flow.step,
            flow_sha256=weights_digest(self._predictor.vector_field),
            precision=sampling_precision(self._predictor.sampling, self._predictor.device),
            clips=[clip.name for clip in clips],
            past_horizon=config.sampling.past_horizon,
            frechet=LATENT_DEFINITION,
            sharpness=SHARPNESS_DEFINITION,
        )
        return protocol, StudyClips(self._predictor, clips, context, counts, self._metrics, shapes)


def evaluations(options: SamplingConfig) -> int:
    """Evaluations of the field per predicted frame."""
    return SamplingPlan.from_config(options).evaluations


def evenly(clips: list[Clip], count: int) -> list[Clip]:
    """At most `count` clips, spread over all."""
    return [clips[index] for index in np.linspace(0, len(clips) - 1, min(count, len(clips))).round().astype(int)]


def _known_points(path: Path, protocol: StudyProtocol, reference: str) -> dict[str, StudyPoint]:
    """By key, points of an earlier call with the same protocol and reference; none where the file cannot be read."""
    try:
        known = read_json(path, Study, "")
    except UserError:
        return {}
    points = {point.key: point for point in known.points}
    return points if known.protocol == protocol and known.points[0].key == reference else {}


def sampler_settings(sampling: SamplingConfig, most_evaluations: int | None = None) -> list[SamplingConfig]:
    """What is measured; first the reference, which is the paper's 396 evaluations unless `most_evaluations` is given.

    Every solver with all numbers of evaluations; with Euler steps, conditions drawn once per frame where evaluations
    are few, and warm starts.
    """
    setting = partial(_setting, sampling)
    found = [setting(preset="official")]
    found += [setting(solver="rk4-38", nfe=MANY_EVALUATIONS, seed=sampling.seed + 1 + n) for n in range(OTHER_SEEDS)]
    for solver in SOLVERS.values():
        found += [setting(solver=solver.name, nfe=nfe) for nfe in EVALUATIONS if nfe % solver.evaluations_per_step == 0]
    found += [setting(solver="euler", nfe=nfe, condition="per-frame") for nfe in FEW_EVALUATIONS]
    found += [
        setting(solver="euler", nfe=nfe, warm_start=start) for start in WARM_STARTS for nfe in (4, MANY_EVALUATIONS)
    ]
    if most_evaluations is None:
        return found
    fewer = [options for options in found[1:] if evaluations(options) <= most_evaluations]
    reference = setting(solver="rk4-38", nfe=max(4, most_evaluations // 4 * 4))
    return [reference, *(options for options in fewer if options != reference)]


def student_settings(sampling: SamplingConfig, sampler: dict[str, Any]) -> list[SamplingConfig]:
    """What is measured of a student: the sampler that it was distilled for, with further seeds."""
    return [_setting(sampling, **sampler | {"seed": sampling.seed + number}) for number in range(1 + OTHER_SEEDS)]


def few_settings(sampling: SamplingConfig) -> list[SamplingConfig]:
    """What is measured after a training: the default first, then others that may be better or as good with less."""
    return [_setting(sampling, solver=solver, nfe=nfe) for solver, nfe in FEW_SETTINGS]


def _setting(sampling: SamplingConfig, **options: Any) -> SamplingConfig:
    """The options, and of the run's settings those that are not compared."""
    return SamplingConfig(**sampling.model_dump(exclude=set(SAMPLER_KEYS)) | options)


def _decide(protocol: StudyProtocol, points: list[StudyPoint]) -> Study:
    points = score_points(points)
    return Study(protocol=protocol, points=points, reference=0, chosen=choose(points))
