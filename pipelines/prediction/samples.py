"""`sample`: predicted videos of a split as GIF, MP4, contact sheet and latents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file

from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.prediction.clips import Clip, load_clips
from pipelines.prediction.pictures import (
    RED,
    Strip,
    animation,
    clip_strips,
    contact_sheet,
    file_name,
    save_gif,
    save_mp4,
)
from pipelines.predictor import VideoPredictor, decode_clips, describe_sampling, load_predictor, predict_clips, to_video
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import read_json, write_json
from pipelines.runtime.progress import progress, say

SHEET_CLIPS = 8


class Samples(BaseModel):
    """`samples.json`: each clip's pictures are beside it, as `file_name(clip)` with `.gif` and `.mp4`.

    Attributes:
        clips: names.
        context, horizon: given and predicted frames of each clip.
        sampling: the settings as dumped from the configuration.
        samples: predictions per clip.
        refine: whether predicted frames are refined.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    clips: list[str] = Field(min_length=1)
    context: int = Field(ge=1)
    horizon: int = Field(ge=1)
    sampling: dict[str, Any]
    samples: int
    refine: bool


def sample(
    config: RiverConfig, run_context: RunContext, videos: int = SHEET_CLIPS, refine: bool = False, samples: int = 1
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
    predictor = load_predictor(config, run_context)
    clips = load_clips(config, run_context, videos)
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
    listed = Samples(
        clips=[clip.name for clip in clips],
        context=context,
        horizon=config.evaluation.horizon,
        sampling=config.sampling.model_dump(mode="json"),
        samples=len(frames),
        refine=refine,
    )
    write_json(folder / "samples.json", listed)


def _strips(truth: np.ndarray, predicted: Sequence[np.ndarray], context: int) -> list[Strip]:
    """What happened, and each of the samples below it."""
    strips = clip_strips(truth, predicted[0], context)
    return strips + [Strip(f"sample {n}", video, context, RED) for n, video in enumerate(predicted[1:], start=2)]


def _remove_former(folder: Path) -> None:
    """Remove the clips of the call before: beside newer ones nobody could tell which model made them."""
    try:
        names = read_json(folder / "samples.json", Samples, "").clips
    except UserError:
        return
    for name in names:
        for ending in ("gif", "mp4"):
            (folder / f"{file_name(name)}.{ending}").unlink(missing_ok=True)
