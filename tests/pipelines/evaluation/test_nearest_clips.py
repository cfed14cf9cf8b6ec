"""Search of training clips against brute force, copies of training clips, and what is memorized."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import latent_cache
from latent_cache import SplitPlan, StoreMetadata, StoreWriter
from pipelines.evaluation import nearest_clips
from pipelines.evaluation.measures.intervals import draw_counts
from pipelines.evaluation.measures.measure import ClipBatch
from pipelines.evaluation.nearest_clips import MemorizationMeasure, TrainingClips
from pipelines.runtime.results import Memorization
from stage2_flow.standardization import Standardization

SHAPE = (2, 3, 2)
# Ragged, some shorter than a clip, and longer than the chunks of 4 frames.
LENGTHS = (3, 17, 1, 6, 9, 2, 12)
STANDARDIZATION = Standardization(torch.tensor([3.0, -1.0]), torch.tensor([2.0, 0.5]))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Final latents."""
    return torch.randn(*shape, *SHAPE, generator=torch.Generator().manual_seed(seed))


def write(path: Path, final: Tensor, lengths: Sequence[int]) -> TrainingClips:
    """Put final latents [frame, ...] of videos of these lengths into a store, as raw ones."""
    names, raw = [f"video-{number}" for number in range(len(lengths))], STANDARDIZATION.to_raw(final).numpy()
    metadata = StoreMetadata(
        dataset="toys", fps=25.0, preprocessing={}, software={},
        autoencoder={"architecture": "vqgan", "sha256": "3f9a", "downsampling": 8},
    )  # fmt: skip
    plan = SplitPlan(names, ["identity"] * len(names), lengths, SHAPE, 4)
    with StoreWriter.open(path, metadata, {"train": plan}, codes=False) as writer:
        for chunk in writer.pending("train"):
            writer.write_chunk("train", chunk, raw[chunk.index * 4 :][: chunk.frames], None)
        writer.finish()
    return TrainingClips(latent_cache.open(path, "train"), STANDARDIZATION, torch.device("cpu"))


FINAL = drawn(sum(LENGTHS))


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> TrainingClips:
    """The ragged videos of `FINAL`."""
    return write(tmp_path_factory.mktemp("stores") / "toys.zarr", FINAL, LENGTHS)


@pytest.mark.parametrize("products", [1, 200, 2**22])  # one frame, a few chunks, and everything at once
@pytest.mark.parametrize(("length", "following"), [(1, 0), (3, 0), (2, 5), (6, 4)])
def test_the_search_equals_brute_force(training, monkeypatch, products: int, length: int, following: int):
    monkeypatch.setattr(nearest_clips, "PRODUCTS_AT_ONCE", products)
    clips = drawn(5, length, seed=1)
    found = training.nearest(clips, following)

    offsets = np.cumsum([0, *LENGTHS])
    total = length + following
    starts = [s for a, b in itertools.pairwise(offsets) for s in range(a, b - total + 1)]
    assert training.count(total) == len(starts)
    windows = torch.stack([FINAL[s : s + total] for s in starts])
    distances = (windows[None, :, :length] - clips[:, None]).square().mean((2, 3, 4, 5)).sqrt()
    expected = distances.argmin(1)
    assert found.start.tolist() == [starts[i] for i in expected]
    torch.testing.assert_close(found.distance, distances.amin(1), rtol=1e-2, atol=0)  # raw fp16 against final fp16
    torch.testing.assert_close(found.following, windows[expected, length:], rtol=0, atol=1e-2)


def test_a_copied_clip_is_found_with_what_follows_it(training):
    start = 3 + 5  # frame 5 of the second video; the clip and what follows span several chunks
    found = training.nearest(FINAL[None, start : start + 4], following=6)
    assert found.start.item() == start
    assert found.distance.item() < 2**-10  # fp16 of numbers up to 8 at a deviation of 1/2 or more
    torch.testing.assert_close(found.following[0], FINAL[start + 4 : start + 10], rtol=0, atol=2**-7)


def test_a_copier_is_found_and_an_honest_predictor_is_cleared(tmp_path):
    context, horizon, clips = 2, 3, 200
    final = drawn(20 * 5)
    training = write(tmp_path / "toys.zarr", final, [5] * 20)
    measure = MemorizationMeasure(training, horizon)
    truth = drawn(clips, 1, context + horizon, seed=1)

    def measured(predicted: Tensor) -> Memorization:
        """In two batches, with intervals."""
        given = torch.zeros(clips, context, 3, 8, 8)
        parts = [
            measure.measure(ClipBatch((), given[part], given, given, {}, {"truth": truth[part],
                                                                         "prediction": predicted[part]}))
            for part in (slice(10), slice(10, clips))
        ]  # fmt: skip
        records = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return Memorization.model_validate(measure.results(records, draw_counts(range(clips), 200, 0)))

    honest = measured(drawn(clips, 2, context + horizon, seed=2))
    low, high = honest.interval["nearer"]
    assert 0 < low < 0.5 < high < 1
    assert honest.prediction == pytest.approx(honest.truth, rel=0.1)
    assert honest.error == pytest.approx(2**0.5, rel=0.1)  # of two independent draws of deviation 1
    assert min(honest.smallest.values()) > 0.5
    assert honest.training_clips == 20 * 3

    copies = truth.repeat(1, 2, 1, 1, 1, 1)
    videos = final.unflatten(0, (20, 5))
    copies[:, 1, context:] = videos[torch.arange(clips) % 20, 1:4]  # the second sample only
    copied = measured(copies)
    assert copied.nearer == 0.5 * 0.5 + 0.5  # the first one is the truth, which is as near as itself
    assert copied.smallest["prediction"] < 2**-10 < 0.5 < copied.smallest["truth"]
    assert copied.interval["nearer"] == (0.75, 0.75)
