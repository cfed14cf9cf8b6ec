"""`sample` and `predict`: predicted videos as GIF, MP4, contact sheet and latents."""

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import save_file

from pipelines.clips import Clip, load_clips
from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.pictures import RED, Strip, animation, clip_strips, contact_sheet, save_gif, save_mp4
from pipelines.predictor import VideoPredictor, to_video
from pipelines.runtime.progress import progress, say
from pipelines.runtime.session import Session
from pipelines.train_flow import find_flow, train_flow
from pipelines.train_refiner import find_refiner, train_refiner
from stage1_autoencoder.autoencoder import image_to_unit
from stage1_autoencoder.videos import open_video
from stage2_flow.rollout import SamplingPlan

SHEET_CLIPS = 8


def sample(config: RiverConfig, session: Session, videos: int = SHEET_CLIPS, refine: bool = False) -> Path:
    """Predict clips of the protocol's split; trains what lacks first, with `refine` also the refiner.

    Writes to `runs/<name>/samples`: `contact_sheet.png`, `overview.gif`, a GIF and an MP4 a clip, and
    `predictions.safetensors` with the raw latents [clip, context + horizon, c, h, w].

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
    say(f"sample: {len(clips)} clips, {context} frames given, {horizon} predicted, {how}")
    latents = predict_clips(predictor, clips, context, horizon, config.evaluation.batch_size, sample_number=0)
    frames = decode_clips(predictor, clips, latents, context, refine)
    folder = config.run_path / "samples"
    write_samples(folder, config, predictor, clips, frames, refine)
    save_file({"latents": latents.cpu().contiguous()}, folder / "predictions.safetensors")
    say(f"sample: {folder}/contact_sheet.png, overview.gif and {len(clips)} clips as GIF and MP4")
    return folder


def load_predictor(config: RiverConfig, session: Session) -> VideoPredictor:
    """The predictor of the configuration's run, with the configuration's sampling options."""
    predictor = VideoPredictor.from_run(config.run_path, session.device)
    try:
        SamplingPlan.from_config(config.sampling)
    except ValueError as error:
        raise UserError(str(error)) from None
    return replace(predictor, sampling=config.sampling)


def describe_sampling(predictor: VideoPredictor, refine: bool = False) -> str:
    """One phrase on how frames are integrated, for people."""
    plan = SamplingPlan.from_config(predictor.sampling)
    refined = ", refined" if refine else ""
    return f"{plan.solver.name}, {plan.evaluations} evaluations a frame, warm start {plan.warm_start:g}{refined}"


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
    frames: torch.Tensor,
    refine: bool = False,
) -> None:
    """Write contact sheet, overview and one GIF and MP4 a clip."""
    folder.mkdir(parents=True, exist_ok=True)
    _remove_former(folder)
    context = config.evaluation.context
    predicted = to_video(frames)
    truth = to_video(torch.stack([clip.frames for clip in clips]))
    rows = [(clip.name, clip_strips(truth[i], predicted[i], context)) for i, clip in enumerate(clips)]
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
        "refine": refine,
    }
    (folder / "samples.json").write_text(json.dumps(protocol, indent=1), encoding="utf-8")


def _remove_former(folder: Path) -> None:
    """Remove the clips of the call before: beside newer ones nobody could tell which model made them."""
    try:
        names = json.loads((folder / "samples.json").read_text(encoding="utf-8"))["clips"]
    except (OSError, ValueError, KeyError):
        return
    for name in names:
        for ending in ("gif", "mp4"):
            (folder / f"{file_name(name)}.{ending}").unlink(missing_ok=True)


def predict(
    config: RiverConfig, session: Session, video: Path, frames: int | None = None, refine: bool = False
) -> Path:
    """Continue any video file: its last `evaluation.context` frames are the context; trains what lacks first.

    Writes `<run>/predictions/<name>.gif`, `.mp4` and `.png`.

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
    given = image_to_unit(torch.from_numpy(source.read(0, range(length - context, length))))[None]
    if find_flow(config.run_path) is None:
        train_flow(config, session.for_prerequisites())
    if refine and find_refiner(config.run_path) is None:
        train_refiner(config, session.for_prerequisites())
    predictor = load_predictor(config, session)
    say(f"predict: {video}: last {context} frames given, {horizon} predicted, {describe_sampling(predictor, refine)}")
    predicted = to_video(predictor.generate_frames(given, horizon, refine=refine, verbose=True))[0]
    folder = config.run_path / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    strips = [Strip("prediction", predicted, context, RED)]
    stem = file_name(video.stem)
    title = f"{video.name}: {context} frames given, {horizon} predicted{', refined' if refine else ''}"
    contact_sheet([(video.name, strips)], title).save(folder / f"{stem}.png")
    shown = animation([(video.name, strips)])
    save_gif(folder / f"{stem}.gif", shown, fps)
    save_mp4(folder / f"{stem}.mp4", shown, fps)
    say(f"predict: {folder}/{stem}.gif, .mp4 and .png")
    return folder / f"{stem}.gif"


def file_name(video_id: str) -> str:
    """A video's id as a file name that every file system takes."""
    return re.sub(r"[^\w.@-]+", "_", video_id).strip("._") or "video"


def flatten(videos: torch.Tensor) -> torch.Tensor:
    """[b, n, 3, h, w] to [b n, 3, h, w]."""
    return rearrange(videos, "b n c h w -> (b n) c h w")
