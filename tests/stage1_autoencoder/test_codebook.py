"""Codebook initialization at latents, usage, and restarts of unused codes."""

import copy
import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from stage1_autoencoder.codebook import CodebookCare, CodeUsage, code_usage, forget, kmeans
from stage1_autoencoder.quantizer import VectorQuantizer

CODES = 32
# Codes of values up to about 10 come out of sums of vectors, which are made in integers, and a few float32 operations.
ROUNDING = 64 * torch.finfo(torch.float32).eps


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(normalize: bool = False, codes: int = CODES) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(codes, 4, normalize=normalize)


def care_for(quantizer: VectorQuantizer, **settings: Any) -> CodebookCare:
    return CodebookCare(quantizer, **({"start": "sample", "restart_every": 0, "window": 1000} | settings))


def latents(spread: float = 1.0, seed: int = 3) -> torch.Tensor:
    return 5 + spread * torch.randn(4, 4, 6, 6, generator=draws(seed))


def vectors_of(z: torch.Tensor) -> torch.Tensor:
    return z.movedim(1, -1).reshape(-1, z.shape[1])


def as_latents(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [n, c] as latents [n, c, 1, 1]."""
    return vectors[:, :, None, None]


def step(care: CodebookCare, number: int, z: torch.Tensor, seed: int | None = None) -> torch.Tensor | None:
    generator = draws(number if seed is None else seed)
    return care.after_step(number, care.quantizer.nearest(z), z, generator)


def weight_of(quantizer: VectorQuantizer) -> torch.Tensor:
    return quantizer.embedding.weight.detach().clone()


@pytest.mark.parametrize(
    ("counts", "usage"),
    [
        ([7, 7, 7, 7], CodeUsage(used=4, perplexity=4.0, dead=0)),
        ([0, 9, 0, 0], CodeUsage(used=1, perplexity=1.0, dead=3)),
        ([0, 1], CodeUsage(used=1, perplexity=1.0, dead=1)),
        ([1, 0, 1, 2], CodeUsage(used=3, perplexity=2**1.5, dead=1)),
        ([0, 0], CodeUsage(used=0, perplexity=0.0, dead=2)),
        ([2**40, 2**40, 0], CodeUsage(used=2, perplexity=2.0, dead=1)),
    ],
)
def test_usage_in_closed_form(counts, usage):
    measured = code_usage(torch.tensor(counts))
    assert (measured.used, measured.dead) == (usage.used, usage.dead)
    assert measured.perplexity == pytest.approx(usage.perplexity, rel=1e-12)


def test_usage_covers_the_last_full_window_or_the_first_unfinished_one():
    care = care_for(make(), window=3)
    assert care.usage() == CodeUsage(0, 0.0, CODES)
    used = []
    for number in range(8):  # step i chooses the codes 0 to i, each once
        care.after_step(number, torch.arange(number + 1).view(1, 1, -1), torch.zeros(1, 4, 1, number + 1), draws())
        used.append(care.usage().used)
    assert used == [1, 2, 3, 3, 3, 6, 6, 6]
    # Steps 3 to 5: the codes 0 to 3 three times, 4 twice, 5 once; nothing of the steps before.
    shares = torch.tensor([3, 3, 3, 3, 2, 1]) / 15
    assert care.usage().perplexity == pytest.approx(math.exp(-(shares * shares.log()).sum().item()), rel=1e-6)


@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_sample_puts_codes_near_latents_no_two_near_the_same(spread):
    quantizer, z = make(), latents(spread)
    assert len(quantizer.nearest(z).unique()) < CODES
    assert care_for(quantizer, start="sample").start(z, draws()) == "sample"
    distance, near = torch.cdist(quantizer.embedding.weight, vectors_of(z)).min(1)
    assert 0.01 < distance.max() / spread < 0.1  # a little noise beside the deviation
    assert len(near.unique()) == CODES
    assert len(quantizer.nearest(z).unique()) == CODES


@pytest.mark.parametrize("start", ["kmeans", "sample"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("count", [1, CODES - 1])
def test_few_latents_are_sampled_as_often_as_there_are_codes(start, normalize, count):
    quantizer, z = make(normalize), as_latents(vectors_of(latents())[:count])
    assert care_for(quantizer, start=start).start(z, draws()) == "sample"
    assert quantizer.embedding.weight.isfinite().all()
    assert len(quantizer.nearest(z).unique()) == count


def test_latents_that_are_not_finite_are_refused():
    z = latents()
    z[1, 2, 3, 4] = torch.nan
    for start in ("kmeans", "sample"):
        with pytest.raises(ValueError, match=r"latents .*not finite"):
            care_for(make(), start=start).start(z, draws())


def test_kmeans_codes_lie_closer_to_latents_than_samples_and_uniform_ones():
    z = torch.randn(32, 4, 4, 4, generator=draws(5))
    error, usage = {}, {}
    for start in ("kmeans", "sample", "uniform"):
        quantizer = make()
        assert care_for(quantizer, start=start).start(z, draws()) == start
        assert torch.equal(quantizer.embedding.weight, make().embedding.weight) == (start == "uniform")
        output = quantizer(z)
        error[start] = output.codebook_loss.item()
        usage[start] = code_usage(torch.bincount(output.codes.flatten(), minlength=CODES))
    assert error["kmeans"] < 0.85 * error["sample"]
    assert error["kmeans"] < 0.3 * error["uniform"]
    assert usage["kmeans"].dead == 0
    assert usage["kmeans"].perplexity > usage["sample"].perplexity > 1.5 * usage["uniform"].perplexity


@pytest.mark.parametrize("seed", range(4))
def test_kmeans_ends_at_the_means_of_clusters(seed):
    members = torch.randn(2, 15, 4, generator=draws(1)) + torch.tensor([-50.0, 50.0])[:, None, None]
    expected = members.double().mean(1).float()
    quantizer = make(codes=2)
    care_for(quantizer, start="kmeans").start(as_latents(members.reshape(-1, 4)), draws(seed))
    centers = quantizer.embedding.weight.detach()
    # Of values up to 53: 2^-32 of that in the sum of integers, and two roundings.
    torch.testing.assert_close(centers[centers[:, 0].argsort()], expected, atol=53 * 4 * 2.0**-24, rtol=0)


def test_kmeans_at_any_scale_of_at_most_16_random_vectors_per_code():
    for scale in (2.0**-30, 2.0**40):
        centers, scaled = (kmeans(make(), by * vectors_of(latents()), draws()) for by in (1.0, scale))
        torch.testing.assert_close(scaled / scale, centers, atol=ROUNDING, rtol=0)
    (center,) = kmeans(VectorQuantizer(1, 100), torch.eye(100), draws())
    used = center.nonzero().flatten()  # the mean of unit vectors shows which
    assert len(used) == 16
    assert not torch.equal(used, torch.arange(16))


def test_empty_clusters_move_to_vectors_far_from_their_centers():
    # Eight places and one of them crowded: most of the first centers are equal, and all but one of them empty.
    places = 10 * torch.randn(8, 4, generator=draws(4))
    vectors = torch.cat([places[:1].expand(200, 4), places[1:].repeat(3, 1)])
    centers = kmeans(make(codes=16), vectors, draws())
    assert centers.isfinite().all()
    assert torch.cdist(places, centers).amin(1).max() < 4 * ROUNDING  # of values up to 30


@pytest.mark.parametrize("normalize", [False, True])
def test_kmeans_depends_only_on_its_generator(normalize):
    z, centers = latents(), []
    z[:3] = z[0, :, :1, :1]  # many are equal, so that clusters are left empty
    for seed in (0, 0, 1):
        torch.manual_seed(len(centers))  # no draws but the generator's
        quantizer = VectorQuantizer(CODES, 4, normalize=normalize)
        care_for(quantizer, start="kmeans").start(z, draws(seed))
        centers.append(weight_of(quantizer))
    assert torch.equal(centers[0], centers[1])
    assert not torch.equal(centers[0], centers[2])


@pytest.mark.parametrize("start", ["kmeans", "sample"])
def test_normalized_codes_start_and_restart_at_directions(start):
    z = latents() - 5
    lengths = 10 ** (2 * torch.rand(4, 1, 6, 6, generator=draws(8)) - 1)
    weights = []
    for given in (z, lengths * z):
        quantizer = make(normalize=True)
        care_for(quantizer, start=start).start(given, draws())
        weights.append(weight_of(quantizer))
        torch.testing.assert_close(weights[-1].norm(dim=1), torch.ones(CODES))
    torch.testing.assert_close(weights[0], weights[1], atol=ROUNDING, rtol=0)
    before = len(quantizer.nearest(z[:1]).unique())
    moved = step(care_for(quantizer, restart_every=1), 0, z[:1])
    torch.testing.assert_close(quantizer.embedding.weight[moved].norm(dim=1), torch.ones(int(moved.sum())))
    assert moved.any()
    assert len(quantizer.nearest(z[:1]).unique()) > before


@pytest.fixture
def crowded() -> VectorQuantizer:
    """Ten codes among the latents, the others far away."""
    quantizer = make()
    with torch.no_grad():
        quantizer.embedding.weight[:10] = vectors_of(latents())[:10]
        quantizer.embedding.weight[10:] = -100
    return quantizer


def test_restart_moves_unused_codes_only_and_brings_them_into_use(crowded):
    z, before = latents(), weight_of(crowded)
    care = care_for(crowded, restart_every=3)
    used = crowded.nearest(z).unique()
    never = care_for(crowded, restart_every=0)
    for number in (0, 1):
        assert step(care, number, z) is None
        assert step(never, number, z) is None
        assert torch.equal(crowded.embedding.weight, before)
    assert care.since_restart.sum() == care.this_window.sum() == 2 * 4 * 36
    moved = step(care, 2, z)
    assert torch.equal(moved, (crowded.embedding.weight != before).any(1))
    assert moved.dtype == torch.bool
    assert not moved[used].any()
    assert moved.sum() == CODES - len(used)
    distance, near = torch.cdist(crowded.embedding.weight[moved], vectors_of(z)).min(1)
    assert 0.01 < distance.max() < 0.1
    assert len(near.unique()) == len(near)
    assert len(crowded.nearest(z).unique()) > 2 * len(used)
    assert (care.since_restart.sum(), care.this_window.sum()) == (0, 3 * 4 * 36)


def test_moved_codes_share_few_vectors_evenly(crowded):
    z = as_latents(vectors_of(latents(seed=8))[:16])
    with torch.no_grad():  # eight codes are chosen, those beside them and 16 places further are not
        crowded.embedding.weight[:] = 100.0
        crowded.embedding.weight[8:16] = z[:8, :, 0, 0]
        crowded.embedding.weight[24:] = z[8:, :, 0, 0]
    moved = step(care_for(crowded, restart_every=1), 0, z)
    assert moved.nonzero().flatten().tolist() == [*range(8), *range(16, 24)]
    assert len(torch.cdist(crowded.embedding.weight[moved], vectors_of(z)).argmin(1).unique()) == 16


def test_the_averaged_copy_follows_a_move_at_once(crowded):
    average = make()
    with torch.no_grad():
        average.embedding.weight.add_(3.0)
    before = weight_of(average)
    moved = step(care_for(crowded, restart_every=1, average=average), 0, latents())
    assert torch.equal(average.embedding.weight[moved], crowded.embedding.weight[moved])
    assert torch.equal(average.embedding.weight[~moved], before[~moved])
    care_for(crowded, start="kmeans", average=average).start(latents(), draws())
    assert torch.equal(average.embedding.weight, crowded.embedding.weight)
    assert average.embedding.weight.requires_grad


def test_two_processes_equal_one_with_both_batches():
    z = torch.randn(6, 4, 5, 5, generator=draws(2))
    alone = make()
    whole = care_for(alone, start="kmeans", restart_every=2, window=2)
    whole.start(z, draws(9))
    halves = z.split(3)
    quantizers, cares = [make(), make()], []
    for rank in (0, 1):

        def add_other(counts: torch.Tensor, rank: int = rank) -> None:
            codes = quantizers[rank].nearest(halves[1 - rank]).flatten()
            counts += torch.bincount(codes, minlength=CODES)

        settings = {"start": "kmeans", "restart_every": 2, "window": 2}
        cares.append(care_for(quantizers[rank], **settings, reduce=add_other, gather=lambda _: vectors_of(z)))
    for care, half in zip(cares, halves, strict=True):
        care.start(half, draws(9))
        assert torch.equal(care.quantizer.embedding.weight, alone.embedding.weight)
    with torch.no_grad():
        for quantizer in (alone, *quantizers):
            quantizer.embedding.weight[20:] = 50.0
    for number in range(3):
        moved = step(whole, number, z)
        for care, half in zip(cares, halves, strict=True):
            mine = step(care, number, half)
            assert (mine is None) == (moved is None)
            assert mine is None or torch.equal(mine, moved)
            assert torch.equal(care.quantizer.embedding.weight, alone.embedding.weight)
            assert all(torch.equal(care.state()[name], whole.state()[name]) for name in whole.state())
            assert care.usage() == whole.usage()


def test_a_step_does_not_synchronize_with_the_device():
    with FakeTensorMode():  # where the host cannot get at a value
        care = care_for(VectorQuantizer(CODES, 4), restart_every=1, window=1, average=VectorQuantizer(CODES, 4))
        z = torch.randn(4, 4, 6, 6)
        moved = care.after_step(0, care.quantizer.nearest(z), z, torch.Generator())
        assert moved.shape == (CODES,)
        for synchronizing in (lambda: moved.any().item(), lambda: z[z > 0], care.usage):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                synchronizing()


def test_the_optimizer_state_of_moved_codes_is_reset():
    quantizer = make()
    weight = quantizer.embedding.weight
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)
    forget(optimizer, weight, torch.ones(CODES, dtype=torch.bool))  # before the first step there is no state
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    moved = torch.arange(CODES) % 3 == 0
    forget(optimizer, weight, moved)
    before = weight_of(quantizer)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight[moved], before[moved])
    assert (weight[~moved] != before[~moved]).all()
    assert optimizer.state[weight]["step"] == 2


def test_resuming_within_a_window_changes_nothing():
    def run(care: CodebookCare, steps: range) -> CodebookCare:
        for number in steps:
            step(care, number, latents(seed=number))
        return care

    settings = {"restart_every": 7, "window": 20}
    whole = run(care_for(make(), **settings), range(50))
    first = run(care_for(make(), **settings), range(25))
    second = care_for(copy.deepcopy(first.quantizer), **settings)
    second.load_state(first.state())
    assert first.usage() == second.usage()
    run(first, range(25, 27))  # counts are copied
    run(second, range(25, 50))
    assert torch.equal(second.quantizer.embedding.weight, whole.quantizer.embedding.weight)
    assert all(torch.equal(second.state()[name], whole.state()[name]) for name in whole.state())
    assert second.usage() == whole.usage()
    assert whole.this_window.sum() == 10 * 4 * 36


def test_counts_of_another_codebook_are_refused():
    care = care_for(make())
    for state in (care_for(make(codes=8)).state(), {"chosen": torch.zeros(CODES)}):
        with pytest.raises(ValueError, match=r"\[8\].*\[32\]|chosen.*since_restart"):
            care.load_state(state)
