"""`sample`: predicted videos of a split as GIF, MP4, contact sheet and latents."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import save_file

from pipelines.clips import Clip, load_clips
from pipelines.config import RiverConfig
from pipelines.pictures import RED, Strip, animation, clip_strips, contact_sheet, save_gif, save_mp4
from pipelines.predictor import VideoPredictor, to_video
from pipelines.runtime.progress import progress, say
from pipelines.runtime.session import Session
from pipelines.train_flow import train_flow
from pipelines.train_refiner import train_refiner
from stage2_flow.plan import SamplingPlan

SHEET_CLIPS = 8


def sample(
    config: RiverConfig, session: Session, videos: int = SHEET_CLIPS, refine: bool = False, samples: int = 1
) -> Path:
    """Predict clips of the protocol's split; trains what lacks first, with `refine` also the refiner.

    Writes to `runs/<name>/samples`: `contact_sheet.png`, `overview.gif`, a GIF and an MP4 a clip, and
    `predictions.safetensors` with raw latents: `latents` [clip, context + horizon, c, h, w] of the first sample, and
    where there are several `samples` [clip, sample, context + horizon, c, h, w].

    Args:
        videos: how many clips.
        samples: different predictions of each.
    Returns:
        The folder of the samples.
    """
    train_flow(config, session.for_prerequisites())
    if refine:
        train_refiner(config, session.for_prerequisites())
    predictor = load_predictor(config, session)
    clips = load_clips(config, session, videos)
    context, horizon = config.evaluation.context, config.evaluation.horizon
    how = describe_sampling(predictor, refine)
    several = f", {samples} samples of each" if samples > 1 else ""
    say(f"sample: {len(clips)} clips, {context} frames given, {horizon} predicted{several}, {how}")
    size = config.evaluation.batch_size
    latents = [predict_clips(predictor, clips, context, horizon, size, number) for number in range(samples)]
    frames = [decode_clips(predictor, clips, predicted, context, refine) for predicted in latents]
    folder = config.run_path / "samples"
    write_samples(folder, config, predictor, clips, frames, refine)
    tensors = {"latents": latents[0].cpu().contiguous()}
    if samples > 1:
        tensors["samples"] = torch.stack(latents, dim=1).cpu().contiguous()
    save_file(tensors, folder / "predictions.safetensors")
    say(f"sample: {folder}/contact_sheet.png, overview.gif and {len(clips)} clips as GIF and MP4")
    return folder


def load_predictor(config: RiverConfig, session: Session) -> VideoPredictor:
    """The predictor of the configuration's run, with the configuration's sampling options."""
    predictor = VideoPredictor.from_run(config.run_path, session.device, weights=config.sampling.weights)
    return replace(predictor, sampling=config.sampling)


def describe_sampling(predictor: VideoPredictor, refine: bool = False) -> str:
    """One phrase on how frames are integrated, for people."""
    options, plan = predictor.sampling, SamplingPlan.from_config(predictor.sampling)
    words = [plan.solver.name, f"{plan.evaluations} evaluations a frame", f"warm start {plan.warm_start:g}"]
    words += [f"times shifted by {plan.shift:g}"] if plan.shift != 1 else []
    words += ["one condition a frame"] if options.condition == "per-frame" else []
    words += ["recent conditions"] if options.condition_draw == "recent" else []
    words += [f"past horizon {options.past_horizon}"] if options.past_horizon is not None else []
    words += ["raw weights"] if options.weights == "raw" else []
    words += ["refined"] if refine else []
    return ", ".join(words)


def predict_clips(
    predictor: VideoPredictor, clips: list[Clip], context: int, horizon: int, batch_size: int, sample_number: int
) -> torch.Tensor:
    """Raw latents [clips, context + horizon, c, h, w] of context and prediction; `sample_number` keys the draws."""
    parts = []
    with progress(total=len(clips), description="predict", unit="clip") as bar:
        for first in range(0, len(clips), batch_size):
            batch = clips[first : first + batch_size]
            given = predictor.encode_videos(torch.stack([clip.frames[:context] for clip in batch]))
            keys = [(clip.key, sample_number) for clip in batch]
            parts.append(predictor.generate_latents(given, horizon, keys=keys))
            bar.update(len(batch))
    return torch.cat(parts)


def decode_clips(
    predictor: VideoPredictor, clips: list[Clip], latents: torch.Tensor, context: int, refine: bool
) -> torch.Tensor:
    """Frames [clips, context + horizon, 3, h, w] of `predict_clips`' latents; with `refine` predicted ones are refined.

    Raises:
        UserError: `refine` without a refiner.
    """
    if not refine:
        return predictor.decode_videos(latents)
    return predictor.decode_refined(latents, torch.stack([clip.frames[:context] for clip in clips]))


def write_samples(
    folder: Path,
    config: RiverConfig,
    predictor: VideoPredictor,
    clips: list[Clip],
    frames: Sequence[torch.Tensor],
    refine: bool = False,
) -> None:
    """Write contact sheet, overview and one GIF and MP4 a clip.

    Args:
        frames: of each sample, [clips, context + horizon, 3, h, w].
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_former(folder)
    context = config.evaluation.context
    predicted = [to_video(sample) for sample in frames]
    truth = to_video(torch.stack([clip.frames for clip in clips]))
    rows = [
        (clip.name, _strips(truth[i], [sample[i] for sample in predicted], context)) for i, clip in enumerate(clips)
    ]
    title = (
        f"{config.dataset.name}, {config.evaluation.split} split: {context} frames given, {config.evaluation.horizon} "
        f"predicted ({describe_sampling(predictor, refine)})"
    )
    shown = rows[:SHEET_CLIPS]
    contact_sheet(shown, title).save(folder / "contact_sheet.png")
    save_gif(folder / "overview.gif", animation(shown), predictor.fps)
    for name, strips in progress(rows, description="pictures", unit="clip"):
        stem = file_name(name)
        video = animation([(name, strips)])
        save_gif(folder / f"{stem}.gif", video, predictor.fps)
        save_mp4(folder / f"{stem}.mp4", video, predictor.fps)
    protocol = {
        "clips": [clip.name for clip in clips],
        "context": context,
        "horizon": config.evaluation.horizon,
        "sampling": config.sampling.model_dump(mode="json"),
        "samples": len(frames),
        "refine": refine,
    }
    (folder / "samples.json").write_text(json.dumps(protocol, indent=1), encoding="utf-8")


def _strips(truth: np.ndarray, predicted: Sequence[np.ndarray], context: int) -> list[Strip]:
    """What happened, and each of the samples below it."""
    strips = clip_strips(truth, predicted[0], context)
    return strips + [Strip(f"sample {n}", video, context, RED) for n, video in enumerate(predicted[1:], start=2)]


def _remove_former(folder: Path) -> None:
    """Remove the clips of the call before: beside newer ones nobody could tell which model made them."""
    try:
        names = json.loads((folder / "samples.json").read_text(encoding="utf-8"))["clips"]
    except (OSError, ValueError, KeyError):
        return
    for name in names:
        for ending in ("gif", "mp4"):
            (folder / f"{file_name(name)}.{ending}").unlink(missing_ok=True)


def file_name(video_id: str) -> str:
    """A video's id as a file name that every file system takes."""
    return re.sub(r"[^\w.@-]+", "_", video_id).strip("._") or "video"


def flatten(videos: torch.Tensor) -> torch.Tensor:
    """[b, n, 3, h, w] to [b n, 3, h, w]."""
    return rearrange(videos, "b n c h w -> (b n) c h w")
