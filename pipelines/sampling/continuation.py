"""Clips of a split, or a user's video, are continued by a trained run and written."""

import itertools
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.config import RiverConfig
from pipelines.errors import StoppedBySignal, UserError
from pipelines.prediction.clips import GivenVideo, open_clips
from pipelines.prediction.pictures import to_video
from pipelines.prediction.samples import SHEET_CLIPS, Samples, write_continuation, write_live, write_samples
from pipelines.predictor import VideoPredictor, load_predictor
from pipelines.runtime.context import RunContext
from pipelines.runtime.progress import progress, say
from pipelines.runtime.signals import StopRequest
from stage1_autoencoder.autoencoder import image_to_unit

# Follows the description of such a sampler.
CHOSEN = " (chosen by `study`)"


def sample_clips(
    config: RiverConfig, run_context: RunContext, videos: int = SHEET_CLIPS, refine: bool = False, samples: int = 1
) -> Path:
    """Predict clips of the protocol's split with a trained run; write pictures and latents, see `write_samples`.

    Args:
        videos: number of clips.
        refine: refine predicted frames.
        samples: different predictions per clip.
    Returns:
        The folder `samples` of the run.
    Raises:
        UserError: no clips; `refine` without a refiner.
    """
    predictor = load_predictor(config, run_context, min(videos, config.evaluation.batch_size) * samples)
    clips = list(open_clips(config, run_context, videos))
    context, horizon, size = config.evaluation.context, config.evaluation.horizon, config.evaluation.batch_size
    how, several = predictor.describe_sampling(refine), f", {samples} samples of each" if samples > 1 else ""
    chosen = CHOSEN if predictor.sampler_is_chosen else ""
    computed = f"{how}{chosen}{predictor.describe_threads()}"
    say(f"sample: {len(clips)} clips, {context} frames given, {horizon} predicted{several}, {computed}")
    latents, pixels = [], []
    with progress(total=len(clips), description="predict", unit="clip") as bar:
        for batch in (clips[first : first + size] for first in range(0, len(clips), size)):
            given, keys = torch.stack([clip.frames[:context] for clip in batch]), [(clip.key, 0) for clip in batch]
            encoded = predictor.encode_videos(given)
            latents.append(predictor.generate_latents(encoded, horizon, keys=keys, samples=samples))
            real = given.repeat_interleave(samples, dim=0)
            reconstructed = predictor.decode_videos(latents[-1][:, :context])
            predicted = predictor.decode_predictions(latents[-1], real, refine=refine)
            pixels.append(to_video(torch.cat([reconstructed, predicted], 1)))
            bar.update(len(batch))
    folder = config.run_path / "samples"
    listed = Samples(
        clips=[clip.name for clip in clips],
        fps=[clip.fps for clip in clips],
        context=context,
        horizon=horizon,
        sampling=predictor.resolved_sampling(predictor.sampling, context, horizon).model_dump(mode="json"),
        samples=samples,
        refine=refine,
    )
    title = (
        f"{config.dataset.name}, {config.evaluation.split} split: {context} frames given, {horizon} predicted ({how})"
    )
    predicted = np.concatenate(pixels)
    predicted = predicted.reshape(len(clips), samples, *predicted.shape[1:])
    raw = torch.cat(latents).unflatten(0, (len(clips), samples))
    write_samples(folder, listed, clips, predicted, raw, title)
    say(f"sample: {folder}/contact_sheet.png, overview.gif and {len(clips)} clips as GIF and MP4")
    return folder


def continue_video(
    config: RiverConfig,
    run_context: RunContext,
    video: GivenVideo,
    frames: int | None = None,
    refine: bool = False,
    marked: bool = False,
    samples: int = 1,
) -> Path:
    """Continue a user's video from its last `evaluation.context` frames.

    It is written to the run's folder `predictions`, see `write_continuation`.

    Args:
        frames: to predict; None: `evaluation.horizon`.
        refine: refine predicted frames.
        marked: give given frames a green border and predicted ones a red one.
        samples: different continuations; the files of the second one end in `-2`, and so on.
    Returns:
        The GIF of the first sample.
    Raises:
        UserError: `refine` without a refiner.
    """
    context, horizon = config.evaluation.context, frames or config.evaluation.horizon
    predictor, given = _begin(config, run_context, video, f"{horizon} predicted", samples, refine)
    predicted = to_video(predictor.generate_frames(given, horizon, samples=samples, refine=refine, verbose=True))
    title = f"{video.path.name}: {context} frames given, {horizon} predicted{', refined' if refine else ''}"
    gif = write_continuation(config.run_path / "predictions", video, predicted, context, title, marked)
    h, w = predicted.shape[2:4]
    say(f"predict: {gif.parent}/{gif.stem}.mp4, .gif and .png: {video.length} + {horizon} frames of {w}x{h}")
    return gif


def continue_live(
    config: RiverConfig,
    run_context: RunContext,
    video: GivenVideo,
    frames: int | None = None,
    marked: bool = False,
    samples: int = 1,
) -> Path:
    """Continue a user's video on and on, until a signal ends it, and write the frames as they come, see `write_live`.

    Args:
        frames: to predict; None: without end.
        marked, samples: as in `continue_video`.
    Returns:
        The MP4 of the first sample.
    Raises:
        StoppedBySignal: after the MP4 was written.
        UserError: after it was written, too: the prediction is not finite.
    """
    context, done, broken = config.evaluation.context, 0, None
    plan = "predicted until Ctrl-C" if frames is None else f"{frames} predicted"
    predictor, given = _begin(config, run_context, video, plan, samples)
    with (
        StopRequest() as stop,
        progress(total=frames, description="predict", unit="frame") as bar,
        closing(predictor.stream(given, samples=samples)) as stream,
    ):

        def predicted() -> Iterator[np.ndarray]:
            nonlocal done, broken
            try:
                for frame in itertools.islice(stream, frames):
                    yield to_video(frame)
                    done += 1
                    bar.update()
                    if stop:
                        return
            except UserError as error:
                if not done:
                    raise
                broken = error

        mp4 = write_live(config.run_path / "predictions", video, predicted(), context, samples, marked)
    written = f"{mp4}: {video.length} + {done} frames"
    if broken is not None:
        raise UserError(f"{broken}; written before: {written}")
    if stop:
        raise StoppedBySignal(stop.signal_number, written)
    say(f"predict: {written}")
    return mp4


def _begin(
    config: RiverConfig, run_context: RunContext, video: GivenVideo, plan: str, samples: int, refine: bool = False
) -> tuple[VideoPredictor, Tensor]:
    """The run's predictor and the given frames [1, n, 3, h, w], after a line that says what is predicted."""
    predictor, context = load_predictor(config, run_context, samples), config.evaluation.context
    several = f", {samples} samples" if samples > 1 else ""
    say(
        f"predict: {video.path}: last {context} of {video.length} frames given, {plan}{several}, "
        f"{predictor.describe_sampling(refine)}{CHOSEN if predictor.sampler_is_chosen else ''}"
        f"{predictor.describe_threads()}"
    )
    return predictor, image_to_unit(torch.from_numpy(video.frames[-context:]))[None]
