"""Files of predicted clips: `samples/` of a run by `sample`, `predictions/` by `predict`."""

import itertools
import statistics
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, computed_field
from safetensors.torch import save
from torch import Tensor

from pipelines.errors import UserError
from pipelines.prediction.clips import Clip, GivenVideo
from pipelines.prediction.pictures import (
    LEGIBLE_SIDE,
    RED,
    Strip,
    animation,
    clip_strips,
    contact_sheet,
    enlargement,
    file_names,
    framed,
    save_gif,
    save_mp4,
    save_picture,
    to_video,
    writing_mp4,
)
from pipelines.runtime.files import read_json, replacing_files, write_bytes, write_json
from pipelines.runtime.progress import progress

SHEET_CLIPS = 8
OVERVIEW = "overview"


class Samples(BaseModel):
    """`samples.json`: each clip's pictures are beside it, as one of `files` with `.gif` and `.mp4`.

    Attributes:
        clips: names.
        fps: frames per second of each clip.
        context, horizon: given and predicted frames of each clip.
        sampling: the settings as dumped from the configuration.
        samples: predictions per clip.
        refine: whether predicted frames are refined.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    clips: list[str] = Field(min_length=1)
    fps: list[PositiveFloat]
    context: int = Field(ge=1)
    horizon: int = Field(ge=1)
    sampling: dict[str, Any]
    samples: int
    refine: bool

    @computed_field
    @property
    def files(self) -> list[str]:
        """Names of each clip's files, without suffix."""
        return file_names(self.clips, taken=[OVERVIEW])


class Continuation(BaseModel):
    """`<name>.json`: the video that the files of this name continue.

    Attributes:
        video: path of the file or folder.
        fingerprint: of its content.
        fps: frames per second.
        frames: of the whole video; the last `context` were given.
        horizon: predicted frames.
        samples: continuations; the files of the second one end in `-2`, and so on.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    video: Path
    fingerprint: str
    fps: PositiveFloat
    frames: PositiveInt
    context: PositiveInt
    horizon: PositiveInt
    samples: int = Field(ge=1, le=100_000)

    @classmethod
    def of(cls, video: GivenVideo, context: int, horizon: int, samples: int) -> "Continuation":
        return cls(
            video=video.path.absolute(),
            fingerprint=video.fingerprint,
            fps=video.fps,
            frames=video.length,
            context=context,
            horizon=horizon,
            samples=samples,
        )

    def files(self, name: str) -> list[str]:
        """Names of each sample's files, without suffix, if those of the first are called `name`."""
        return [name, *(f"{name}-{number}" for number in range(2, self.samples + 1))]


def write_samples(
    folder: Path,
    samples: Samples,
    clips: Sequence[Clip],
    predicted: np.ndarray,
    latents: Tensor,
    title: str,
) -> None:
    """Write `contact_sheet.png`, `overview.gif`, a GIF and an MP4 per clip, the latents, and `samples.json`.

    Each clip plays at its own rate; the overview shows all of them frame by frame, at the most common one.

    `predictions.safetensors` holds raw latents: `latents` [clip, context + horizon, c, h, w] of the first sample, and
    with several samples `samples` [clip, sample, context + horizon, c, h, w].

    Args:
        clips: with the true frames.
        predicted: [clip, sample, context + horizon, h, w, 3] uint8.
        latents: [clip, sample, context + horizon, c, h, w] raw.
        title: of the contact sheet.
    """
    rows = []
    for clip, (first, *others) in zip(clips, predicted, strict=True):
        strips = clip_strips(to_video(clip.frames), first, samples.context)
        strips += [Strip(f"sample {n}", video, samples.context, RED) for n, video in enumerate(others, start=2)]
        rows.append((clip.name, strips))
    shown = rows[:SHEET_CLIPS]
    stale = set(_clip_files(folder)) - {*samples.files}
    with replacing_files(folder, "samples.json", _with_suffixes(stale)) as new:
        save_picture(new / "contact_sheet.png", contact_sheet(shown, title))
        save_gif(new / f"{OVERVIEW}.gif", animation(shown), statistics.mode(samples.fps[:SHEET_CLIPS]))
        pictures = zip(rows, samples.files, samples.fps, strict=True)
        for row, stem, fps in progress(pictures, total=len(rows), description="pictures", unit="clip"):
            video = animation([row])
            save_gif(new / f"{stem}.gif", video, fps)
            save_mp4(new / f"{stem}.mp4", video, fps)
        # Of one clip, `contiguous` alone would leave a view into `samples`, which safetensors refuses.
        tensors = {"latents": latents[:, 0].cpu().contiguous().clone()}
        if samples.samples > 1:
            tensors["samples"] = latents.cpu().contiguous()
        write_bytes(new / "predictions.safetensors", save(tensors))
        write_json(new / "samples.json", samples)


def _clip_files(folder: Path) -> list[str]:
    """Names of the files of an earlier call's clips, which may be of another model."""
    try:
        return read_json(folder / "samples.json", Samples, "").files
    except UserError:
        return []


def _with_suffixes(names: Iterable[str]) -> list[str]:
    return [f"{name}.{suffix}" for name, suffix in itertools.product(names, ("gif", "mp4"))]


def write_continuation(
    folder: Path, video: GivenVideo, predicted: np.ndarray, context: int, title: str, marked: bool
) -> Path:
    """Write the continued video as GIF and MP4, a contact sheet of context and prediction, and a `Continuation`.

    Small frames are enlarged. Files of the same video are replaced; those of another one of the same name stay.

    Args:
        video: the written files are named after it, with `-2` and so on for further samples.
        predicted: [sample, context + horizon, h, w, 3] uint8.
        title: of the contact sheet.
        marked: give given frames a green border and predicted ones a red one.
    Returns:
        The GIF of the first sample.
    """
    listed = Continuation.of(video, context, horizon=predicted.shape[1] - context, samples=len(predicted))
    stem, old = _choose_name(folder, listed)
    labels = [f"sample {n}" for n in range(1, len(predicted) + 1)] if len(predicted) > 1 else ["prediction"]
    strips = [Strip(label, frames, context, RED) for label, frames in zip(labels, predicted, strict=True)]
    scale = enlargement(max(predicted.shape[2:4]), LEGIBLE_SIDE)
    with replacing_files(folder, f"{stem}.json", _with_suffixes(old - set(listed.files(stem)))) as new:
        save_picture(new / f"{stem}.png", contact_sheet([(video.path.name, strips)], title))
        for name, frames in zip(listed.files(stem), predicted, strict=True):
            whole = np.concatenate([video.frames, frames[context:]])
            shown = framed(Strip("", whole, len(video.frames), RED), scale=1) if marked else whole
            save_gif(new / f"{name}.gif", shown, video.fps, scale)
            save_mp4(new / f"{name}.mp4", shown, video.fps, scale)
        write_json(new / f"{stem}.json", listed)
    return folder / f"{stem}.gif"


def write_live(
    folder: Path, video: GivenVideo, predicted: Iterable[np.ndarray], context: int, samples: int, marked: bool
) -> Path:
    """Write the continued video as MP4 alone, each frame as soon as it is predicted, and a `Continuation`.

    The files are there when the frames end; otherwise as `write_continuation`.

    Args:
        predicted: at least one frame of each sample: [sample, h, w, 3] uint8.
    Returns:
        The MP4 of the first sample.
    """

    def shown(frames: np.ndarray, given: int) -> np.ndarray:
        return framed(Strip("", frames, given, RED), scale=1) if marked else frames

    listed, horizon = Continuation.of(video, context, horizon=1, samples=samples), 0
    stem, old = _choose_name(folder, listed)
    given, scale = shown(video.frames, len(video.frames)), enlargement(max(video.frames.shape[1:3]), LEGIBLE_SIDE)
    with replacing_files(folder, f"{stem}.json", [*_with_suffixes(old), f"{stem}.png"]) as new:
        with ExitStack() as files:
            paths = [new / f"{name}.mp4" for name in listed.files(stem)]
            writers = [files.enter_context(writing_mp4(path, given.shape[1:3], video.fps, scale)) for path in paths]
            for frame, write in itertools.product(given, writers):
                write(frame)
            for horizon, frames in enumerate(predicted, start=1):  # noqa: B007
                for frame, write in zip(shown(frames, 0), writers, strict=True):
                    write(frame)
        write_json(new / f"{stem}.json", listed.model_copy(update={"horizon": horizon}))
    return folder / f"{stem}.mp4"


def _choose_name(folder: Path, listed: Continuation) -> tuple[str, set[str]]:
    """Choose the name of a continuation's files, and take it, whatever happens next.

    Returns:
        Its video's name, with `_2` and so on where others have it; and the names of the same video's files so far.
    """
    own: set[str] = set()
    for file in folder.glob("*.json"):
        with suppress(UserError):  # a file that cannot be read keeps its name
            other = read_json(file, Continuation, "")
            if (other.fingerprint, other.video.name) == (listed.fingerprint, listed.video.name):
                own |= {*other.files(file.stem)}
    taken = {file.stem for file in folder.glob("*")} - own
    (stem,) = file_names([listed.video.stem], taken, endings=listed.files(""))
    if not own:
        write_json(folder / f"{stem}.json", listed)
    return stem, own
