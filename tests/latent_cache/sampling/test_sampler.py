"""Draws from memory: every legal one with its right probability, no other; a function of (seed, step) alone."""

from collections import Counter

import numpy as np
import pytest
import torch

import latent_cache
from latent_cache import ResidentSampler, StoreError, StreamingSampler, first_batch
from latent_cache.sampling.draws import steps_per_block

LENGTHS = [1, 5, 2, 3, 12, 1, 4]


@pytest.fixture
def cache(numbered):
    return numbered(LENGTHS)


def make_sampler(cache, batch_size=64, clip_frames=6, seed=3, **options):
    return ResidentSampler(cache, "cpu", seed, batch_size, clip_frames, **options)


def make_streaming(cache, batch_size=64, **options):
    return StreamingSampler(cache, "cpu", 3, batch_size, 6, 2**20, **options)


def exact_probabilities(lengths, clip_frames, past_horizon=None):
    """{(video, target, condition): probability}, from the definition."""
    pairs = [(video, target) for video, length in enumerate(lengths) for target in range(2, length)]
    result = Counter()
    for video, target in pairs:
        places = range(2, min(clip_frames - 1, target) + 1)
        for place in places:
            known = place if past_horizon is None else min(place, past_horizon)
            for condition in range(target - known, target - 1):
                result[video, target, condition] += 1 / len(pairs) / len(places) / (known - 1)
    return result


@pytest.mark.parametrize(
    ("clip_frames", "past_horizon"), [(3, None), (6, None), (40, None), (6, 2), (6, 4), (40, 5), (40, 11), (6, 50)]
)
def test_every_legal_draw_has_its_exact_probability_and_no_other_happens(cache, clip_frames, past_horizon):
    sampler = make_sampler(cache, batch_size=100_000, clip_frames=clip_frames, past_horizon=past_horizon)
    drawn = sampler.indices(0)
    video = np.searchsorted(cache.offsets, drawn.target.numpy(), side="right") - 1
    start = cache.offsets[video]
    counts = Counter(zip(video, drawn.target.numpy() - start, drawn.condition.numpy() - start, strict=True))
    expected = exact_probabilities(LENGTHS, clip_frames, past_horizon)
    assert sum(expected.values()) == pytest.approx(1)
    assert counts.keys() == expected.keys()
    observed = np.array([counts[key] for key in expected])
    wanted = 100_000 * np.array(list(expected.values()))
    chi_square = ((observed - wanted) ** 2 / wanted).sum()
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)

    pairs = Counter(zip(video, drawn.target.numpy() - start, strict=True))
    assert sampler.legal_targets == len(pairs) == sum(max(length - 2, 0) for length in LENGTHS)
    assert max(abs(count - 100_000 / len(pairs)) for count in pairs.values()) < 5 * np.sqrt(100_000 / len(pairs))


def test_a_horizon_changes_conditions_and_no_target(cache):
    expected, sampler = make_sampler(cache).indices(2), make_sampler(cache, past_horizon=2).indices(2)
    assert torch.equal(sampler.target, expected.target)
    assert torch.equal(sampler.condition, expected.reference[0] - 1)
    assert not torch.equal(sampler.condition, expected.condition)


def test_batches_hold_what_the_indices_say(cache):
    sampler = make_sampler(cache)
    for step in range(20):
        batch, drawn = sampler.batch(step), sampler.indices(step)
        assert batch.target.shape == batch.reference.shape == batch.condition.shape == (64, 2, 3, 4)
        assert batch.target.dtype == torch.float32
        assert batch.distance.dtype == torch.int64
        videos = [frames[:, 0, 0, 0] for frames in (batch.target, batch.reference, batch.condition)]
        target, reference, condition = (f[:, 1, 0, 0] for f in (batch.target, batch.reference, batch.condition))
        assert torch.equal(videos[0], videos[1])
        assert torch.equal(videos[0], videos[2])
        assert torch.equal(reference, target - 1)
        assert torch.equal(reference - condition, batch.distance.float())
        assert torch.equal(batch.distance, drawn.distance)
        assert batch.distance.min() >= 1
        assert batch.distance.max() <= 4  # a condition lies at most clip_frames - 1 = 5 before the target
        starts = torch.from_numpy(cache.offsets)[videos[0].long()]
        assert torch.equal(target.long() + starts, drawn.target)


@pytest.mark.parametrize("kind", ["resident", "streaming"])
def test_the_newest_frames_are_those_before_the_target(cache, kind):
    """Before the first frame of a clip is that frame again; the other frames are those of a single newest one."""
    count, kinds = 4, {"resident": make_sampler, "streaming": make_streaming}
    single, sampler = kinds[kind](cache), kinds[kind](cache, recent_frames=count)
    repeated = 0
    for step in range(20):
        plain, batch = single.batch(step), sampler.batch(step)
        assert torch.equal(plain.target, batch.target)
        assert torch.equal(plain.condition, batch.condition)
        assert torch.equal(plain.distance, batch.distance)
        newest = torch.stack(batch.reference.chunk(count, dim=1))
        assert torch.equal(newest[0], plain.reference)
        assert torch.equal(newest[:, :, 0], plain.target[:, 0].expand_as(newest[:, :, 0]))
        back = (batch.target[:, 1] - newest[:, :, 1])[:, :, 0, 0].long()  # [count, b], from each to the target
        known = back[-1]
        assert torch.equal(back, torch.arange(1, count + 1)[:, None].minimum(known))
        assert (known >= torch.minimum(batch.distance + 1, torch.tensor(count))).all()
        repeated += (known < count).sum().item()
    assert 0 < repeated < 20 * 64
    for opened in (single, sampler):
        opened.close()


@pytest.mark.parametrize("kind", ["resident", "streaming"])
@pytest.mark.parametrize(("batch_size", "more"), [(1, ""), (8, ""), (9, " and 1 more"), (64, " and 56 more")])
def test_a_batch_is_described_by_its_targets(cache, kind, batch_size, more):
    sampler = make_sampler(cache, batch_size)
    if kind == "streaming":
        sampler = make_streaming(cache, batch_size)
    for step in (0, 1, 5):
        target = sampler.batch(step).target
        assert torch.equal(torch.from_numpy(sampler.targets(step) - cache.offsets[target[:, 0, 0, 0].int()]),
                           target[:, 1, 0, 0].long())  # fmt: skip
        named = [f"clip-{frames[0, 0, 0]:02.0f} frame {frames[1, 0, 0]:.0f}" for frames in target]
        assert sampler.describe_batch(step) == f"targets in {', '.join(named[:8])}{more}"
    sampler.close()


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_rows_of_the_ranks_are_the_global_batch(cache, world_size):
    sampler = make_sampler(cache)
    whole = sampler.batch(5)
    parts = [sampler.batch(5, rank, world_size) for rank in range(world_size)]
    for name in ("target", "reference", "condition", "distance"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_videos_that_are_all_too_short(kit, tmp_path):
    path = kit.build(tmp_path / "short.zarr", {"train": kit.plan([2, 1, 2])})
    with pytest.raises(StoreError, match=rf"{path}.* 3 frames.*3 videos have 1 to 2"):
        make_sampler(latent_cache.open(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0"),
        ({"clip_frames": 2}, "clip_frames = 2"),
        ({"seed": -1}, "seed = -1"),
        ({"past_horizon": 1}, "past_horizon = 1"),
        ({"past_horizon": 0}, "past_horizon = 0"),
        ({"storage_device": "meta"}, "storage_device = meta"),
    ],
)
def test_sizes_out_of_range(cache, options, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(cache, **options)


def test_ranks_that_do_not_fit(cache):
    sampler = make_sampler(cache)
    for rank, world_size in [(0, 3), (2, 2), (-1, 2)]:
        with pytest.raises(ValueError, match=f"batch_size = 64, rank {rank} of {world_size}"):
            sampler.batch(0, rank, world_size)
    with pytest.raises(ValueError, match="step = -1"):
        sampler.batch(-1)


def test_the_two_residencies_draw_the_same_and_keep_their_draws_to_themselves(cache):
    first, second = make_sampler(cache), make_sampler(cache, storage_device="cpu", dtype=torch.bfloat16)
    assert second.batch(0).condition.dtype == torch.bfloat16
    wanted = first.indices(3)
    batch = first.batch(3)
    batch.distance.zero_()
    wanted.target.zero_()
    assert torch.equal(first.batch(3).distance, second.batch(3).distance)
    assert torch.equal(first.indices(3).target, second.indices(3).target)
    assert first.indices(3).target.any()


@pytest.mark.parametrize("batch_size", [7, 64, 5000, 20_000])
def test_steps_are_served_in_any_order(cache, batch_size):
    """Also the first and last of a block of steps that are drawn at once."""
    forwards, backwards = make_sampler(cache, batch_size), make_sampler(cache, batch_size)
    block = steps_per_block(batch_size)
    steps = [0, 1, block - 1, block, 2 * block, 10**12]
    expected = [forwards.indices(step) for step in steps]
    for step, wanted in reversed(list(zip(steps, expected, strict=True))):
        found = backwards.indices(step)
        assert torch.equal(found.target, wanted.target)
        assert torch.equal(found.condition, wanted.condition)
        assert len(found.target) == batch_size
    assert not torch.equal(forwards.indices(0).target, forwards.indices(2).target)
    assert not torch.equal(forwards.indices(0).target, make_sampler(cache, batch_size, seed=4).indices(0).target)


@pytest.mark.parametrize("past_horizon", [None, 2])
def test_the_first_batch_needs_no_memory_for_the_split(numbered, past_horizon, monkeypatch):
    cache = numbered(LENGTHS)
    expected = make_sampler(cache, 40, past_horizon=past_horizon).batch(0)
    monkeypatch.delattr(type(cache), "load")  # nothing but the frames' chunks is read
    batch = first_batch(cache, 3, 40, 6, past_horizon=past_horizon)
    for name, tensor in vars(expected).items():
        assert torch.equal(getattr(batch, name), tensor)
        assert getattr(batch, name).dtype == tensor.dtype
