"""Perception without a download: ST-LPIPS of frames, and distances of sets of its features, of frames and of motion."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from einops import reduce
from torch import Tensor

from pipelines.evaluation.measures.intervals import half_width, normal_interval
from pipelines.evaluation.measures.measure import ClipBatch, Measure, Records
from pipelines.evaluation.measures.metrics import PIXELS_AT_ONCE, FrameMeasure, Metric
from pipelines.runtime.context import computing_in
from pipelines.runtime.results import MetricValues
from stage1_autoencoder.st_lpips import STLPIPS

# Samples of a clip whose features are kept: each is a set of its own.
MOST_SAMPLES = 10
# Frames of a set in the kernel distance, whose cost grows with their square.
MOST_FRAMES = 2048
FEATURES_DEFINITION = (
    "of ST-LPIPS' last layer, unit vectors of 256 channels at each position: their mean (frame), the mean of their "
    "absolute change since the frame before (motion); mmd: squared, unbiased, kernel (x y + 1)^3"
)


@dataclass(frozen=True, eq=False)
class FrameFeatures:
    """What the network says of predicted frames.

    Attributes:
        distance: [..., horizon] ST-LPIPS to the truth.
        frame: [..., horizon, 256], means over positions of the last layer's unit vectors.
        motion: likewise, means of their absolute change since the frame before; the first one's is the last given one.
    """

    distance: Tensor
    frame: Tensor
    motion: Tensor

    @classmethod
    def join(cls, how: Callable[[list[Tensor]], Tensor], parts: Iterable["FrameFeatures"]) -> "FrameFeatures":
        """Of several, by `torch.cat` or `torch.stack`."""
        parts = list(parts)
        return cls(*(how([getattr(part, field.name) for part in parts]) for field in fields(cls)))


class FeatureReader:
    """One pass of the network over the frames of a batch, however many measures ask for it."""

    def __init__(self, network: STLPIPS) -> None:
        self.network = network
        self._found: WeakKeyDictionary[ClipBatch, dict[str, FrameFeatures]] = WeakKeyDictionary()

    def __call__(self, batch: ClipBatch) -> dict[str, FrameFeatures]:
        """Subject -> features of [b, samples, horizon] frames, on the CPU; the truth is a subject."""
        if batch not in self._found:
            videos = {"truth": batch.truth[:, None], **batch.futures}
            clips = [
                self._read_clip(given[-1:], {subject: samples[i] for subject, samples in videos.items()})
                for i, given in enumerate(batch.given)
            ]
            self._found[batch] = {
                subject: FrameFeatures.join(torch.stack, (clip[subject] for clip in clips)) for subject in videos
            }
        return self._found[batch]

    @torch.inference_mode()
    def _read_clip(self, given: Tensor, videos: Mapping[str, Tensor]) -> dict[str, FrameFeatures]:
        """Subject -> features of one clip.

        Args:
            given: [1, 3, h, w], the last given frame.
            videos: subject -> [samples, horizon, 3, h, w].
        """
        size, horizon = max(1, PIXELS_AT_ONCE // given[0, 0].numel()), videos["truth"].shape[1]
        parts: dict[str, list[list[FrameFeatures]]] = {subject: [[] for _ in videos[subject]] for subject in videos}
        with computing_in("fp32", given.device):
            start, before = self._maps(given)[-1], {}
            for first in range(0, horizon, size):
                truth = self._maps(videos["truth"][0, first : first + size])
                for subject, samples in videos.items():
                    for number, frames in enumerate(samples[:, first : first + size]):
                        maps = truth if subject == "truth" else self._maps(frames)
                        features = maps[-1].expand(len(frames), -1, -1, -1)
                        previous = torch.cat([before.get((subject, number), start), features[:-1]])
                        before[subject, number] = features[-1:]
                        found = FrameFeatures(
                            distance=self.network.compare(maps, truth).sum(0).cpu(),
                            frame=features.mean((2, 3)).cpu(),
                            motion=(features - previous).abs().mean((2, 3)).cpu(),
                        )
                        parts[subject][number].append(found)
        return {
            subject: FrameFeatures.join(torch.stack, (FrameFeatures.join(torch.cat, sample) for sample in samples))
            for subject, samples in parts.items()
        }

    def _maps(self, frames: Tensor) -> list[Tensor]:
        """Of frames [n, 3, h, w]; of the first, if all are the same memory, as those of a copy are."""
        return self.network.maps((frames[:1] if frames.stride(0) == 0 else frames).float().clamp(-1, 1))


class PerceptualMeasure(FrameMeasure):
    """ST-LPIPS of every predicted frame. Records: subject -> [clips, samples, horizon]."""

    def __init__(self, reader: FeatureReader) -> None:
        super().__init__(Metric("st_lpips", reader.network, higher_is_better=False))
        self.reader = reader

    def measure(self, batch: ClipBatch) -> Records:
        return {subject: found.distance for subject, found in self.reader(batch).items() if subject != "truth"}


class FeatureDistances(Measure):
    """Fréchet and kernel distance of features. Records: subject -> [clips, samples, horizon, 256] in half precision."""

    def __init__(self, reader: FeatureReader, what: Literal["frame", "motion"]) -> None:
        self.reader, self.what, self.name = reader, what, f"{what}_features"

    def measure(self, batch: ClipBatch) -> Records:
        features = {subject: getattr(found, self.what) for subject, found in self.reader(batch).items()}
        return {subject: of_samples[:, :MOST_SAMPLES].half() for subject, of_samples in features.items()}

    def results(self, records: Records, counts: Tensor | None) -> dict[str, MetricValues]:
        """`<what>_frechet` and `<what>_mmd`; with several samples the mean over sets of one sample per clip.

        Raises:
            ValueError: fewer than two clips, or features that are not finite.
        """
        truth = records["truth"][:, 0].double()
        if len(truth) < 2:
            raise ValueError("a distance of sets needs two clips or more, and there is one")
        if not all(features.isfinite().all() for features in records.values()):
            raise ValueError("features that are not finite")
        found: dict[str, MetricValues] = {}
        for name, distance in (("frechet", frechet_distance), ("mmd", kernel_distance)):
            values, intervals, resampled = {}, {}, {}
            for subject in records.keys() - {"truth"}:
                sets = [distance(truth, features.double(), counts) for features in records[subject].unbind(1)]
                values[subject] = value = sum(value for value, _ in sets) / len(sets)
                if counts is not None:
                    resampled[subject] = torch.stack([of_set for _, of_set in sets]).mean(0).tolist()
                    half = half_width(resampled[subject])
                    # An unbiased estimate of 0 is negative half of the time.
                    unbiased = (value - half, value + half)
                    intervals[subject] = normal_interval(value, resampled[subject]) if name == "frechet" else unbiased
            found[f"{self.what}_{name}"] = MetricValues(
                **values, interval=intervals or None, resampled=resampled or None
            )
        return found


def frechet_distance(truth: Tensor, other: Tensor, counts: Tensor | None) -> tuple[float, Tensor]:
    """The distance of `frechet.frechet_distance` between all frames of two sets, and what it is in resamples.

    Those are linear in the counts of clips: the distance and its derivatives, which are as good as hundreds of
    distances for a standard deviation, at the cost of one.

    Args:
        truth, other: [clips, s, d] float64; clip i of one belongs to clip i of the other.
        counts: [resamples, clips], how often each clip is in a resample.
    Returns:
        The distance, and [resamples]; empty without counts.
    """
    total = truth.shape[0] * truth.shape[1]
    rows = [features.flatten(0, 1) for features in (truth, other)]
    difference = rows[0].mean(0) - rows[1].mean(0)
    # R^T R is a set's covariance, and so is that of `rows`, in which each frame has its share.
    rows = [(features - features.mean(0)) / math.sqrt(total - 1) for features in rows]
    (basis_1, root_1), (basis_2, root_2) = (torch.linalg.qr(features) for features in rows)
    left, singular, right = torch.linalg.svd(root_1 @ root_2.T, full_matrices=False)
    # tr (S1 S2)^(1/2) is the sum of the singular values; its derivatives, see Q R = rows, are the squares below.
    shared = (basis_1 @ left).square() @ singular + (basis_2 @ right.T).square() @ singular
    spread = rows[0].square().sum(1) + rows[1].square().sum(1) - shared
    value = max(0.0, float(difference.square().sum() + spread.sum()))
    if counts is None:
        return value, torch.empty(0)
    shift = 2 * (rows[0] - rows[1]) @ difference * math.sqrt(total - 1) / total
    derivatives = (spread - spread.sum() / (total - 1) + shift).view(truth.shape[:2]).sum(1)
    return value, value + (counts - 1) @ derivatives


def kernel_distance(truth: Tensor, other: Tensor, counts: Tensor | None) -> tuple[float, Tensor]:
    """The squared maximum mean discrepancy of two sets of frames with the kernel (x y + 1)^3, unbiased.

    It is the mean over all pairs of different clips (Gretton et al. 2012, Eq. 4), since frames of one clip are alike.
    The kernel is that of KID for vectors of length 1. At most `MOST_FRAMES` frames are used, evenly spaced in a clip.

    Args, Returns:
        As `frechet_distance`. In a resample a clip makes no pairs with its own copies.
    """
    clips, frames = truth.shape[:2]
    step = min(frames, math.ceil(clips * frames / MOST_FRAMES))

    def kernel(first: Tensor, second: Tensor) -> Tensor:
        """[clips, clips], mean over the frames of both."""
        rows = []
        for clip in first:
            values = (clip @ second.flatten(0, 1).T + 1) ** 3
            rows.append(reduce(values, "s (clip t) -> clip", "mean", clip=clips))
        return torch.stack(rows)

    x, y = truth[:, ::step], other[:, ::step]
    across = kernel(x, y)
    pairs = (kernel(x, x) + kernel(y, y) - across - across.T).fill_diagonal_(0)
    value = float(pairs.sum() / (clips * (clips - 1)))
    if counts is None:
        return value, torch.empty(0)
    weights = counts.sum(1).square() - counts.square().sum(1)
    return value, ((counts @ pairs) * counts).sum(1) / weights
