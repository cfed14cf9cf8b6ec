"""`study`: how many evaluations of the vector field a prediction needs, for each solver and option of a trained run.

It measures on the validation split: what is chosen here must not have been chosen by the test split.
"""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.evaluation.frechet import LATENT_DEFINITION
from pipelines.evaluation.intervals import draw_counts
from pipelines.evaluation.metrics import SHARPNESS_DEFINITION, load_frame_metrics
from pipelines.evaluation.protocol import common_protocol
from pipelines.evaluation.study_points import StudyClips, point_key
from pipelines.prediction.clips import ClipReader, open_clips
from pipelines.predictor import load_predictor
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import read_json, replacing, write_json
from pipelines.runtime.progress import progress, say
from pipelines.runtime.results import Study, StudyPoint, StudyProtocol
from stage1_autoencoder.videos.source import VideoError
from stage2_flow.config import SamplingConfig
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
# dB of PSNR that a setting may lose against the paper's 396 evaluations.
PSNR_MARGIN = 0.1

# Colors that people with any color vision can distinguish (Okabe and Ito), and markers.
STYLES = {
    "euler": ("#0072B2", "o"),
    "midpoint": ("#009E73", "s"),
    "heun": ("#E69F00", "^"),
    "rk4": ("#CC79A7", "D"),
    "rk4-38": ("#D55E00", "v"),
}
PANELS = {
    "psnr": "PSNR [dB], higher is better",
    "ssim": "SSIM, higher is better",
    "lpips": "LPIPS, lower is better",
    "frechet": "Fréchet distance of latents, lower is better",
    "sharpness": "sharpness (1: the true frames)",
}
TICKS = (1, 2, 4, 8, 16, 32, 64, 128, 396)


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
        raise UserError(f"sets of clips are compared, and {len(clips)} clip is no set: take two or more with --videos")
    return clips


def study(
    config: RiverConfig, run_context: RunContext, clips: ClipReader, most_evaluations: int | None = None
) -> Study:
    """Predict clips with all of `sampler_settings`, and compare the predictions.

    Writes `quality.json` after each setting, and `quality.png` at the end, to the run's folder. Settings that an
    earlier call measured with the same weights, clips and reference are not measured again.

    Args:
        clips: of `open_study_clips`.
        most_evaluations: per predicted frame; settings with more are left out, and rk4-38 with that many (a multiple of
            four) replaces the paper's 396.
    Raises:
        UserError: fewer than two clips can be decoded.
    """
    predictor = load_predictor(config, run_context)
    metrics, missing = load_frame_metrics(config, run_context)
    chosen = list(clips)
    if len(chosen) < 2:
        raise UserError("sets of clips are compared, and only one clip can be decoded: take more with --videos")
    recordings = [clip.recording for clip in chosen]
    try:
        counts = draw_counts(recordings, RESAMPLES, config.evaluation.seed)
    except ValueError as error:
        counts, missing["interval"] = None, str(error)
    for what, reason in missing.items():
        say(f"study: continuing without {what}: {reason}")
    evaluation, path = config.evaluation, config.run_path / "quality.json"
    protocol = StudyProtocol(
        **common_protocol(study_config(config), predictor, recordings, missing, RESAMPLES),
        clips=[clip.name for clip in chosen],
        past_horizon=config.sampling.past_horizon,
        frechet=LATENT_DEFINITION,
        sharpness=SHARPNESS_DEFINITION,
    )
    # One precision for all settings, also where auto means another for preset official.
    sampling = config.sampling.model_copy(update={"precision": protocol.precision})
    settings = sampler_settings(sampling, most_evaluations)
    known = _known_points(path, protocol, point_key(settings[0]))
    resumed = sum(point_key(options) in known for options in settings)
    say(
        f"study: {protocol.split} split: {len(chosen)} clips of {protocol.describe_recordings()}, "
        f"{evaluation.context} frames given, "
        f"{evaluation.horizon} predicted, "
        f"{len(settings)} sampler settings" + (f", {resumed} of them measured before" if resumed else "")
    )
    measured = StudyClips(predictor, chosen, evaluation.context, counts, metrics)
    points: list[StudyPoint] = []
    total = sum(SamplingPlan.from_config(options).evaluations for options in settings)
    with progress(total=total, description="study", unit="NFE") as bar:
        for options in settings:
            point = known.get(point_key(options)) or measured.measure(options, points[0] if points else None)
            points.append(point)
            result = Study(protocol=protocol, points=points, reference=0, cheapest=cheapest(points))
            write_json(path, result)
            bar.update(point.nfe)
    plot_study(result, config.run_path / "quality.png")
    say("")
    say(format_study(result))
    say(f"\nstudy: {path} and quality.png")
    return result


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
    kept = {"past_horizon", "precision", "weights", "batch_size", "compile", "cuda_graphs", "seed"}
    common = sampling.model_dump(include=kept)

    def setting(**options: Any) -> SamplingConfig:
        return SamplingConfig(**common | options)

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
    fewer = [options for options in found[1:] if SamplingPlan.from_config(options).evaluations <= most_evaluations]
    reference = setting(solver="rk4-38", nfe=max(4, most_evaluations // 4 * 4))
    return [reference, *(options for options in fewer if options != reference)]


def cheapest(points: list[StudyPoint]) -> int | None:
    """The index of the point with the fewest evaluations that loses nothing measurable against the first.

    That is: at most `PSNR_MARGIN` of mean PSNR, and neither the Fréchet distance nor LPIPS (where it was measured) is
    worse on the same clips by more than its interval. None without intervals.
    """
    if points[0].frechet_interval is None:
        return None

    def loses_nothing(point: StudyPoint) -> bool:
        intervals = [point.frechet_difference_interval, point.lpips_difference_interval]
        worse = any(interval is not None and interval[0] > 0 for interval in intervals)
        return point.psnr_difference >= -PSNR_MARGIN and not worse

    fitting = [index for index, point in enumerate(points) if loses_nothing(point)]
    return min(fitting, key=lambda index: points[index].nfe)


def format_study(study: Study) -> str:
    """The points as a table: the reference first, and below it the cheapest that loses nothing."""
    points, missing = study.points, study.protocol.missing
    lines = [
        f"  {'':<30}{'NFE':>5}{'PSNR':>8}{'to first':>9}{'95 %':>17}{'SSIM':>8}{'LPIPS':>8}{'Frechet':>9}{'sharp':>7}"
        f"{'ms':>9}"
    ]
    for point in points:
        ends = point.psnr_difference_interval
        interval = "-" if ends is None else f"{ends[0]:+.2f} .. {ends[1]:+.2f}"
        ssim = "-" if point.ssim is None else f"{point.ssim:.3f}"
        lpips = "-" if point.lpips is None else f"{point.lpips:.4f}"
        name = point.describe() + (f", seed {point.seed}" if point.seed != points[0].seed else "")
        lines.append(
            f"  {name:<30}{point.nfe:>5}{point.psnr:>8.2f}{point.psnr_difference:>+9.2f}"
            f"{interval:>17}{ssim:>8}{lpips:>8}"
            f"{point.frechet:>9.3f}{point.sharpness:>7.3f}{point.milliseconds_per_frame:>9.3g}"
        )
    if study.cheapest is None:
        return "\n".join(lines) + f"\n\n  Which setting loses nothing is not decided: {missing['interval']}."
    best, first = points[study.cheapest], points[study.reference]
    lpips = "" if "lpips" in missing else " and LPIPS"
    return "\n".join(lines) + (
        f"\n\n  Fewest evaluations that lose nothing measurable: {best.nfe} ({best.describe()}), "
        f"{first.nfe / best.nfe:.3g} times fewer than {first.nfe}\n"
        f"  (PSNR within {PSNR_MARGIN} dB, Frechet distance of latents{lpips} not worse by more than the "
        "interval over recordings)."
    )


def plot_study(study: Study, path: Path) -> None:
    """Write the plot: quality against evaluations, one line per solver; the band is the interval of the reference."""
    protocol, points = study.protocol, study.points
    reference = points[study.reference]
    panels = {name: label for name, label in PANELS.items() if getattr(reference, name) is not None}
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10.4, 3.6 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flatten()
    for axis, (name, label) in zip(axes, panels.items(), strict=False):
        if (interval := getattr(reference, f"{name}_interval")) is not None:
            axis.axhspan(*interval, color="#999999", alpha=0.18, linewidth=0)
        axis.axhline(getattr(reference, name), color="#666666", linewidth=1, linestyle="--")
        for solver, (color, marker) in STYLES.items():
            line = study.solver_line(solver)
            nfes, values = [point.nfe for point in line], [getattr(point, name) for point in line]
            axis.plot(nfes, values, color=color, marker=marker, markersize=4, linewidth=1.4, label=solver)
        if study.cheapest is not None:
            best, circle = points[study.cheapest], {"markersize": 11, "fillstyle": "none", "color": "black"}
            axis.plot(best.nfe, getattr(best, name), "o", label="cheapest that loses nothing", **circle)
        axis.set_xscale("log", base=2)
        axis.set_xticks(TICKS, [str(tick) for tick in TICKS])
        if name == "frechet":
            axis.set_yscale("log")
        axis.set_xlabel("evaluations of the vector field per frame (NFE)")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.25)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    axes[0].legend(fontsize=8, ncols=2)
    figure.suptitle(
        f"{protocol.dataset}, {protocol.split} split: {len(protocol.clips)} clips, {protocol.context} frames given, "
        f"{protocol.horizon} predicted; dashed: {reference.nfe} evaluations"
        + (", band: 95 %" if protocol.interval else ""),
        fontsize=10,
    )
    with replacing(path) as temporary:
        figure.savefig(temporary)
