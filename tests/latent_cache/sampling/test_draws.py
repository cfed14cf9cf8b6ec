"""Generators of a step, blocks of uniform numbers, legal targets, distances, and a permutation without memory."""

import numpy as np
import pytest
import torch

from latent_cache import longest_distance, step_generator
from latent_cache.sampling.draws import LegalTargets, draw_past, to_integer, uniform_block
from latent_cache.sampling.windows import ROUNDS, permute
from stage2_flow.conditioning import past_window


def test_generators_have_nothing_in_common():
    draws = torch.stack([torch.rand(512, generator=step_generator(0, step)) for step in range(64)])
    correlation = torch.corrcoef(draws) - torch.eye(64)
    assert correlation.abs().max() < 5 / np.sqrt(512)
    assert abs(float(draws[:, 0].mean()) - 0.5) < 5 * 0.289 / 8
    assert len({step_generator(12, step).initial_seed() % 2**32 for step in range(20_000)}) == 20_000
    seeds = {step_generator(*key).initial_seed() for key in [(0, 1), (1, 0), (0, 0), (2**40, 0)]}
    seeds.add(step_generator(0, 0, stream="frames").initial_seed())
    assert len(seeds) == 5
    with pytest.raises(ValueError, match="seed = -1"):
        step_generator(-1, 0)


def test_blocks_are_uniform_and_have_nothing_in_common():
    blocks = np.stack(
        [uniform_block(*key, (4096,)) for key in [(0, "a", 0), (0, "a", 1), (0, "b", 0), (1, "a", 0), (2**70, "a", 0)]]
    )
    assert np.array_equal(blocks[1], uniform_block(0, "a", 1, (4096,)))
    assert abs(np.corrcoef(blocks) - np.eye(5)).max() < 5 / np.sqrt(4096)
    assert len(np.unique(blocks)) == blocks.size  # nor does one go on in the middle of another
    assert blocks.min() >= 0
    assert blocks.max() < 1
    assert abs(blocks.mean(axis=1) - 0.5).max() < 5 * 0.289 / np.sqrt(4096)
    with pytest.raises(ValueError, match="block = -1"):
        uniform_block(0, "a", -1, (1,))


def test_the_largest_uniform_number_stays_below_the_limit():
    limits = np.array([1, 2, 3, 10**8, 2**52 + 1])
    assert np.array_equal(to_integer(np.full(5, 1 - 2**-53), limits), limits - 1)


@pytest.mark.parametrize(
    ("place", "clip_frames", "past_horizon"),
    [
        (2, 6, 2),
        (9, 6, 2),  # the only condition is the reference's neighbor
        (9, 6, 3),
        (9, 6, 4),
        (9, 6, 5),  # the whole clip of a target in its last place
        (9, 6, 100),  # more than the clip
        (3, 40, 3),
        (30, 40, 8),
        (300, 40, None),
        (4, 3, 3),  # clips of 3 frames have one condition
    ],
)
def test_every_legal_distance_is_drawn_alike_given_the_place_in_the_clip(place, clip_frames, past_horizon):
    n = 60_000
    u, v = np.random.default_rng(1).random((2, n))
    place_in_clip, distance = draw_past(u, v, np.full(n, place), clip_frames, past_horizon)
    assert distance.dtype == np.int64
    last = min(place, clip_frames - 1)
    assert np.array_equal(place_in_clip, 2 + (u * (last - 1)).astype(int))
    for p in range(2, last + 1):
        found = np.bincount(distance[place_in_clip == p])
        window = past_window(p, past_horizon)
        legal = sorted(p - 1 - index for index in range(window.first, window.first + window.count))
        assert legal == list(range(1, min(p - 1, p if past_horizon is None else past_horizon - 1) + 1))
        assert np.flatnonzero(found).tolist() == legal
        wanted = found.sum() / len(legal)
        chi_square = ((found[1:] - wanted) ** 2 / wanted).sum()
        assert chi_square < len(legal) - 1 + 6 * np.sqrt(2 * len(legal))


@pytest.mark.parametrize(
    ("lengths", "clip_frames", "past_horizon", "expected"),
    [([50, 7], 40, None, 38), ([50, 7], 40, 10, 9), ([12, 7], 40, None, 10), ([12, 3], 40, 30, 10), ([3], 40, None, 1),
     ([50], 3, None, 1), ([50], 40, 2, 1)],
)  # fmt: skip
def test_the_longest_distance_is_the_largest_that_is_drawn(lengths, clip_frames, past_horizon, expected):
    assert longest_distance(np.array(lengths), clip_frames, past_horizon) == expected
    u, v = np.random.default_rng(1).random((2, 200_000))
    assert draw_past(u, v, np.full(200_000, max(lengths) - 1), clip_frames, past_horizon)[1].max() == expected


def test_without_a_horizon_the_draws_are_what_they_were():
    """Recorded before there were horizons: a run that goes on from then sees the same batches."""
    uniform = uniform_block(7, "frames", 3, (2, 12))
    place = np.array([2, 3, 4, 5, 9, 17, 39, 40, 41, 100, 2, 3])
    expected = [1, 2, 2, 4, 2, 3, 17, 13, 11, 1, 1, 2]
    assert draw_past(*uniform, place, 40)[1].tolist() == expected
    assert draw_past(*uniform, place, 40, None)[1].tolist() == expected
    assert draw_past(*uniform, place, 40, 40)[1].tolist() == expected  # a horizon of the clip takes nothing away


@pytest.mark.parametrize(
    "lengths",
    [
        [3],
        [1, 5, 2, 3, 12, 1, 4],
        [1] * 200 + [40] + [2] * 300 + [3] * 50 + [1] * 9,
        [10_000, *[3] * 500, 2, 10_000],
    ],
)
def test_targets_are_found_as_they_are_counted(lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    legal = LegalTargets(offsets)
    expected = [(place, offsets[video] + place) for video, length in enumerate(lengths) for place in range(2, length)]
    assert legal.count == len(expected)
    place, frame = legal.locate(np.arange(legal.count))
    assert np.array_equal(np.stack([place, frame], 1), expected)
    frames = np.arange(offsets[-1] + 1)
    assert np.array_equal(legal.before(frames), np.searchsorted(frame, frames))


def test_tables_take_little_memory():
    lengths = np.random.default_rng(0).integers(1, 50, 10_000)
    legal = LegalTargets(np.concatenate([[0], np.cumsum(lengths)]))
    assert legal.nbytes <= 12 * 10_000 + 16


def test_large_stores_are_drawn_from_evenly():
    """10^8 targets: float32 draws would miss most of them, 32-bit integers favor some by 1 %."""
    videos, length = 10_000, 10_000
    legal = LegalTargets(np.arange(videos + 1) * (length + 2))
    place, target = legal.locate(to_integer(uniform_block(0, "frames", 0, (100_000,)), legal.count))
    assert place.min() >= 2
    assert abs((place % 2).mean() - 0.5) < 5 * 0.5 / np.sqrt(100_000)
    assert len(np.unique(target)) > 99_900  # with float32 draws there would be a quarter fewer values to land on
    assert (target >= 75_015_000).mean() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 100, 1023, 1024, 1025, 70_000])
def test_a_permutation_has_every_number_once(count):
    key = np.random.default_rng(count).integers(0, 2**64, ROUNDS, np.uint64)
    served = permute(np.arange(count), count, key)
    assert np.array_equal(np.sort(served), np.arange(count))
    assert np.array_equal(permute(np.arange(count)[::-1], count, key), served[::-1])
    assert count < 100 or not np.array_equal(served, np.arange(count))


@pytest.mark.parametrize("count", [5, 7, 16])
def test_two_places_of_a_permutation_are_uniform_and_independent(count):
    keys = np.random.default_rng(7).integers(0, 2**64, (3000, ROUNDS), np.uint64)
    first, second = np.stack([permute(np.array([0, count - 1]), count, key) for key in keys]).T
    observed = np.bincount(first * count + second, minlength=count**2).reshape(count, count)
    assert not observed.diagonal().any()
    wanted = len(keys) / (count * (count - 1))
    chi_square = ((observed - wanted) ** 2 / wanted)[~np.eye(count, dtype=bool)].sum()
    freedom = count * (count - 1) - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 4


def test_neighbors_are_torn_apart():
    """What lies side by side in a window is not served side by side, nor evenly spaced."""
    count = 50_000
    served = permute(np.arange(count), count, np.random.default_rng(0).integers(0, 2**64, ROUNDS, np.uint64))
    assert abs(np.corrcoef(served[:-1], served[1:])[0, 1]) < 5 / np.sqrt(count)
    steps, times = np.unique(np.diff(served), return_counts=True)
    assert times.max() < 12
    assert len(steps) > 0.6 * count
