"""Fréchet distances between sets of clips, by the features of a video network (FVD) or by latents."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from pipelines.config import EvaluationConfig
from pipelines.config.literature import Pitfall
from pipelines.evaluation.measures.feature_cache import FeatureCache
from pipelines.evaluation.measures.intervals import normal_interval
from pipelines.evaluation.measures.measure import ClipBatch, Measure, Records
from pipelines.evaluation.measures.networks import VideoNetwork
from pipelines.runtime.context import computing_in
from pipelines.runtime.progress import progress, warn
from pipelines.runtime.results import Distances, MetricValues

MIN_FRAMES = 10  # the I3D halves time three times, then pools over two frames
MAX_RESAMPLES = 200
CLIPS_AT_ONCE = 16
# Side to which maps of latents are averaged before their statistics are taken.
POOLED_SIDE = 2
LATENT_DEFINITION = "of means over 2x2 parts of each frame's latents and of their change to the frame before"


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance of a set.

    Attributes:
        mean: [d] float64.
        root: [r, d] float64, r <= d; `root.T @ root` is the covariance, which may be singular.
    """

    mean: Tensor
    root: Tensor


def fit_gaussian(features: Tensor, counts: Tensor | None = None) -> Gaussian:
    """Mean and covariance (divided by n - 1, as in the original FVD) of a set of features.

    Args:
        features: [n, d] float, n >= 2; computed in float64.
        counts: [n] >= 0, how often each row is in the set; None: once.
    Raises:
        ValueError: fewer than two rows, repetitions counted, or values that are not finite.
    """
    features = features.double()
    counts = torch.ones(len(features)).to(features) if counts is None else counts.to(features)
    total = counts.sum()
    if features.ndim != 2 or total < 2:
        raise ValueError(f"a covariance needs [n, d] features of two clips or more, not {list(features.shape)}")
    if not torch.isfinite(features).all():
        raise ValueError("features that are not finite")
    present = counts > 0
    features, counts = features[present], counts[present]
    mean = counts @ features / total
    root = (features - mean) * (counts / (total - 1)).sqrt()[:, None]
    if len(root) > root.shape[1]:
        root = torch.linalg.qr(root, mode="r")[1]
    return Gaussian(mean, root)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)): 0 for equal Gaussians, symmetric.

    With S1 = A^T A and S2 = B^T B the eigenvalues of S1 S2 are those of (A B^T)(A B^T)^T and zeros, so the trace of its
    root is the sum of the singular values of A B^T: no matrix root, and no regularization of singular covariances.
    """
    root_trace = torch.linalg.svdvals(first.root @ second.root.T).sum()
    spread = first.root.square().sum() + second.root.square().sum() - 2 * root_trace
    return max(0.0, float((first.mean - second.mean).square().sum() + spread))


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
    pooled = [F.adaptive_avg_pool2d(part.flatten(0, 1), POOLED_SIDE).flatten(1) for part in (frames, changes)]
    return torch.cat(pooled, dim=1).view(len(latents), frames.shape[1], -1).double().cpu()


@dataclass(frozen=True)
class Segments:
    """Which frames of a clip the video network sees: consecutive segments, the last of which ends with the clip.

    Attributes:
        context: given frames before the predicted ones.
        horizon: predicted frames.
        frames: per segment.
        count: segments per clip.
    """

    context: int
    horizon: int
    frames: int
    count: int

    @classmethod
    def choose(cls, evaluation: EvaluationConfig) -> "Segments":
        """By the settings.

        Raises:
            ValueError: the clips are too short for the I3D.
        """
        context = evaluation.context if evaluation.fvd_context else 0
        total = context + evaluation.horizon
        if total < MIN_FRAMES:
            without = "" if evaluation.fvd_context else " (evaluation.fvd_context: false)"
            raise ValueError(
                f"the I3D needs {MIN_FRAMES} frames or more, and the clips have {total}{without}: raise "
                "evaluation.horizon"
            )
        frames = total if evaluation.fvd_frames is None else min(evaluation.fvd_frames, total)
        return cls(context, evaluation.horizon, frames, total // frames)

    def cut(self, given: Tensor, following: Tensor) -> Tensor:
        """Clips of [b, context, 3, h, w] and [b, horizon, 3, h, w] to segments [b, count, frames, 3, h, w]."""
        whole = torch.cat([given[:, given.shape[1] - self.context :], following], dim=1)
        return rearrange(whole[:, -self.frames * self.count :], "b (s t) c h w -> b s t c h w", s=self.count)

    def describe(self) -> str:
        """In words, for the protocol."""
        skipped = self.context + self.horizon - self.frames * self.count
        return (
            f"{self.count} segment{'s' if self.count > 1 else ''} of {self.frames} frames out of {self.context} given "
            f"and {self.horizon} predicted" + (f", without the first {skipped}" if skipped else "")
        )


# (set, subject, sample) -> [clips, s, d]. A set is `real` or `autoencoded`, its own clips are `truth`.
Features = Mapping[tuple[str, str, int], Tensor]


# Of features [clips, samples, segments, d] those [clips, s, d] of one set.
SAMPLE_SETS: dict[Pitfall, Callable[[Tensor], Tensor]] = {
    "fvd_pooled": lambda features: rearrange(features, "b k s d -> b (k s) d"),
    "fvd_first_sample": lambda features: features[:, 0],
}


class VideoDistances(Measure):
    """FVD. Records: `<set> <subject>` -> features [clips, samples, segments, d]."""

    name = "fvd"

    def __init__(
        self, network: VideoNetwork, segments: Segments, cache: FeatureCache, pitfalls: Sequence[Pitfall] = ()
    ) -> None:
        """Distances of one set of samples per sample number, and of the sets of `pitfalls`."""
        self.network, self.segments, self.cache, self.pitfalls = network, segments, cache, pitfalls

    def measure(self, batch: ClipBatch) -> Records:
        context = batch.given.shape[1]
        real = {"truth": batch.truth[:, None], **batch.futures}
        real.pop("reconstruction", None)  # it is the other set
        sets = [("real", batch.given, real)]
        if batch.autoencoded is not None:
            given, future = batch.autoencoded[:, :context], batch.autoencoded[:, None, context:]
            copies = given[:, None, -1:].expand_as(future)
            autoencoded = {"truth": future, "prediction": batch.futures["prediction"], "copy_last": copies}
            sets.append(("autoencoded", given, autoencoded))
        return {
            f"{against} {subject}": torch.stack(
                [self._features(start, x, subject != "prediction") for x in samples.unbind(1)], dim=1
            )
            for against, start, videos in sets
            for subject, samples in videos.items()
        }

    @torch.inference_mode()
    def _features(self, given: Tensor, following: Tensor, seen_again: bool) -> Tensor:
        """[b, segments, d] float64 on the CPU.

        Args:
            seen_again: by other evaluations, so that the features are kept.
        """
        segments = rearrange(self.segments.cut(given, following), "b s t c h w -> (b s) t c h w").clamp(-1, 1)

        def compute(videos: Tensor) -> Tensor:
            with computing_in("fp32", videos.device):
                return torch.cat([self.network.features(part) for part in videos.split(CLIPS_AT_ONCE)]).cpu()

        features = self.cache.features(self.network.sha256, segments, compute) if seen_again else compute(segments)
        return rearrange(features, "(b s) d -> b s d", s=self.segments.count).double()

    def results(self, records: Records, counts: Tensor | None) -> dict[str, MetricValues]:
        """The distances of all subjects from the real and from the autoencoded clips, see `compare_sets`.

        Raises:
            ValueError: fewer than two clips, or features that are not finite.
        """
        features = by_sample({tuple(name.split(" ", 1)): values for name, values in records.items()})
        clips, segments, dimensions = features["real", "truth", 0].shape
        found = compare_sets(features, counts, "FVD")
        if clips * segments <= dimensions:
            warn(
                f"the Fréchet video distance is measured on {clips * segments} clips, and the network has {dimensions} "
                "features: such distances are much too high; compare them only with those of as many clips"
            )
        distances = {self.name: MetricValues(**dict(found["real"]), autoencoded=found.get("autoencoded"))}
        real = {name.split(" ", 1)[1]: values for name, values in records.items() if name.startswith("real ")}
        for name, select in SAMPLE_SETS.items():
            if name in self.pitfalls:
                chosen = {("real", subject, 0): select(values) for subject, values in real.items()}
                distances[name] = MetricValues(**dict(compare_sets(chosen, counts, name)["real"]))
        return distances


class LatentDistances(Measure):
    """The Fréchet distance of latents. Records: subject -> features [clips, samples, horizon, d]."""

    name, needs_autoencoder = "latent_frechet", True

    def measure(self, batch: ClipBatch) -> Records:
        context = batch.given.shape[1]
        return {
            subject: torch.stack([latent_features(x, context) for x in latents.unbind(1)], dim=1)
            for subject, latents in batch.latents.items()
        }

    def results(self, records: Records, counts: Tensor | None) -> dict[str, MetricValues]:
        """The distances from the latents of the real clips, see `compare_sets`.

        Raises:
            ValueError: fewer than two clips, or features that are not finite.
        """
        features = by_sample({("real", subject): values for subject, values in records.items()})
        found = compare_sets(features, counts, "the distance of latents")
        return {self.name: MetricValues(**dict(found["real"]))}


def by_sample(records: Mapping[tuple[str, str], Tensor]) -> Features:
    """(set, subject) -> [clips, samples, s, d], by sample number."""
    return {
        (*key, sample): features
        for key, of_samples in records.items()
        for sample, features in enumerate(of_samples.unbind(1))
    }


def compare_sets(features: Features, counts: Tensor | None, name: str) -> dict[str, Distances]:
    """By set, the distances of all subjects from it, with intervals.

    The first predictions of all clips are one set, as large as the real one (the distance depends on the number of
    clips), the second ones the next; the mean over the sets' distances is the result.

    Args:
        counts: [resamples, clips] from `draw_counts`, of which at most 200 rows are used; None: no intervals.
        name: of the distance, for the display.
    Raises:
        ValueError: fewer than two clips, or features that are not finite.
    """
    if len(features["real", "truth", 0]) < 2:
        raise ValueError("a distance of sets needs two clips or more, and there is one")
    measured = _distances(features, None)
    rows = progress([] if counts is None else counts[:MAX_RESAMPLES], description=f"bootstrap of {name}", unit="set")
    resampled = [_distances(features, row) for row in rows]
    found = {}
    for against, values in measured.items():
        by_subject = {subject: [distances[against][subject] for distances in resampled] for subject in values}
        if len(resampled) < 2:
            found[against] = Distances(**values)
            continue
        intervals = {subject: normal_interval(value, by_subject[subject]) for subject, value in values.items()}
        found[against] = Distances(**values, interval=intervals, resampled=by_subject)
    return found


def _distances(features: Features, counts: Tensor | None) -> dict[str, dict[str, float]]:
    """By set and subject, the mean over samples; each clip is drawn with its predictions and all that is of it."""
    gaussians = {}
    for key, values in features.items():
        weights = None if counts is None else counts.repeat_interleave(values.shape[1])
        gaussians[key] = fit_gaussian(rearrange(values, "b s d -> (b s) d"), weights)
    if ("autoencoded", "truth", 0) in gaussians:
        gaussians["real", "reconstruction", 0] = gaussians["autoencoded", "truth", 0]
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (against, subject, _), gaussian in gaussians.items():
        if subject != "truth":
            found[against][subject].append(frechet_distance(gaussian, gaussians[against, "truth", 0]))
    return {
        against: {subject: sum(values) / len(values) for subject, values in subjects.items()}
        for against, subjects in found.items()
    }
