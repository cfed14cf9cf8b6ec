"""`study`: how many evaluations of the field a prediction needs, for each solver and option, on a trained run."""

import json
import os
from pathlib import Path
from typing import Any

from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.evaluation.networks import load_lpips, missing_weights_message
from pipelines.evaluation.study_plot import plot_study
from pipelines.evaluation.study_points import StudyClips
from pipelines.loading import find_flow, weights_digest
from pipelines.prediction.clips import load_clips
from pipelines.predictor import VideoPredictor, load_predictor
from pipelines.runtime.context import RunContext, sampling_precision
from pipelines.runtime.progress import progress, say
from stage2_flow.config import SamplingConfig
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.solvers import SOLVERS

CLIPS = 24
EVALUATIONS = (1, 2, 4, 8, 16, 32, 64, 128)
FEW_EVALUATIONS = (1, 2, 4, 8)
# Enough for Euler steps to make no matter.
MANY_EVALUATIONS = 32
WARM_STARTS = (0.1, 0.3, 0.5)
# How much a metric scatters with the draws alone.
OTHER_SEEDS = 2
# dB of PSNR that a choice may lose against the paper's 396 evaluations.
PSNR_MARGIN = 0.1


def study(
    config: RiverConfig, run_context: RunContext, clips: int = CLIPS, most_evaluations: int | None = None
) -> dict[str, Any]:
    """Predict the protocol's clips in all ways of `ways_to_sample`; trains what lacks first.

    Writes `quality.json` after each way, and `quality.png` at the end, to the run's folder. What is measured already,
    of the same weights, clips and settings, is kept.

    Args:
        clips: how many.
        most_evaluations: a frame, to be done sooner: what needs more is left out, and rk4-38 with so many (a multiple
            of four) stands for the paper's 396.
    Returns:
        What was written: `{"protocol": {...}, "points": [...], "reference": index, "cheapest": index}`.
    Raises:
        UserError: all clips are of one video.
    """
    predictor = load_predictor(config, run_context)
    lpips = load_lpips(config.autoencoder.training.vgg_weights, run_context.device, download=run_context.download)
    if lpips is None:
        say(f"study: {missing_weights_message('LPIPS is left out')}")
    chosen = load_clips(config, run_context, clips)
    if len({clip.video for clip in chosen}) < 2:
        raise UserError("study: intervals over videos need clips of two or more; take more with --videos")
    protocol = _protocol(config, predictor, [clip.name for clip in chosen]) | {"lpips": lpips is not None}
    path = config.run_path / "quality.json"
    ways, former = ways_to_sample(config.sampling, most_evaluations), _former_points(path, protocol)
    known = sum(_key(way) in former for way in ways)
    say(
        f"study: {len(chosen)} clips, {config.evaluation.context} frames given, {config.evaluation.horizon} predicted, "
        f"in {len(ways)} ways" + (f", {known} of them measured before" if known else "")
    )
    measured = StudyClips(predictor, chosen, config.evaluation.context, config.evaluation.seed, lpips)
    result: dict[str, Any] = {"protocol": protocol, "points": [], "reference": 0, "cheapest": 0}
    points = result["points"]
    evaluations = sum(SamplingPlan.from_config(way).evaluations for way in ways)
    with progress(total=evaluations, description="study", unit="NFE") as bar:
        for way in ways:
            point = former.get(_key(way)) or measured.point(_key(way), way, points[0] if points else None)
            points.append(point)
            result["cheapest"] = cheapest(points)
            _write(path, result)
            bar.update(point["nfe"])
    plot_study(result, config.run_path / "quality.png")
    say("")
    say(format_study(result))
    say(f"\nstudy: {path} and quality.png")
    return result


def ways_to_sample(sampling: SamplingConfig, most_evaluations: int | None = None) -> list[SamplingConfig]:
    """What is measured, the paper's 396 evaluations first, or what stands for them.

    Every solver at all numbers of evaluations; with Euler's steps, conditions drawn once per frame where evaluations
    are few, and warm starts where they are many.
    """
    kept = {"past_horizon", "precision", "weights", "batch_size", "compile", "cuda_graphs"}
    common = sampling.model_dump(include=kept)

    def way(**options: Any) -> SamplingConfig:
        return SamplingConfig(**common | {"seed": sampling.seed} | options)

    ways = [way(preset="official")]
    ways += [way(solver="rk4-38", nfe=MANY_EVALUATIONS, seed=sampling.seed + 1 + n) for n in range(OTHER_SEEDS)]
    for solver in SOLVERS.values():
        ways += [way(solver=solver.name, nfe=nfe) for nfe in EVALUATIONS if nfe % solver.evaluations_per_step == 0]
    for nfe in FEW_EVALUATIONS:
        ways.append(way(solver="euler", nfe=nfe, condition="per-frame"))
    ways += [way(solver="euler", nfe=nfe, warm_start=start) for start in WARM_STARTS for nfe in (4, MANY_EVALUATIONS)]
    if most_evaluations is None:
        return ways
    fewer = [way for way in ways[1:] if SamplingPlan.from_config(way).evaluations <= most_evaluations]
    reference = way(solver="rk4-38", nfe=max(4, most_evaluations // 4 * 4))
    return [reference, *(few for few in fewer if few != reference)]


def cheapest(points: list[dict[str, Any]]) -> int:
    """The index of the point with the fewest evaluations that loses nothing measurable against the first.

    That is: no more than `PSNR_MARGIN` of PSNR on average, and neither the Fréchet distance nor LPIPS, where it was
    measured, worse on the same clips by more than their scatter.
    """

    def loses_nothing(point: dict[str, Any]) -> bool:
        measured = [name for name in ("frechet", "lpips") if point[name] is not None]
        worse = any(point[f"{name}_difference_interval"][0] > 0 for name in measured)
        return point["psnr_difference"] >= -PSNR_MARGIN and not worse

    fitting = [index for index, point in enumerate(points) if loses_nothing(point)]
    return min(fitting, key=lambda index: points[index]["nfe"])


def describe_way(point: dict[str, Any]) -> str:
    """A point's options in a few words."""
    words = [point["solver"]]
    words += [f"warm start {point['warm_start']:g}"] if point["warm_start"] else []
    words += ["one condition a frame"] if point["condition"] == "per-frame" else []
    words += ["official grid"] if point["preset"] == "official" else []
    return ", ".join(words)


def format_study(result: dict[str, Any]) -> str:
    """A table for people, the paper's way first and the cheapest that loses nothing last."""
    points, lpips = result["points"], result["protocol"]["lpips"]
    lines = [
        f"  {'':<30}{'NFE':>5}{'PSNR':>8}{'to first':>9}{'95 %':>17}{'SSIM':>8}"
        + (f"{'LPIPS':>8}" if lpips else "")
        + f"{'Frechet':>9}{'sharp':>7}{'ms':>9}"
    ]
    for point in points:
        low, high = point["psnr_difference_interval"]
        name = describe_way(point) + (f", seed {point['seed']}" if point["seed"] != points[0]["seed"] else "")
        lines.append(
            f"  {name:<30}{point['nfe']:>5}{point['psnr']:>8.2f}{point['psnr_difference']:>+9.2f}"
            f"{f'{low:+.2f} .. {high:+.2f}':>17}{point['ssim']:>8.3f}"
            + (f"{point['lpips']:>8.4f}" if lpips else "")
            + f"{point['frechet']:>9.3f}{point['sharpness']:>7.3f}{point['milliseconds_per_frame']:>9.3g}"
        )
    best, first = points[result["cheapest"]], points[result["reference"]]
    lines += [
        "",
        f"  Fewest evaluations that lose nothing measurable: {best['nfe']} ({describe_way(best)}), "
        f"{first['nfe'] / best['nfe']:.3g} times fewer than {first['nfe']}",
        f"  (PSNR within {PSNR_MARGIN} dB, Frechet distance of latents{' and LPIPS' if lpips else ''} not worse by "
        "more than the scatter over videos).",
    ]
    return "\n".join(lines)


def _protocol(config: RiverConfig, predictor: VideoPredictor, clips: list[str]) -> dict[str, Any]:
    flow = find_flow(config.run_path)
    assert flow is not None
    return {
        "dataset": config.dataset.name,
        "split": config.evaluation.split,
        "window": config.evaluation.window,
        "clips": clips,
        "context": config.evaluation.context,
        "horizon": config.evaluation.horizon,
        "image_size": config.dataset.image_size,
        "flow_step": flow.step,
        "flow_sha256": weights_digest(predictor.vector_field),
        "autoencoder_sha256": flow.state["store"]["autoencoder"],
        "past_horizon": config.sampling.past_horizon,
        "precision": sampling_precision(config.sampling, predictor.device),
        "device": str(predictor.device),
        "frechet": "of means over 2x2 parts of each frame's latents and of their change to the frame before",
        "sharpness": "mean difference of neighbouring pixels, as a share of the decoded real latents'",
    }


def _key(way: SamplingConfig) -> str:
    """What a point's result depends on."""
    return json.dumps(way.model_dump(mode="json", exclude={"batch_size", "compile", "cuda_graphs"}), sort_keys=True)


def _former_points(path: Path, protocol: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Points of an earlier call with the same protocol, by key; none where the file is not one of ours."""
    try:
        former = json.loads(path.read_text(encoding="utf-8"))
        same = former["protocol"] == protocol
        return {point["key"]: point for point in former["points"]} if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all: an interrupted study goes on from what is there."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result), encoding="utf-8")
    os.replace(part, path)
