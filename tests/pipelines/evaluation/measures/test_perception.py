"""ST-LPIPS in an evaluation: one pass for all, the distances of its features, and whether they order damage right."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.evaluation.measures import frechet, perception
from pipelines.evaluation.measures.intervals import draw_counts
from pipelines.evaluation.measures.measure import ClipBatch
from pipelines.evaluation.measures.networks import find_st_lpips, load_st_lpips
from pipelines.evaluation.measures.perception import (
    FeatureDistances,
    FeatureReader,
    PerceptualMeasure,
    frechet_distance,
    kernel_distance,
)
from stage1_autoencoder.lpips import normalize_channels
from stage1_autoencoder.st_lpips import STLPIPS

CLIPS, CONTEXT, HORIZON, SIDE = 4, 2, 6, 32


@pytest.fixture(scope="module")
def network() -> STLPIPS:
    path = find_st_lpips()
    assert path is not None
    return load_st_lpips(path, torch.device("cpu"))


def blur(videos: Tensor, sigma: float) -> Tensor:
    line = torch.exp(-0.5 * (torch.arange(-4, 5) / sigma) ** 2)
    weights = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 9, 9)
    return F.conv2d(F.pad(videos.flatten(0, 1), (4,) * 4, mode="replicate"), weights, groups=3).view_as(videos)


@pytest.fixture(scope="module")
def batch() -> ClipBatch:
    """Textured discs that move over a textured ground, and damaged futures of them."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.arange(SIDE)
    videos = []
    for _ in range(CLIPS):
        ground, disc = F.interpolate(torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1, SIDE, mode="bicubic")
        place, velocity = torch.rand(2, generator=generator) * 10 + 6, torch.rand(2, generator=generator) * 2 + 0.5
        for frame in range(CONTEXT + HORIZON):
            y, x = place + velocity * frame
            inside = (axis[:, None] - y) ** 2 + (axis - x) ** 2 < 36
            videos.append(torch.where(inside, disc, ground).clamp(-1, 1))
    whole = torch.stack(videos).view(CLIPS, CONTEXT + HORIZON, 3, SIDE, SIDE)
    given, truth = whole[:, :CONTEXT], whole[:, CONTEXT:]
    noisy = truth + 0.2 * torch.randn(truth.shape, generator=generator)
    futures = {
        "blur": blur(truth, 0.6),
        "more blur": blur(truth, 1.5),
        "noise": noisy,
        "frozen": given[:, -1:].expand_as(truth),
        "shuffled": truth[:, [3, 0, 5, 2, 4, 1]],
        "another": truth.roll(1, 0),
    }
    return ClipBatch([], given, truth, None, {name: videos[:, None] for name, videos in futures.items()}, {})


def test_damage_is_ordered(network, batch):
    reader = FeatureReader(network)
    similarity = {name: values.mean().item() for name, values in PerceptualMeasure(reader).measure(batch).items()}
    assert 0 < similarity["blur"] < similarity["more blur"]
    assert similarity["blur"] < similarity["another"]
    frame, motion = (_distances(FeatureDistances(reader, what), batch) for what in ("frame", "motion"))
    for of_frames, of_motion in zip(frame, motion, strict=True):  # Fréchet, kernel
        assert 0 < of_frames["blur"] < of_frames["more blur"]
        # Of a set the order of frames and clips is nothing; of their changes it is.
        assert of_frames["shuffled"] == pytest.approx(0, abs=1e-5 * of_frames["more blur"])
        assert of_frames["another"] == pytest.approx(0, abs=of_frames["more blur"])
        assert of_motion["shuffled"] > of_motion["frozen"] > of_motion["blur"]


def _distances(measure: FeatureDistances, batch: ClipBatch) -> list[dict[str, float]]:
    """Of each future: Fréchet and kernel distance."""
    records = measure.measure(batch)
    found: list[dict[str, float]] = [{}, {}]
    for name in batch.futures:
        values = measure.results({"truth": records["truth"], "prediction": records[name]}, None)
        assert values.keys() == {f"{measure.what}_frechet", f"{measure.what}_mmd"}
        for of_kind, result in zip(found, values.values(), strict=True):
            of_kind[name] = result.prediction
    return found


def test_features_are_read_once_and_as_defined(network, batch, monkeypatch):
    passes = []
    original = network.maps

    def maps(frames: Tensor) -> list[Tensor]:
        passes.append(len(frames))
        return original(frames)

    monkeypatch.setattr(network, "maps", maps)
    monkeypatch.setattr(perception, "PIXELS_AT_ONCE", 4 * SIDE * SIDE)  # 4 frames at once, then 2
    small = ClipBatch([], batch.given[:1], batch.truth[:1], None, {
        "prediction": torch.cat([batch.futures["noise"], batch.futures["blur"]], dim=1)[:1],
        "copy_last": batch.futures["frozen"][:1],
    }, {})  # fmt: skip
    reader = FeatureReader(network)
    records = [
        measure.measure(small)
        for measure in (
            PerceptualMeasure(reader),
            FeatureDistances(reader, "frame"),
            FeatureDistances(reader, "motion"),
        )
    ]
    # The last given frame, the truth, two samples, and a copy that is one frame in each part.
    assert sum(passes) == 1 + 3 * HORIZON + 2
    distance, frame, motion = records
    assert distance.keys() == {"prediction", "copy_last"}
    assert frame.keys() == motion.keys() == {"truth", "prediction", "copy_last"}
    for subject, samples in small.futures.items():
        for number, video in enumerate(samples[0].clamp(-1, 1)):
            expected = network(video, small.truth[0])
            torch.testing.assert_close(distance[subject][0, number], expected, rtol=1e-4, atol=1e-6)
            before = torch.cat([small.given[0, -1:], video])
            features = normalize_channels(original(before)[-1])
            half = {"rtol": 2e-3, "atol": 1e-5}
            torch.testing.assert_close(frame[subject][0, number].float(), features[1:].mean((2, 3)), **half)
            change = features.diff(dim=0).abs().mean((2, 3))
            torch.testing.assert_close(motion[subject][0, number].float(), change, **half)


def features(seed: int, scale: float = 1.0) -> Tensor:
    """[12 clips, 5 frames, 7]; frames of a clip are alike."""
    generator = torch.Generator().manual_seed(seed)
    of_clips, of_frames = (torch.randn(12, n, 7, generator=generator, dtype=torch.float64) for n in (1, 5))
    return scale * (of_clips + 0.3 * of_frames) + seed * torch.arange(7) / 7


def test_the_frechet_distance_of_resamples_is_its_linear_part():
    truth, other = features(0), features(1, 1.4)

    def direct(counts: Tensor) -> float:
        gaussians = [frechet.fit_gaussian(x.flatten(0, 1), counts.repeat_interleave(5)) for x in (truth, other)]
        return frechet.frechet_distance(*gaussians)

    counts, step = torch.ones(12, 12, dtype=torch.float64), 1e-5
    value, resampled = frechet_distance(truth, other, counts + step * torch.eye(12))
    assert value == pytest.approx(direct(counts[0]), rel=1e-10)
    derivatives = [(direct(row + step * one) - direct(row - step * one)) / (2 * step)
                   for row, one in zip(counts, torch.eye(12), strict=True)]  # fmt: skip
    assert ((resampled - value) / step).tolist() == pytest.approx(derivatives, rel=1e-4, abs=1e-6)
    # So is the spread of a bootstrap, up to what the curvature adds.
    counts = draw_counts(range(12), 300, 0)
    spread = np.std([direct(row) for row in counts])
    assert frechet_distance(truth, other, counts)[1].std().item() == pytest.approx(spread, rel=0.25)
    # Fewer frames than channels, and channels that are never used.
    few = [torch.cat([x[:2, :2], torch.zeros(2, 2, 1)], dim=2) for x in (truth, other)]
    expected = frechet.frechet_distance(*(frechet.fit_gaussian(x.flatten(0, 1)) for x in few))
    assert frechet_distance(*few, None)[0] == pytest.approx(expected, rel=1e-9)


def test_the_kernel_distance_is_the_mean_over_pairs_of_different_clips(monkeypatch):
    truth, other = features(0, 0.3), features(1, 0.4)

    def direct(drawn: list[int], step: int) -> float:
        total, pairs = 0.0, 0
        for i, j in itertools.product(drawn, drawn):
            if i == j:
                continue
            pairs += 1
            for x, y, sign in ((truth, truth, 1), (other, other, 1), (truth, other, -1), (other, truth, -1)):
                kernel = [(1 + float(a @ b)) ** 3 for a in x[i, ::step] for b in y[j, ::step]]
                total += sign * np.mean(kernel)
        return total / pairs

    counts = draw_counts(range(12), 2, 0)
    value, resampled = kernel_distance(truth, other, counts)
    assert value == pytest.approx(direct([*range(12)], 1))
    drawn = [index for index, count in enumerate(counts[0].long().tolist()) for _ in range(count)]
    assert resampled[0].item() == pytest.approx(direct(drawn, 1))
    monkeypatch.setattr(perception, "MOST_FRAMES", 40)  # every second frame of 60
    assert kernel_distance(truth, other, None)[0] == pytest.approx(direct([*range(12)], 2))


def test_the_kernel_distance_of_equal_distributions_is_zero_on_average():
    pairs = [
        (features(0, 0.3)[torch.randperm(12, generator=torch.Generator().manual_seed(n))]).split(6) for n in range(200)
    ]
    found = [kernel_distance(*pair, None)[0] for pair in pairs]
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(len(found))


def test_sets_of_samples_intervals_and_one_clip():
    measure = FeatureDistances(FeatureReader(None), "motion")  # type: ignore[arg-type]
    records = {"truth": features(0, 0.3)[:, None], "copy_last": features(2, 0.3)[:, None],
               "prediction": torch.stack([features(1, 0.3), features(3, 0.3)], dim=1)}  # fmt: skip
    counts = draw_counts(range(12), 200, 0)
    found = measure.results(records, counts)
    for name, distance in (("motion_frechet", frechet_distance), ("motion_mmd", kernel_distance)):
        sets = [distance(records["truth"][:, 0], x, counts) for x in records["prediction"].unbind(1)]
        assert found[name].prediction == pytest.approx(np.mean([value for value, _ in sets]))
        low, high = found[name].interval["prediction"]
        half = 1.959964 * torch.stack([resampled for _, resampled in sets]).mean(0).std().item()
        assert high - found[name].prediction == pytest.approx(half)
        assert low < found[name].prediction
        assert found[name].reconstruction is None
    with pytest.raises(ValueError, match="two clips or more"):
        measure.results({name: values[:1] for name, values in records.items()}, None)
