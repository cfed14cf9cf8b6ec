"""`predict`: continue any video file."""

from pathlib import Path

import numpy as np
import torch

from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.prediction.pictures import RED, Strip, contact_sheet, file_name, framed, save_gif, save_mp4
from pipelines.predictor import describe_sampling, load_predictor, to_video
from pipelines.runtime.context import RunContext
from pipelines.runtime.progress import say
from stage1_autoencoder.autoencoder import image_to_unit
from stage1_autoencoder.videos import open_video

# Frames before the prediction that the continued clip shows; more would have to be held in memory.
MOST_FRAMES_SHOWN = 1000


def predict(
    config: RiverConfig,
    run_context: RunContext,
    video: Path,
    frames: int | None = None,
    refine: bool = False,
    marked: bool = False,
    samples: int = 1,
) -> Path:
    """Continue any video file: its last `evaluation.context` frames are the context; trains what lacks first.

    Writes `<run>/predictions/<name>.mp4` and `.gif`, the continued clip in the model's size: the video's frames as
    they went in (of a long one the last thousand), then the predicted ones; and `.png`, a contact sheet of context and
    prediction.

    Args:
        frames: how many to predict; None: `evaluation.horizon`.
        marked: frame what was given green, and what was predicted red.
        samples: different continuations; the second one's files end in `-2`, and so on.
    Raises:
        UserError: the video is shorter than the context.
        VideoError: it can't be read.
    """
    context, horizon = config.evaluation.context, frames or config.evaluation.horizon
    source = open_video(config.dataset, video)
    length, fps = source.videos[0].frames, source.videos[0].fps
    if length < context:
        raise UserError(
            f"{video}: {length} frames after dataset.frame_step {config.dataset.frame_step}, but evaluation.context is "
            f"{context}: take a longer video or --set evaluation.context={length}"
        )
    clip = source.read(0, range(max(0, length - MOST_FRAMES_SHOWN), length))
    given = image_to_unit(torch.from_numpy(clip[-context:]))[None]
    predictor = load_predictor(config, run_context)
    several = f", {samples} samples" if samples > 1 else ""
    how = describe_sampling(predictor, refine)
    say(f"predict: {video}: last {context} of {length} frames given, {horizon} predicted{several}, {how}")
    generated = predictor.generate_frames(given, horizon, samples=samples, refine=refine, verbose=True)
    predicted = to_video(generated)
    folder = config.run_path / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    stem = file_name(video.stem)
    title = f"{video.name}: {context} frames given, {horizon} predicted{', refined' if refine else ''}"
    strips = [
        Strip(f"sample {n}" if samples > 1 else "prediction", p, context, RED) for n, p in enumerate(predicted, 1)
    ]
    contact_sheet([(video.name, strips)], title).save(folder / f"{stem}.png")
    for number, frames_of_sample in enumerate(predicted, start=1):
        whole = np.concatenate([clip, frames_of_sample[context:]])
        shown = framed(Strip("", whole, len(clip), RED), scale=1) if marked else whole
        name = stem if number == 1 else f"{stem}-{number}"
        save_gif(folder / f"{name}.gif", shown, fps)
        save_mp4(folder / f"{name}.mp4", shown, fps)
    say(
        f"predict: {folder}/{stem}.mp4, .gif and .png: {length} + {horizon} frames of {whole.shape[2]}x{whole.shape[1]}"
    )
    return folder / f"{stem}.gif"
