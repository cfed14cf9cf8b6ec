"""One sampler setting of a study: metrics of its predictions, with intervals over recordings."""

import json
import time
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from pipelines.evaluation.frechet import fit_gaussian, frechet_distance
from pipelines.evaluation.intervals import half_width, mean_interval, normal_interval
from pipelines.evaluation.metrics import Metric, flatten, measure_frames
from pipelines.evaluation.results import Interval, StudyPoint
from pipelines.prediction.clips import Clip
from pipelines.predictor import VideoPredictor
from stage2_flow.config import SamplingConfig
from stage2_flow.sampling_plan import SamplingPlan

# Of the Fréchet distance, where each resample takes a singular value decomposition.
DISTANCE_RESAMPLES = 200
# Side to which maps of latents are averaged before their statistics are taken.
POOLED_SIDE = 2


def point_key(options: SamplingConfig) -> str:
    """What a point's result depends on."""
    return json.dumps(options.model_dump(mode="json", exclude={"batch_size", "compile", "cuda_graphs"}), sort_keys=True)


class StudyClips:
    """The clips that all settings predict, and everything about them that does not depend on the setting."""

    def __init__(
        self,
        predictor: VideoPredictor,
        clips: Sequence[Clip],
        context: int,
        counts: Tensor | None,
        metrics: list[Metric],
    ) -> None:
        """Encode the clips.

        Args:
            clips: two or more.
            context: number of given frames.
            counts: [resamples, clips] of the bootstrap; None: no intervals.
        """
        self.predictor, self.context, self.metrics = predictor, context, metrics
        self.keys = [(clip.key, 0) for clip in clips]
        frames = torch.stack([clip.frames for clip in clips])
        latents = predictor.encode_videos(frames)
        self.given, self.truth = latents[:, :context], frames[:, context:]
        self.edges = mean_gradient(predictor.decode_videos(latents[:, context:]).cpu())
        self.counts = counts
        # All frames of all clips once, then the resamples.
        self.draws: list[Tensor | None] = [None]
        if counts is not None:
            self.draws += counts[:DISTANCE_RESAMPLES].repeat_interleave(self.truth.shape[1], dim=1)
        real = self._features(latents)
        self.real = [fit_gaussian(real, draw) for draw in self.draws]

    def measure(self, options: SamplingConfig, reference: StudyPoint | None) -> StudyPoint:
        """Predict all clips and measure the predictions.

        Args:
            options: the setting.
            reference: the point to which differences are taken, clip by clip; None: this one is the reference.
        """
        started = time.perf_counter()
        latents = self.predictor.generate_latents(self.given, self.truth.shape[1], sampling=options, keys=self.keys)
        if latents.is_cuda:
            torch.cuda.synchronize(latents.device)
        seconds = time.perf_counter() - started
        videos = self.predictor.decode_videos(latents[:, self.context :])
        truth = self.truth.to(videos.device)
        clips = {metric.name: measure_frames(metric, videos, truth).double().mean(1) for metric in self.metrics}
        clips["sharpness"] = mean_gradient(videos.cpu()) / self.edges

        features = self._features(latents)
        pairs = zip(self.draws, self.real, strict=True)
        distance, *resampled = [frechet_distance(fit_gaussian(features, draw), real) for draw, real in pairs]
        difference = 0.0 if reference is None else distance - reference.frechet
        interval, difference_interval = None, None
        if resampled:
            # Over differences of resamples: both distances change in the same way with the drawn clips.
            half = half_width(np.subtract(resampled, resampled if reference is None else reference.frechet_resampled))
            interval, difference_interval = normal_interval(distance, resampled), (difference - half, difference + half)
        measured = {
            "frechet": distance,
            "frechet_interval": interval,
            "frechet_difference": difference,
            "frechet_difference_interval": difference_interval,
        }
        for name, values in clips.items():
            of_reference = values.tolist() if reference is None else reference.per_clip[name]
            differences = values - torch.tensor(of_reference, dtype=torch.float64)
            measured |= {
                name: float(values.mean()),
                f"{name}_interval": self._interval(values),
                f"{name}_difference": float(differences.mean()),
                f"{name}_difference_interval": self._interval(differences),
            }
        plan = SamplingPlan.from_config(options)
        return StudyPoint(
            key=point_key(options),
            solver=plan.solver.name,
            **options.model_dump(include={"warm_start", "condition", "seed", "preset"}),
            steps=plan.steps,
            nfe=plan.evaluations,
            per_clip={name: values.tolist() for name, values in clips.items()},
            frechet_resampled=resampled,
            milliseconds_per_frame=1000 * seconds / (len(self.keys) * self.truth.shape[1]),
            **measured,
        )

    def _interval(self, values: Tensor) -> Interval | None:
        return None if self.counts is None else tuple(mean_interval(values, self.counts).tolist())

    def _features(self, latents: Tensor) -> Tensor:
        """[clips x horizon, d] of raw latents [clips, context + horizon, c, h, w]."""
        features = latent_features(self.predictor.standardization.to_final(latents), self.context)
        return rearrange(features, "b n d -> (b n) d")


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
