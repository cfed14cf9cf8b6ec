"""What `study` measures of one way to sample: metrics of its predictions, with intervals over videos."""

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
from pipelines.evaluation.metrics import flatten, psnr, ssim
from pipelines.prediction.clips import Clip
from pipelines.predictor import VideoPredictor
from stage1_autoencoder.lpips import LPIPS
from stage2_flow.config import SamplingConfig
from stage2_flow.sampling_plan import SamplingPlan

RESAMPLES = 2000
# Of the Fréchet distance, whose every resample takes a singular value decomposition.
DISTANCE_RESAMPLES = 200
# Side of the maps that latents are averaged to before their statistics are taken.
POOLED_SIDE = 2


@dataclass(frozen=True, eq=False)
class Predicted:
    """Values of each clip, from which differences and intervals are taken.

    Attributes:
        metrics: name -> [clips] float64, means over the predicted frames.
        features: [clips, horizon, d], see `latent_features`.
        seconds: of predicting all clips, without decoding.
    """

    metrics: dict[str, Tensor]
    features: Tensor
    seconds: float


class StudyClips:
    """The clips that all ways of sampling predict: what is the same for all of them is computed once."""

    def __init__(
        self, predictor: VideoPredictor, clips: Sequence[Clip], context: int, seed: int, lpips: LPIPS | None
    ) -> None:
        self.predictor, self.context, self.lpips = predictor, context, lpips
        self.keys = [(clip.key, 0) for clip in clips]
        frames = torch.stack([clip.frames for clip in clips])
        latents = predictor.encode_videos(frames)
        self.given, self.truth = latents[:, :context], frames[:, context:]
        self.features = latent_features(predictor.standardization.to_final(latents), context)
        decoded = predictor.decode_videos(latents[:, context:])
        self.edges = mean_gradient(decoded.cpu())
        videos = [clip.video for clip in clips]
        self.counts = draw_counts(videos, RESAMPLES, seed)

    def predict(self, options: SamplingConfig) -> Predicted:
        """Predict all clips and measure each."""
        horizon = self.truth.shape[1]
        started = time.perf_counter()
        latents = self.predictor.generate_latents(self.given, horizon, sampling=options, keys=self.keys)
        if latents.is_cuda:
            torch.cuda.synchronize(latents.device)
        seconds = time.perf_counter() - started
        videos = self.predictor.decode_videos(latents[:, self.context :])
        metrics = {
            "psnr": psnr(flatten(videos).cpu(), flatten(self.truth)),
            "ssim": ssim(flatten(videos).cpu(), flatten(self.truth)),
        }
        if self.lpips is not None:
            with torch.inference_mode():
                metrics["lpips"] = self.lpips(flatten(videos), flatten(self.truth).to(videos.device)).cpu()
        values = {name: value.view(len(videos), horizon).double().mean(1) for name, value in metrics.items()}
        values["sharpness"] = mean_gradient(videos.cpu()) / self.edges
        return Predicted(
            metrics=values,
            features=latent_features(self.predictor.standardization.to_final(latents), self.context),
            seconds=seconds,
        )

    def point(self, key: str, options: SamplingConfig, reference: dict[str, Any] | None) -> dict[str, Any]:
        """One point of the study as plain data.

        Args:
            key: by which it is found again.
            options: the way to sample.
            reference: the point whose predictions differences are taken to, clip by clip; None: this one is it.
        """
        predicted = self.predict(options)
        plan = SamplingPlan.from_config(options)
        point: dict[str, Any] = {
            "key": key,
            "solver": plan.solver.name,
            "warm_start": options.warm_start,
            "condition": options.condition,
            "seed": options.seed,
            "preset": options.preset,
            "steps": plan.steps,
            "nfe": plan.evaluations,
            "lpips": None,
        }
        for name, values in predicted.metrics.items():
            point[name] = float(values.mean())
            point[f"{name}_interval"] = mean_interval(values, self.counts).tolist()
            of_reference = values.tolist() if reference is None else reference["per_clip"][name]
            difference = values - torch.tensor(of_reference, dtype=torch.float64)
            point[f"{name}_difference"] = float(difference.mean())
            point[f"{name}_difference_interval"] = mean_interval(difference, self.counts).tolist()
        point["per_clip"] = {name: values.tolist() for name, values in predicted.metrics.items()}
        point |= self._distance(predicted.features, reference)
        point["milliseconds_per_frame"] = 1000 * predicted.seconds / (len(self.keys) * self.truth.shape[1])
        return point

    def _distance(self, features: Tensor, reference: dict[str, Any] | None) -> dict[str, Any]:
        """The Fréchet distance of predicted from real latents' features, over all frames of all clips.

        Its difference to the reference's has an interval of its own: both change alike with the clips that are drawn.
        """
        frames = features.shape[1]
        ours, real = (rearrange(values, "b n d -> (b n) d") for values in (features, self.features))
        distance = frechet_distance(fit_gaussian(ours), fit_gaussian(real))
        counts = self.counts[:DISTANCE_RESAMPLES].repeat_interleave(frames, dim=1)
        resampled = [frechet_distance(fit_gaussian(ours, count), fit_gaussian(real, count)) for count in counts]
        difference, scatter = 0.0, np.zeros(len(resampled))
        if reference is not None:
            difference = distance - reference["frechet"]
            scatter = np.asarray(resampled) - np.asarray(reference["frechet_resampled"])
        half = HALF_WIDTH * float(scatter.std(ddof=1))
        return {
            "frechet": distance,
            "frechet_interval": normal_interval(distance, resampled),
            "frechet_difference": difference,
            "frechet_difference_interval": [difference - half, difference + half],
            "frechet_resampled": resampled,
        }


def latent_features(latents: Tensor, context: int) -> Tensor:
    """What the Fréchet distance of latents is taken of: where things are, and how they change.

    Args:
        latents: [b, n, c, h, w] final latents.
        context: the first so many frames are given.
    Returns:
        [b, n - context, d] float64 on the CPU, d = 2 c POOLED_SIDE^2: each frame's latents, and the absolute
        differences to the frame before, averaged over the parts of the map.
    """
    frames, changes = latents[:, context:], (latents[:, context:] - latents[:, context - 1 : -1]).abs()
    pooled = [F.adaptive_avg_pool2d(flatten(part), POOLED_SIDE).flatten(1) for part in (frames, changes)]
    return torch.cat(pooled, dim=1).view(len(latents), frames.shape[1], -1).double().cpu()


def mean_gradient(videos: Tensor) -> Tensor:
    """[b] float64: mean absolute difference of neighbouring pixels of [b, n, 3, h, w]; blurred videos have less."""
    across, down = videos.diff(dim=-1).abs(), videos.diff(dim=-2).abs()
    return (across.mean((1, 2, 3, 4)) + down.mean((1, 2, 3, 4))).double()
