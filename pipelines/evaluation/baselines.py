"""Baselines that know some motion: the last one goes on, or all goes on as after the nearest training clip."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from pipelines.config import RiverConfig
from pipelines.evaluation.measures.measure import ClipBatch, Measure
from pipelines.evaluation.nearest_clips import MemorizationMeasure, TrainingClips
from pipelines.prediction.frame_coding import FrameCoding
from pipelines.prediction.pictures import to_video

MOTION, NEAREST = "constant_motion", "nearest_clip"
# Longer side of the smallest frames whose flow OpenCV estimates.
SMALLEST_SIDE = 12


def continue_motion(given: Tensor, horizon: int) -> Tensor:
    """Let the motion between the last two frames go on.

    Estimator and way to warp were chosen on validation clips of `shapes` and of people, out of dense inverse search
    (DIS) and Farneback's with several settings, and a field that stands, moves with the frames, or carries pixels away.

    Args:
        given: [b, n, 3, h, w] in [-1, 1], n >= 2; h or w >= 12.
    Returns:
        [b, horizon, 3, h, w] in [-1, 1], bilinear; what enters the frame repeats its edge.
    """
    h, w = given.shape[-2:]
    pixel = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy"), dim=-1).to(given)
    scale = 2 / torch.tensor([w - 1, h - 1]).to(given)
    frames, field, following = given[:, -1], motion_fields(given[:, -2:]), []
    for _ in range(horizon):
        # Frame and field move along the field: f(x) <- f(x - v(x)), v(x) <- v(x - v(x)).
        source = (pixel - rearrange(field, "b xy h w -> b h w xy")) * scale - 1
        moved = F.grid_sample(torch.cat([frames, field], 1), source, padding_mode="border", align_corners=True)
        frames, field = moved.split([3, 2], dim=1)
        following.append(frames)
    return torch.stack(following, dim=1)


def motion_fields(pairs: Tensor) -> Tensor:
    """How far what is at each pixel has moved since the frame before, by dense inverse search on gray levels.

    Args:
        pairs: [b, 2, 3, h, w] in [-1, 1].
    Returns:
        [b, 2, h, w] pixels to the right and down.
    """
    import cv2  # takes a quarter of a second

    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    search.setFinestScale(0)  # flow of every pixel, not of blocks
    fields = []
    for pair in to_video(pairs):
        before, last = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in pair)
        fields.append(-search.calc(last, before, None))
    return rearrange(torch.from_numpy(np.stack(fields)), "b h w xy -> b xy h w").to(pairs)


@dataclass(frozen=True)
class Baselines:
    """The baselines of this module that can be had.

    Attributes:
        motion: whether the last motion goes on.
        nearest: whether the nearest training clips do.
        training: the training clips; None: they are not here.
        coding: decodes them.
    """

    motion: bool
    nearest: bool
    training: TrainingClips | None
    coding: FrameCoding | None

    def add(self, batch: ClipBatch) -> ClipBatch:
        """The same clips with these futures, too."""
        futures, latents = dict(batch.futures), dict(batch.latents)
        context, horizon = batch.given.shape[1], batch.truth.shape[1]
        if self.motion:
            futures[MOTION] = continue_motion(batch.given, horizon)[:, None]
        if self.nearest and self.training is not None and self.coding is not None:
            given = latents["truth"][:, 0, :context]
            following = self.training.nearest(given, horizon).following
            latents[NEAREST] = torch.cat([given, following], dim=1)[:, None]
            futures[NEAREST] = self.coding.decode_videos(self.coding.standardization.to_raw(following))[:, None]
        return replace(batch, futures=futures, latents=latents)


def choose_baselines(
    config: RiverConfig, coding: FrameCoding | None
) -> tuple[Baselines, list[Measure], dict[str, str]]:
    """The baselines that can be had, and what else the training clips tell.

    Args:
        coding: the autoencoder; None: there is none.
    Returns:
        The baselines; measures; baseline or measure -> reason, of those that there are not.
    """
    context, horizon = config.evaluation.context, config.evaluation.horizon
    missing: dict[str, str] = {}
    if context < 2:
        missing[MOTION] = "it needs two given frames (evaluation.context); with one it is copying"
    elif max(config.dataset.frame_size) < SMALLEST_SIDE:
        missing[MOTION] = f"it needs images of {SMALLEST_SIDE} pixels a side (dataset.image_size)"
    training, measures = None, list[Measure]()
    try:
        training = TrainingClips.open(config, coding)
    except ValueError as error:
        missing |= dict.fromkeys((NEAREST, MemorizationMeasure.name), str(error))
    else:
        for name, frames in ((NEAREST, context + horizon), (MemorizationMeasure.name, horizon)):
            longest = int(training.cache.lengths.max())
            if frames > longest:
                missing[name] = f"it needs training videos of {frames} frames, and the longest has {longest}"
        if MemorizationMeasure.name not in missing:
            measures.append(MemorizationMeasure(training, horizon))
    return Baselines(MOTION not in missing, NEAREST not in missing, training, coding), measures, missing
