"""`study`: how many evaluations of the vector field a prediction needs, for each solver and option of a trained run."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.evaluation.networks import load_lpips, missing_weights_message
from pipelines.evaluation.results import Study, StudyPoint, StudyProtocol
from pipelines.evaluation.study_points import StudyClips
from pipelines.loading import find_flow, weights_digest
from pipelines.prediction.clips import load_clips
from pipelines.predictor import VideoPredictor, load_predictor
from pipelines.runtime.context import RunContext, sampling_precision
from pipelines.runtime.files import read_json, replacing, write_json
from pipelines.runtime.progress import progress, say
from stage1_autoencoder.lpips import SMALLEST_SIDE
from stage2_flow.config import SamplingConfig
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.solvers import SOLVERS

CLIPS = 24
EVALUATIONS = (1, 2, 4, 8, 16, 32, 64, 128)
FEW_EVALUATIONS = (1, 2, 4, 8)
# Enough that the error of Euler steps does not matter.
MANY_EVALUATIONS = 32
WARM_STARTS = (0.1, 0.3, 0.5)
# Further seeds, which show how much a metric varies with the random draws only.
OTHER_SEEDS = 2
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
    "sharpness": "sharpness (1: decoded real latents)",
}
TICKS = (1, 2, 4, 8, 16, 32, 64, 128, 396)


def study(
    config: RiverConfig, run_context: RunContext, clips: int = CLIPS, most_evaluations: int | None = None
) -> Study:
    """Predict the protocol's clips with all of `sampler_settings`, and compare the predictions.

    Writes `quality.json` after each setting, and `quality.png` at the end, to the run's folder. Settings that an
    earlier call measured with the same weights and clips are not measured again.

    Args:
        clips: number of clips.
        most_evaluations: per predicted frame; settings with more are left out, and rk4-38 with that many (a multiple of
            four) replaces the paper's 396.
    Raises:
        UserError: all clips are of one video.
    """
    predictor = load_predictor(config, run_context)
    lpips = None
    if config.dataset.image_size < SMALLEST_SIDE:
        say(f"study: continuing without LPIPS, which needs images of {SMALLEST_SIDE} pixels a side")
    else:
        lpips = load_lpips(config.autoencoder.training.vgg_weights, run_context.device, download=run_context.download)
        if lpips is None:
            say(f"study: {missing_weights_message('continuing without LPIPS')}")
    chosen = load_clips(config, run_context, clips)
    if len({clip.video for clip in chosen}) < 2:
        raise UserError("study: intervals over videos need clips of two or more videos; take more with --videos")
    protocol = _protocol(config, predictor, [clip.name for clip in chosen], lpips=lpips is not None)
    path = config.run_path / "quality.json"
    settings = {_key(options): options for options in sampler_settings(config.sampling, most_evaluations)}
    known = _known_points(path, protocol)
    resumed = sum(key in known for key in settings)
    say(
        f"study: {len(chosen)} clips, {config.evaluation.context} frames given, {config.evaluation.horizon} predicted, "
        f"{len(settings)} sampler settings" + (f", {resumed} of them measured before" if resumed else "")
    )
    measured = StudyClips(predictor, chosen, config.evaluation.context, config.evaluation.seed, lpips)
    points: list[StudyPoint] = []
    evaluations = sum(SamplingPlan.from_config(options).evaluations for options in settings.values())
    with progress(total=evaluations, description="study", unit="NFE") as bar:
        for key, options in settings.items():
            points.append(known.get(key) or measured.measure(key, options, points[0] if points else None))
            result = Study(protocol=protocol, points=points, reference=0, cheapest=cheapest(points))
            write_json(path, result)
            bar.update(points[-1].nfe)
    plot_study(result, config.run_path / "quality.png")
    say("")
    say(format_study(result))
    say(f"\nstudy: {path} and quality.png")
    return result


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


def cheapest(points: list[StudyPoint]) -> int:
    """The index of the point with the fewest evaluations that loses nothing measurable against the first.

    That is: at most `PSNR_MARGIN` of mean PSNR, and neither the Fréchet distance nor LPIPS (where it was measured) is
    worse on the same clips by more than its interval.
    """

    def loses_nothing(point: StudyPoint) -> bool:
        intervals = [point.frechet_difference_interval, point.lpips_difference_interval]
        worse = any(interval is not None and interval[0] > 0 for interval in intervals)
        return point.psnr_difference >= -PSNR_MARGIN and not worse

    fitting = [index for index, point in enumerate(points) if loses_nothing(point)]
    return min(fitting, key=lambda index: points[index].nfe)


def format_study(study: Study) -> str:
    """The points as a table: the reference first, and below it the cheapest that loses nothing."""
    points, lpips = study.points, study.protocol.lpips
    lines = [
        f"  {'':<30}{'NFE':>5}{'PSNR':>8}{'to first':>9}{'95 %':>17}{'SSIM':>8}"
        + (f"{'LPIPS':>8}" if lpips else "")
        + f"{'Frechet':>9}{'sharp':>7}{'ms':>9}"
    ]
    for point in points:
        low, high = point.psnr_difference_interval
        name = point.describe() + (f", seed {point.seed}" if point.seed != points[0].seed else "")
        lines.append(
            f"  {name:<30}{point.nfe:>5}{point.psnr:>8.2f}{point.psnr_difference:>+9.2f}"
            f"{f'{low:+.2f} .. {high:+.2f}':>17}{point.ssim:>8.3f}"
            + (f"{point.lpips:>8.4f}" if lpips else "")
            + f"{point.frechet:>9.3f}{point.sharpness:>7.3f}{point.milliseconds_per_frame:>9.3g}"
        )
    best, first = points[study.cheapest], points[study.reference]
    return "\n".join(
        [
            *lines,
            "",
            f"  Fewest evaluations that lose nothing measurable: {best.nfe} ({best.describe()}), "
            f"{first.nfe / best.nfe:.3g} times fewer than {first.nfe}",
            f"  (PSNR within {PSNR_MARGIN} dB, Frechet distance of latents{' and LPIPS' if lpips else ''} not worse by "
            "more than the interval over videos).",
        ]
    )


def plot_study(study: Study, path: Path) -> None:
    """Write the plot: quality against evaluations, one line per solver; the band is the interval of the reference."""
    protocol, points = study.protocol, study.points
    reference, best = points[study.reference], points[study.cheapest]
    panels = {name: label for name, label in PANELS.items() if getattr(reference, name) is not None}
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10.4, 3.6 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flatten()
    for axis, (name, label) in zip(axes, panels.items(), strict=False):
        axis.axhspan(*getattr(reference, f"{name}_interval"), color="#999999", alpha=0.18, linewidth=0)
        axis.axhline(getattr(reference, name), color="#666666", linewidth=1, linestyle="--")
        for solver, (color, marker) in STYLES.items():
            line = solver_line(points, solver)
            nfes, values = [point.nfe for point in line], [getattr(point, name) for point in line]
            axis.plot(nfes, values, color=color, marker=marker, markersize=4, linewidth=1.4, label=solver)
        circle = {"markersize": 11, "fillstyle": "none", "color": "black"}
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
        f"{protocol.horizon} predicted; dashed: {reference.nfe} evaluations, band: 95 %",
        fontsize=10,
    )
    with replacing(path) as temporary:
        figure.savefig(temporary)


def solver_line(points: list[StudyPoint], solver: str) -> list[StudyPoint]:
    """The points of a solver that differ from the reference only in solver and evaluations, by evaluations."""
    seed = points[0].seed
    line = [point for point in points if point.solver == solver and point.is_plain and point.seed == seed]
    return sorted(line, key=lambda point: point.nfe)


def _protocol(config: RiverConfig, predictor: VideoPredictor, clips: list[str], *, lpips: bool) -> StudyProtocol:
    flow = find_flow(config.run_path)
    assert flow is not None
    return StudyProtocol(
        dataset=config.dataset.name,
        split=config.evaluation.split,
        window=config.evaluation.window,
        clips=clips,
        context=config.evaluation.context,
        horizon=config.evaluation.horizon,
        image_size=config.dataset.image_size,
        flow_step=flow.step,
        flow_sha256=weights_digest(predictor.vector_field),
        autoencoder_sha256=flow.state["store"]["autoencoder"],
        past_horizon=config.sampling.past_horizon,
        precision=sampling_precision(config.sampling, predictor.device),
        device=str(predictor.device),
        frechet="of means over 2x2 parts of each frame's latents and of their change to the frame before",
        sharpness="mean difference of neighboring pixels, as a share of the decoded real latents'",
        lpips=lpips,
    )


def _key(options: SamplingConfig) -> str:
    """What a point's result depends on."""
    return json.dumps(options.model_dump(mode="json", exclude={"batch_size", "compile", "cuda_graphs"}), sort_keys=True)


def _known_points(path: Path, protocol: StudyProtocol) -> dict[str, StudyPoint]:
    """Points of an earlier call with the same protocol, by key; none where the file cannot be read."""
    try:
        known = read_json(path, Study, "")
    except UserError:
        return {}
    return {point.key: point for point in known.points} if known.protocol == protocol else {}
