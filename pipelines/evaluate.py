"""`evaluate`: PSNR and SSIM of the prediction beside two baselines, with the protocol they were measured under."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from pipelines.clips import Clip, load_clips
from pipelines.config import RiverConfig
from pipelines.metrics import psnr, ssim
from pipelines.predictor import VideoPredictor
from pipelines.runtime.progress import say
from pipelines.runtime.session import Session
from pipelines.sample import decode_clips, describe_sampling, flatten, load_predictor, predict_clips
from pipelines.train_flow import find_flow, train_flow
from pipelines.train_refiner import find_refiner, train_refiner
from stage2_flow.rollout import SamplingPlan

METRICS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {"psnr": (psnr, "dB"), "ssim": (ssim, "")}
SUBJECTS = ("prediction", "copy_last", "reconstruction")
TITLES = {
    "prediction": "prediction",
    "copy_last": "copying the last frame",
    "reconstruction": "autoencoder's reconstruction (upper bound)",
}


def evaluate(config: RiverConfig, session: Session, refine: bool = False) -> dict[str, Any]:
    """Measure the run on the protocol's clips; trains what lacks first. Writes `runs/<name>/evaluation.json`.

    Args:
        refine: measure refined predictions.

    Returns:
        What was written: `{"protocol": {...}, "metrics": {"psnr": {"prediction": .., "per_frame": {..}}, ...}}`.
    """
    train_flow(config, session.for_prerequisites())
    if refine:
        train_refiner(config, session.for_prerequisites())
    predictor = load_predictor(config, session)
    clips = load_clips(config, session, config.evaluation.videos)
    result = {
        "protocol": describe_protocol(config, predictor, clips, refine),
        "metrics": measure(config, predictor, clips, refine),
    }
    path = config.run_path / "evaluation.json"
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    say("")
    say(format_table(result))
    say(f"\nevaluate: {path}")
    return result


def measure(config: RiverConfig, predictor: VideoPredictor, clips: list[Clip], refine: bool = False) -> dict[str, Any]:
    """All metrics of all subjects, averaged over clips (and samples), per predicted frame and over all of them."""
    context, horizon = config.evaluation.context, config.evaluation.horizon
    sums = {(metric, subject): torch.zeros(horizon, dtype=torch.float64) for metric in METRICS for subject in SUBJECTS}

    def add(subject: str, videos: Tensor, truth: Tensor, weight: float) -> None:
        for metric, (function, _) in METRICS.items():
            values = function(flatten(videos).cpu(), flatten(truth)).view(len(truth), horizon).double()
            sums[metric, subject] += weight * values.sum(0)

    size = config.evaluation.batch_size
    for first in range(0, len(clips), size):
        batch = clips[first : first + size]
        frames = torch.stack([clip.frames for clip in batch])
        truth = frames[:, context:]
        add("copy_last", repeat(frames[:, context - 1], "b c h w -> b n c h w", n=horizon), truth, 1.0)
        add("reconstruction", predictor.decode_videos(predictor.encode_videos(truth)), truth, 1.0)
    for number in range(config.evaluation.samples):
        latents = predict_clips(predictor, clips, context, horizon, size, number)
        for first in range(0, len(clips), size):
            batch = clips[first : first + size]
            truth = torch.stack([clip.frames[context:] for clip in batch])
            predicted = decode_clips(predictor, batch, latents[first : first + size], context, refine)
            add("prediction", predicted[:, context:], truth, 1.0 / config.evaluation.samples)

    metrics: dict[str, Any] = {}
    for metric in METRICS:
        per_frame = {subject: (sums[metric, subject] / len(clips)).tolist() for subject in SUBJECTS}
        metrics[metric] = {subject: sum(values) / horizon for subject, values in per_frame.items()}
        metrics[metric]["per_frame"] = per_frame
    return metrics


def describe_protocol(
    config: RiverConfig, predictor: VideoPredictor, clips: list[Clip], refine: bool = False
) -> dict[str, Any]:
    """What must be known to measure the same thing again."""
    flow, refiner = find_flow(config.run_path), find_refiner(config.run_path) if refine else None
    assert flow is not None
    return {
        "dataset": config.dataset.name,
        "split": config.evaluation.split,
        "clips": len(clips),
        "window": config.evaluation.window,
        "window_seed": config.evaluation.seed,
        "context": config.evaluation.context,
        "horizon": config.evaluation.horizon,
        "samples": config.evaluation.samples,
        "aggregation": "mean over clips, samples and predicted frames",
        "pixels": "clamped to [-1, 1], compared as floats with data range 2",
        "image_size": config.dataset.image_size,
        "frame_step": config.dataset.frame_step,
        "sampling": config.sampling.model_dump(mode="json"),
        "nfe": SamplingPlan.from_config(config.sampling).evaluations,
        "description": describe_sampling(predictor, refine),
        "flow_step": flow.step,
        "refine": refine,
        "refiner_step": None if refiner is None else refiner.step,
        "autoencoder_sha256": flow.state["store"]["autoencoder"],
        "store_fingerprint": flow.state["store"]["fingerprint"],
        "device": str(predictor.device),
    }


def format_table(result: dict[str, Any]) -> str:
    """The metrics as a table for people, with the protocol in the line above."""
    protocol, metrics = result["protocol"], result["metrics"]
    horizon = protocol["horizon"]
    columns = sorted({0, (horizon - 1) // 2, horizon - 1})
    lines = [
        f"{protocol['dataset']}, {protocol['split']} split: {protocol['clips']} clips, {protocol['context']} frames "
        f"given, {horizon} predicted, {protocol['samples']} sample(s) a clip, {protocol['description']}"
    ]
    for metric, (_, unit) in METRICS.items():
        digits = 2 if unit else 3
        heading = f"{metric.upper()}{' [' + unit + ']' if unit else ''}"
        lines.append("")
        lines.append(f"  {heading:<44}{'mean':>8}" + "".join(f"{'+' + str(c + 1):>8}" for c in columns))
        for subject in SUBJECTS:
            values = [metrics[metric][subject], *(metrics[metric]["per_frame"][subject][c] for c in columns)]
            lines.append(f"  {TITLES[subject]:<44}" + "".join(f"{value:>8.{digits}f}" for value in values))
    gain = metrics["psnr"]["prediction"] - metrics["psnr"]["copy_last"]
    lines += [
        "",
        f"  The prediction is {abs(gain):.2f} dB {'better' if gain >= 0 else 'WORSE'} than copying the last frame.",
    ]
    return "\n".join(lines)


def read_evaluation(path: Path) -> dict[str, Any]:
    """A written evaluation."""
    return json.loads(path.read_text(encoding="utf-8"))
