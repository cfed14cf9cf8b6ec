"""The Fréchet video distance in `evaluate`: which frames the network sees, and distances of whole sets of clips."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from pipelines.config import EvaluationConfig
from pipelines.evaluation.metrics import Gaussian, fit_gaussian, frechet_distance, normal_interval
from pipelines.evaluation.networks import VideoNetwork
from pipelines.runtime.context import computing_in
from pipelines.runtime.progress import progress, warn

LEAST_FRAMES = 10  # the I3D halves time three times, and pools over two of what is left
MOST_RESAMPLES = 200
CLIPS_AT_ONCE = 16
# What is compared with what. Against the autoencoded clips all has passed the autoencoder, the given frames too.
_AGAINST_REAL = {"prediction": "prediction", "copy_last": "copy_last", "reconstruction": "autoencoded"}
_AGAINST_AUTOENCODED = {"prediction": "prediction_autoencoded", "copy_last": "copy_last_autoencoded"}


@dataclass(frozen=True)
class ShownFrames:
    """Which frames of a clip the network sees.

    Attributes:
        context: given frames before the predicted ones.
        horizon: predicted frames.
        frames: in one look.
        looks: that many, one after the other, the last one ending with the clip.
    """

    context: int
    horizon: int
    frames: int
    looks: int

    @classmethod
    def choose(cls, evaluation: EvaluationConfig) -> "ShownFrames | str":
        """By the settings; or why the clips are too short."""
        context = evaluation.context if evaluation.fvd_context else 0
        total = context + evaluation.horizon
        if total < LEAST_FRAMES:
            without = "" if evaluation.fvd_context else " (evaluation.fvd_context: false)"
            return (
                f"the I3D needs {LEAST_FRAMES} frames or more, and the clips have {total}{without}: raise "
                "evaluation.horizon"
            )
        frames = total if evaluation.fvd_frames is None else min(evaluation.fvd_frames, total)
        return cls(context, evaluation.horizon, frames, total // frames)

    def cut(self, given: Tensor, following: Tensor) -> Tensor:
        """What is shown of clips: [b, context, 3, h, w] and [b, horizon, 3, h, w] to [b, looks, frames, 3, h, w]."""
        whole = torch.cat([given[:, given.shape[1] - self.context :], following], dim=1)
        return rearrange(whole[:, -self.frames * self.looks :], "b (l t) c h w -> b l t c h w", l=self.looks)

    def describe(self) -> str:
        """For people."""
        looks = f"{self.looks} stretch{'es' if self.looks > 1 else ''}"
        skipped = self.context + self.horizon - self.frames * self.looks
        return f"{self.frames} frames at once, {looks} of {self.context} given and {self.horizon} predicted frames" + (
            f", without the first {skipped}" if skipped else ""
        )


class VideoDistances:
    """Collects the features of all clips, and compares sets of them."""

    def __init__(self, network: VideoNetwork, shown: ShownFrames) -> None:
        self.network = network
        self.shown = shown
        self._features: dict[str, list[Tensor]] = defaultdict(list)

    @torch.inference_mode()
    def add(self, name: str, given: Tensor, following: Tensor) -> None:
        """Look at the clips of a batch.

        Args:
            name: `real`, `autoencoded`, `copy_last`, `copy_last_autoencoded`; or with the sample's number behind it
                `prediction 0` and, unless no given frames are shown, `prediction_autoencoded 0`.
            given: [b, context, 3, h, w] in [-1, 1] on the network's device.
            following: [b, horizon, 3, h, w], likewise.
        """
        shown = rearrange(self.shown.cut(given, following), "b l t c h w -> (b l) t c h w")
        with computing_in("fp32", shown.device):
            parts = [self.network.features(part.clamp(-1, 1)) for part in shown.split(CLIPS_AT_ONCE)]
        features = rearrange(torch.cat(parts), "(b l) d -> b l d", l=self.shown.looks)
        self._features[name].append(features.double().cpu())

    def results(self, counts: Tensor | None, samples: int) -> dict[str, Any]:
        """The distances.

        Args:
            counts: [resamples, clips] from `draw_counts`, of which at most 200 rows are used; None: no intervals.
            samples: predictions a clip. Those of each number are a set of their own, as large as the real one, since
                the distance depends on the number of clips; the distance is the mean over these sets.
        Returns:
            `{"prediction": .., "copy_last": .., "reconstruction": .., "interval": {..}, "autoencoded": {"prediction":
            .., "copy_last": .., "interval": {..}}}`.
        Raises:
            ValueError: fewer than two clips, or features that are not finite.
        """
        features = {name: torch.cat(parts) for name, parts in self._features.items()}
        if len(features["real"]) < 2:
            raise ValueError("a distance of sets needs two clips or more, and there is one")
        looks, dimensions = features["real"].shape[0] * self.shown.looks, features["real"].shape[2]
        if looks <= dimensions:
            warn(
                f"the Fréchet video distance is measured on {looks} clips, and the network has {dimensions} features: "
                "such distances are much too high, and to be compared only with those on as many clips"
            )
        measured = _distances(features, None, samples)
        resampled: dict[str, dict[str, list[float]]] = {against: defaultdict(list) for against in measured}
        rows = [] if counts is None else counts[:MOST_RESAMPLES]
        for row in progress(rows, description="bootstrap of FVD", unit="set"):
            for against, values in _distances(features, row, samples).items():
                for subject, value in values.items():
                    resampled[against][subject].append(value)
        found = {}
        for against, values in measured.items():
            found[against] = dict(values)
            if len(rows) > 1:
                found[against]["interval"] = {
                    subject: normal_interval(value, resampled[against][subject]) for subject, value in values.items()
                }
        return found["real"] | {"autoencoded": found["autoencoded"]}


def _distances(features: dict[str, Tensor], counts: Tensor | None, samples: int) -> dict[str, dict[str, float]]:
    """Of all subjects, from the real clips and from the autoencoded ones; real and predicted are drawn together."""

    def fit(name: str) -> Gaussian:
        looks = features[name].shape[1]
        weights = None if counts is None else counts.repeat_interleave(looks)
        return fit_gaussian(rearrange(features[name], "b l d -> (b l) d"), weights)

    gaussians = {name: fit(name) for name in features}

    def distance(name: str, against: str) -> float:
        if "prediction" in name:
            # Without given frames the same clip is compared with both.
            name = name if f"{name} 0" in features else "prediction"
        names = [f"{name} {number}" for number in range(samples)] if "prediction" in name else [name]
        return sum(frechet_distance(gaussians[name], gaussians[against]) for name in names) / len(names)

    return {
        "real": {subject: distance(name, "real") for subject, name in _AGAINST_REAL.items()},
        "autoencoded": {subject: distance(name, "autoencoded") for subject, name in _AGAINST_AUTOENCODED.items()},
    }
