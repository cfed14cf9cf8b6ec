"""Files of predicted clips: `samples/` of a run by `sample`, `predictions/` by `predict`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file
from torch import Tensor

from pipelines.errors import UserError
from pipelines.prediction.clips import Clip, GivenVideo
from pipelines.prediction.pictures import (
    RED,
    Strip,
    animation,
    clip_strips,
    contact_sheet,
    file_name,
    framed,
    save_gif,
    save_mp4,
    save_picture,
    to_video,
)
from pipelines.runtime.files import read_json, replacing, write_json
from pipelines.runtime.progress import progress

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


def write_samples(
    folder: Path,
    samples: Samples,
    clips: Sequence[Clip],
    predicted: np.ndarray,
    latents: Tensor,
    title: str,
    fps: float,
) -> None:
    """Write `contact_sheet.png`, `overview.gif`, a GIF and an MP4 per clip, the latents, and `samples.json`.

    `predictions.safetensors` holds raw latents: `latents` [clip, context + horizon, c, h, w] of the first sample, and
    with several samples `samples` [clip, sample, context + horizon, c, h, w].

    Args:
        clips: with the true frames.
        predicted: [clip, sample, context + horizon, h, w, 3] uint8.
        latents: [clip, sample, context + horizon, c, h, w] raw.
        title: of the contact sheet.
    """
    _remove_clips(folder)
    rows = []
    for clip, (first, *others) in zip(clips, predicted, strict=True):
        strips = clip_strips(to_video(clip.frames), first, samples.context)
        strips += [Strip(f"sample {n}", video, samples.context, RED) for n, video in enumerate(others, start=2)]
        rows.append((clip.name, strips))
    shown = rows[:SHEET_CLIPS]
    save_picture(folder / "contact_sheet.png", contact_sheet(shown, title))
    save_gif(folder / "overview.gif", animation(shown), fps)
    for row in progress(rows, description="pictures", unit="clip"):
        video, stem = animation([row]), file_name(row[0])
        save_gif(folder / f"{stem}.gif", video, fps)
        save_mp4(folder / f"{stem}.mp4", video, fps)
    tensors = {"latents": latents[:, 0].cpu().contiguous()}
    if samples.samples > 1:
        tensors["samples"] = latents.cpu().contiguous()
    with replacing(folder / "predictions.safetensors") as temporary:
        save_file(tensors, temporary)
    write_json(folder / "samples.json", samples)


def _remove_clips(folder: Path) -> None:
    """Remove the clips of an earlier call: they may be of another model."""
    try:
        names = read_json(folder / "samples.json", Samples, "").clips
    except UserError:
        return
    for name in names:
        for suffix in ("gif", "mp4"):
            (folder / f"{file_name(name)}.{suffix}").unlink(missing_ok=True)


def write_continuation(
    folder: Path, video: GivenVideo, predicted: np.ndarray, context: int, title: str, marked: bool
) -> Path:
    """Write the continued video as GIF and MP4, and a contact sheet of context and prediction.

    Args:
        video: the written files are named after it, with `-2` and so on for further samples.
        predicted: [sample, context + horizon, h, w, 3] uint8.
        title: of the contact sheet.
        marked: give given frames a green border and predicted ones a red one.
    Returns:
        The GIF of the first sample.
    """
    stem = file_name(video.path.stem)
    labels = [f"sample {n}" for n in range(1, len(predicted) + 1)] if len(predicted) > 1 else ["prediction"]
    strips = [Strip(label, frames, context, RED) for label, frames in zip(labels, predicted, strict=True)]
    save_picture(folder / f"{stem}.png", contact_sheet([(video.path.name, strips)], title))
    for number, frames in enumerate(predicted, start=1):
        whole = np.concatenate([video.frames, frames[context:]])
        shown = framed(Strip("", whole, len(video.frames), RED), scale=1) if marked else whole
        name = stem if number == 1 else f"{stem}-{number}"
        save_gif(folder / f"{name}.gif", shown, video.fps)
        save_mp4(folder / f"{name}.mp4", shown, video.fps)
    return folder / f"{stem}.gif"
