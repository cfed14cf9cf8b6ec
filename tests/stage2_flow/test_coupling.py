"""Noise changes rows only where that straightens the paths, and only between like conditions."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from latent_cache.sampling.sampler import FlowBatch
from stage2_flow.coupling import BLOCK_ROWS, couple
from stage2_flow.loss import couple_draws, draw_flow

SHAPE = (4, 2, 3)


def rows_of(batch: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, targets and references, all unlike."""
    generator = torch.Generator().manual_seed(seed)
    noise, target, reference = torch.randn(3, batch, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    return noise, target, reference


def cost(noise: Tensor, target: Tensor) -> float:
    """Sum of |e_i - z_i|^2."""
    return float((noise.double() - target.double()).square().sum())


def origins(coupled: Tensor, noise: Tensor) -> list[int]:
    """The row that each row's noise came from."""
    same = (coupled[:, None] == noise[None]).flatten(2).all(dim=-1)
    assert (same.sum(dim=1) == 1).all(), "a row holds what is no row's noise"
    return same.long().argmax(dim=1).tolist()


def by_definition(noise: Tensor, target: Tensor, reference: Tensor, weight: float) -> list[int]:
    """`origins`, pair by pair in float64 from the costs as they are defined."""
    origin = list(range(len(noise)))
    e, z, r = noise.double().flatten(1), target.double().flatten(1), reference.double().flatten(1)

    def price(row: int, holder: int) -> Tensor:
        moved = weight * (r[row] - r[holder]).square().sum() / r.shape[1] ** 0.5
        return (e[origin[holder]] - (z[row] - r[row])).square().sum() + moved

    for stride in (1, 2, 4):
        for i in range(len(noise)):
            j = i ^ stride
            if i < j < len(noise) and price(i, j) + price(j, i) < price(i, i) + price(j, j):
                origin[i], origin[j] = origin[j], origin[i]
    return origin


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 11, 16, 24])
def test_alike_conditions_shorten_the_paths(batch):
    for seed in range(20):
        noise, target, reference = rows_of(batch, seed)
        coupled = couple(noise, target, reference[:1].expand_as(noise))
        assert sorted(origins(coupled, noise)) == list(range(batch))
        assert cost(coupled, target) <= cost(noise, target)
        if batch >= 8:
            assert cost(coupled, target) < cost(noise, target)


@pytest.mark.parametrize("batch", [2, 16, 64])
def test_unlike_conditions_keep_their_noise(batch):
    noise, target, reference = rows_of(batch)
    assert torch.equal(couple(noise, target, 100 * reference), noise)
    assert torch.equal(couple(noise, target, reference, weight=1e6), noise)


def test_noise_does_not_follow_the_reference_where_targets_are_the_references():
    """Nothing is new in any row: no noise suits one row better than another, however the rows differ."""
    noise, _, reference = rows_of(64)
    for scale in (0.01, 0.1, 1.0):
        assert torch.equal(couple(noise, scale * reference, scale * reference, weight=0), noise)


def test_groups_of_like_conditions_exchange_among_themselves():
    noise, target, reference = rows_of(64)
    group = torch.arange(64) % 4  # so that only i XOR 4 is of the same group
    reference = 1000 * reference[group]
    origin = origins(couple(noise, target + reference, reference), noise)
    assert all(row % 4 == came % 4 for row, came in enumerate(origin))
    assert origin != list(range(64))


@pytest.mark.parametrize("batch", [2, 3, 7, 8, 9, 13, 16, 20])
@pytest.mark.parametrize("weight", [0.0, 0.2, 0.5, 2.0])
def test_pairs_swap_exactly_where_the_cost_falls(batch, weight):
    for seed in range(10):
        noise, target, reference = rows_of(batch, seed)
        assert origins(couple(noise, target, reference, weight), noise) == by_definition(
            noise, target, reference, weight
        )


def test_of_two_rows_the_better_order_is_found():
    swapped = 0
    for seed in range(50):
        noise, target, reference = rows_of(2, seed)
        coupled = couple(noise, target, reference[:1].expand_as(noise))
        best = min(permutations(range(2)), key=lambda order: cost(noise[list(order)], target))
        assert origins(coupled, noise) == list(best)
        swapped += best != (0, 1)
    assert 10 < swapped < 40


def test_a_block_of_rows_depends_on_no_other():
    noise, target, reference = rows_of(24)
    whole = couple(noise, target, reference)
    for start in range(0, 24, BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        assert torch.equal(couple(noise[rows], target[rows], reference[rows]), whole[rows])
    assert torch.equal(couple(noise[:11], target[:11], reference[:11])[:8], whole[:8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_decides_nothing(dtype):
    for seed in range(20):
        wide = rows_of(16, seed, torch.float64)
        expected = by_definition(*wide, weight=0.5)
        noise, target, reference = (x.to(dtype) for x in wide)
        coupled = couple(noise, target, reference)
        assert coupled.dtype == dtype
        assert origins(coupled, noise) == expected


def test_bf16_is_compared_in_fp32():
    """Among so many pairs there are some whose gain is about the price: in bf16 they would go the other way."""
    for seed in range(20):
        noise, target, reference = (x.bfloat16() for x in rows_of(64, seed, torch.float64))
        coupled = couple(noise, target, reference)
        assert coupled.dtype == torch.bfloat16
        assert origins(coupled, noise) == by_definition(noise, target, reference, weight=0.5)


def test_coupled_noise_is_still_normal_given_the_reference():
    """Between unlike videos whose next frames are hard to tell, noise learns next to nothing about the reference."""
    generator = torch.Generator().manual_seed(0)
    noise, reference, news = torch.randn(3, 4096, 64, generator=generator)
    coupled = couple(noise, reference + 0.5 * news, reference)

    def along(direction: Tensor) -> float:
        """Mean of the noise along a direction, of standard deviation 1 / sqrt(4096) if they are independent."""
        return float(((coupled * direction).sum(dim=1) / direction.norm(dim=1)).mean())

    assert abs(along(reference)) < 5 / 64
    assert along(news) > 0.3
    assert abs(float(coupled.std()) - 1) < 0.01


def test_nothing_waits_for_the_device():
    """On the meta device, which has no values to wait for."""
    arguments = [x.to("meta") for x in rows_of(11)]
    assert couple(*arguments).shape == (11, *SHAPE)


def test_compiles_without_a_graph_break():
    arguments = rows_of(11)
    compiled = torch.compile(couple, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), couple(*arguments))


def test_draws_are_coupled_on_demand():
    _, target, reference = rows_of(16)
    batch = FlowBatch(target, reference, reference, distance=torch.ones(16, dtype=torch.int64))
    draws = draw_flow(target.shape, torch.Generator().manual_seed(0), "cpu")
    assert couple_draws(batch, draws, "independent") is draws
    coupled = couple_draws(batch, draws, "conditional")
    assert torch.equal(coupled.noise, couple(draws.noise, target, reference))
    assert not torch.equal(coupled.noise, draws.noise)
    assert torch.equal(coupled.t, draws.t)
