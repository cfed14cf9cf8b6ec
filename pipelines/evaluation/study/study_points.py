"""One sampler setting of a study: metrics of its predictions, with intervals over recordings."""

import json
import time
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from pipelines.errors import UserError
from pipelines.evaluation.measures.frechet import MAX_RESAMPLES, fit_gaussian, frechet_distance, latent_features
from pipelines.evaluation.measures.intervals import Tally, half_width, normal_interval, percentile_interval
from pipelines.evaluation.measures.metrics import Metric, gradient_energy, measure_frames
from pipelines.evaluation.measures.object_audit import audit_objects, match_shapes
from pipelines.prediction.clips import Clip
from pipelines.predictor import VideoPredictor
from pipelines.runtime.results import Interval, StudyPoint
from stage1_autoencoder.videos.shapes import VisibleShapes
from stage2_flow.config import SamplingConfig
from stage2_flow.sampling_plan import SamplingPlan


def point_key(options: SamplingConfig) -> str:
    """What a point's result depends on."""
    return json.dumps(
        options.model_dump(mode="json", exclude={"batch_size", "compile", "cuda_graphs", "decoder"}), sort_keys=True
    )


class StudyClips:
    """The clips that all settings predict, and everything about them that does not depend on the setting."""

    def __init__(
        self,
        predictor: VideoPredictor,
        clips: Sequence[Clip],
        context: int,
        counts: Tensor | None,
        metrics: list[Metric],
        shapes: VisibleShapes | None = None,
    ) -> None:
        """Encode the clips.

        Args:
            clips: two or more.
            context: number of given frames.
            counts: [resamples, clips] of the bootstrap; None: no intervals.
            shapes: the simulator's, in the frames after the given ones; None: not known.
        """
        self.predictor, self.context, self.metrics, self.shapes = predictor, context, metrics, shapes
        self.keys = [(clip.key, 0) for clip in clips]
        frames = torch.stack([clip.frames for clip in clips])
        latents = predictor.encode_videos(frames)
        self.given, self.given_frames, self.truth = latents[:, :context], frames[:, :context], frames[:, context:]
        energy = gradient_energy(self.truth).sum(1)
        # Divided by the mean, so that the numbers of the clips are about 1, as their mean is.
        self.scale, self.edges = energy.mean(), energy / energy.mean()
        self.counts = counts
        # All frames of all clips once, then the resamples.
        self.draws: list[Tensor | None] = [None]
        if counts is not None:
            self.draws += counts[:MAX_RESAMPLES].repeat_interleave(self.truth.shape[1], dim=1)
        real = self._features(latents)
        self.real = [fit_gaussian(real, draw) for draw in self.draws]

    def measure(self, options: SamplingConfig, reference: StudyPoint | None) -> StudyPoint:
        """Predict all clips and measure the predictions.

        Args:
            options: the setting.
            reference: the point to which differences are taken, clip by clip; None: this one is the reference.
        Raises:
            UserError: predictions that are not finite.
        """
        started = time.perf_counter()
        latents = self.predictor.generate_latents(self.given, self.truth.shape[1], sampling=options, keys=self.keys)
        if latents.is_cuda:
            torch.cuda.synchronize(latents.device)
        seconds = time.perf_counter() - started
        if not torch.isfinite(latents).all():
            raise UserError(f"predictions with {SamplingPlan.from_config(options).describe()} are not finite")
        # What is chosen is how latents are predicted: frames are compared as the full decoder shows them.
        full = options.model_copy(update={"decoder": "full"})
        videos = self.predictor.decode_predictions(latents, self.given_frames, sampling=full)
        truth = self.truth.to(videos.device)
        clips = {
            metric.name: Tally.of_values(measure_frames(metric, videos, truth).double().mean(1))
            for metric in self.metrics
        }
        clips["sharpness"] = Tally(gradient_energy(videos).sum(1) / self.scale, self.edges)

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
            "whole": None,
        }
        if self.shapes is not None:
            measured["whole"] = float(
                audit_objects(match_shapes(videos, self.shapes), self.shapes)["whole"].mean().mean()
            )
        for name, tally in clips.items():
            of_reference = tally.total.tolist() if reference is None else reference.per_clip[name]
            difference = Tally(tally.total - torch.tensor(of_reference, dtype=torch.float64), tally.count)
            measured |= {
                name: float(tally.mean()),
                f"{name}_interval": self._interval(tally),
                f"{name}_difference": float(difference.mean()),
                f"{name}_difference_interval": self._interval(difference),
            }
        plan = SamplingPlan.from_config(options)
        return StudyPoint(
            key=point_key(options),
            solver=plan.solver.name,
            **options.model_dump(include={"warm_start", "condition", "seed", "preset"}),
            steps=plan.steps,
            nfe=plan.evaluations,
            per_clip={name: tally.total.tolist() for name, tally in clips.items()},
            frechet_resampled=resampled,
            milliseconds_per_frame=1000 * seconds / (len(self.keys) * self.truth.shape[1]),
            **measured,
        )

    def _interval(self, tally: Tally) -> Interval | None:
        return None if self.counts is None else tuple(percentile_interval(tally.resampled(self.counts)).tolist())

    def _features(self, latents: Tensor) -> Tensor:
        """[clips x horizon, d] of raw latents [clips, context + horizon, c, h, w]."""
        features = latent_features(self.predictor.standardization.to_final(latents), self.context)
        return rearrange(features, "b n d -> (b n) d")
