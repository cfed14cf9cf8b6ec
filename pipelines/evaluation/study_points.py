"""One sampler setting of a study: metrics of its predictions, with intervals over videos."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from pipelines.evaluation.frechet import fit_gaussian, frechet_distance
from pipelines.evaluation.intervals import HALF_WIDTH, draw_counts, mean_interval, normal_interval
from pipelines.evaluation.metrics import PSNR, SSIM, flatten, lpips_metric, measure_frames
from pipelines.evaluation.results import StudyPoint
from pipelines.prediction.clips import Clip
from pipelines.predictor import VideoPredictor
from stage1_autoencoder.lpips import LPIPS
from stage2_flow.config import SamplingConfig
from stage2_flow.sampling_plan import SamplingPlan

RESAMPLES = 2000
# Of the Fréchet distance, where each resample takes a singular value decomposition.
DISTANCE_RESAMPLES = 200
# Side to which maps of latents are averaged before their statistics are taken.
POOLED_SIDE = 2


@dataclass(frozen=True, eq=False)
class Predicted:
    """Values of each clip, for differences and intervals.

    Attributes:
        metrics: name -> [clips] float64, means over the predicted frames.
        features: [clips, horizon, d], see `latent_features`.
        seconds: of predicting all clips, without decoding.
    """

    metrics: dict[str, Tensor]
    features: Tensor
    seconds: float


class StudyClips:
    """The clips that all settings predict, and everything about them that does not depend on the setting."""

    def __init__(
        self, predictor: VideoPredictor, clips: Sequence[Clip], context: int, seed: int, lpips: LPIPS | None
    ) -> None:
        self.predictor, self.context = predictor, context
        self.metrics = [PSNR, SSIM] if lpips is None else [PSNR, SSIM, lpips_metric(lpips)]
        self.keys = [(clip.key, 0) for clip in clips]
        frames = torch.stack([clip.frames for clip in clips])
        latents = predictor.encode_videos(frames)
        self.given, self.truth = latents[:, :context], frames[:, context:]
        self.features = latent_features(predictor.standardization.to_final(latents), context)
        self.edges = mean_gradient(predictor.decode_videos(latents[:, context:]).cpu())
        self.counts = draw_counts([clip.video for clip in clips], RESAMPLES, seed)

    def predict(self, options: SamplingConfig) -> Predicted:
        """Predict all clips and measure each."""
        started = time.perf_counter()
        latents = self.predictor.generate_latents(self.given, self.truth.shape[1], sampling=options, keys=self.keys)
        if latents.is_cuda:
            torch.cuda.synchronize(latents.device)
        seconds = time.perf_counter() - started
        videos = self.predictor.decode_videos(latents[:, self.context :])
        truth = self.truth.to(videos.device)
        values = {metric.name: measure_frames(metric, videos, truth).double().mean(1) for metric in self.metrics}
        values["sharpness"] = mean_gradient(videos.cpu()) / self.edges
        features = latent_features(self.predictor.standardization.to_final(latents), self.context)
        return Predicted(metrics=values, features=features, seconds=seconds)

    def measure(self, key: str, options: SamplingConfig, reference: StudyPoint | None) -> StudyPoint:
        """Measure one setting.

        Args:
            key: of the point.
            options: the setting.
            reference: the point to which differences are taken, clip by clip; None: this one is the reference.
        """
        predicted, plan = self.predict(options), SamplingPlan.from_config(options)
        measured = self._distance(predicted.features, reference)
        for name, values in predicted.metrics.items():
            of_reference = values.tolist() if reference is None else reference.per_clip[name]
            difference = values - torch.tensor(of_reference, dtype=torch.float64)
            measured |= {
                name: float(values.mean()),
                f"{name}_interval": mean_interval(values, self.counts).tolist(),
                f"{name}_difference": float(difference.mean()),
                f"{name}_difference_interval": mean_interval(difference, self.counts).tolist(),
            }
        return StudyPoint(
            key=key,
            solver=plan.solver.name,
            warm_start=options.warm_start,
            condition=options.condition,
            seed=options.seed,
            preset=options.preset,
            steps=plan.steps,
            nfe=plan.evaluations,
            per_clip={name: values.tolist() for name, values in predicted.metrics.items()},
            milliseconds_per_frame=1000 * predicted.seconds / (len(self.keys) * self.truth.shape[1]),
            **measured,
        )

    def _distance(self, features: Tensor, reference: StudyPoint | None) -> dict[str, Any]:
        """The Fréchet distance between features of predicted and real latents, over all frames of all clips.

        The interval of its difference to the reference is taken over differences of resamples: both distances change
        in the same way with the drawn clips.
        """
        frames = features.shape[1]
        ours, real = (rearrange(values, "b n d -> (b n) d") for values in (features, self.features))
        distance = frechet_distance(fit_gaussian(ours), fit_gaussian(real))
        counts = self.counts[:DISTANCE_RESAMPLES].repeat_interleave(frames, dim=1)
        resampled = [frechet_distance(fit_gaussian(ours, count), fit_gaussian(real, count)) for count in counts]
        difference, half = 0.0, 0.0
        if reference is not None:
            difference = distance - reference.frechet
            half = HALF_WIDTH * float((np.asarray(resampled) - np.asarray(reference.frechet_resampled)).std(ddof=1))
        return {
            "frechet": distance,
            "frechet_interval": normal_interval(distance, resampled),
            "frechet_difference": difference,
            "frechet_difference_interval": (difference - half, difference + half),
            "frechet_resampled": resampled,
        }


def latent_features(latents: Tensor, context: int) -> Tensor:
    """Features for the Fréchet distance of latents: where things are, and how they change.

    Args:
        latents: [b, n, c, h, w] final latents.
        context: number of given frames at the beginning.
    Returns:
        [b, n - context, d] float64 on the CPU, d = 2 c POOLED_SIDE^2: each frame's latents, and the absolute
        differences to the frame before, averaged over the parts of the map.
    """
    frames, changes = latents[:, context:], (latents[:, context:] - latents[:, context - 1 : -1]).abs()
    pooled = [F.adaptive_avg_pool2d(flatten(part), POOLED_SIDE).flatten(1) for part in (frames, changes)]
    return torch.cat(pooled, dim=1).view(len(latents), frames.shape[1], -1).double().cpu()


def mean_gradient(videos: Tensor) -> Tensor:
    """[b] float64: mean absolute difference of neighboring pixels of [b, n, 3, h, w]; lower for blurred videos."""
    across, down = videos.diff(dim=-1).abs(), videos.diff(dim=-2).abs()
    return (across.mean((1, 2, 3, 4)) + down.mean((1, 2, 3, 4))).double()
