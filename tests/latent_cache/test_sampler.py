"""Draws: every legal one with its right probability, no other; a function of (seed, step) alone."""

from collections import Counter

import numpy as np
import pytest
import torch

import latent_cache
from latent_cache import ResidentSampler, StoreError, StoreWriter, choose_residency, step_generator

LENGTHS = [1, 5, 2, 3, 12, 1, 4]


@pytest.fixture
def cache(kit, tmp_path):
    """Latents that say where they come from: channel 0 is the video, channel 1 the frame within it."""
    plan = kit.plan(LENGTHS)
    with StoreWriter.open(tmp_path / "toys.zarr", kit.metadata, {"train": plan}, codes=False) as writer:
        for chunk in writer.pending("train"):
            numbers = [(piece.video, frame) for piece in chunk.pieces for frame in range(piece.start, piece.stop)]
            latents = np.broadcast_to(np.array(numbers, np.float32)[:, :, None, None], (chunk.frames, *kit.shape))
            writer.write_chunk("train", chunk, latents, None)
        writer.finish()
    return latent_cache.open(tmp_path / "toys.zarr")


def make_sampler(cache, batch_size=64, clip_frames=6, seed=3, **options):
    return ResidentSampler(cache, "cpu", seed, batch_size, clip_frames, **options)


def exact_probabilities(lengths, clip_frames):
    """{(video, target, condition): probability}, from the definition."""
    pairs = [(video, target) for video, length in enumerate(lengths) for target in range(2, length)]
    result = Counter()
    for video, target in pairs:
        places = range(2, min(clip_frames - 1, target) + 1)
        for place in places:
            for condition in range(target - place, target - 1):
                result[video, target, condition] += 1 / len(pairs) / len(places) / (place - 1)
    return result


@pytest.mark.parametrize("clip_frames", [3, 6, 40])
def test_every_legal_draw_has_its_exact_probability_and_no_other_happens(cache, clip_frames):
    sampler = make_sampler(cache, batch_size=100_000, clip_frames=clip_frames)
    drawn = sampler.indices(0)
    video = np.searchsorted(cache.offsets, drawn.target.numpy(), side="right") - 1
    start = cache.offsets[video]
    counts = Counter(zip(video, drawn.target.numpy() - start, drawn.condition.numpy() - start, strict=True))
    expected = exact_probabilities(LENGTHS, clip_frames)
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


def test_a_step_is_a_function_of_seed_and_step(cache):
    first, again, other = make_sampler(cache), make_sampler(cache), make_sampler(cache, seed=4)
    for sampler in (first, other):
        sampler.batch(11)
    assert torch.equal(first.batch(7).target, again.batch(7).target)
    assert not torch.equal(first.indices(7).target, first.indices(8).target)
    assert not torch.equal(first.indices(7).target, other.indices(7).target)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_rows_of_the_ranks_are_the_global_batch(cache, world_size):
    sampler = make_sampler(cache)
    whole = sampler.batch(5)
    parts = [sampler.batch(5, rank, world_size) for rank in range(world_size)]
    for name in ("target", "reference", "condition", "distance"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_half_precision_batches(cache):
    batch = make_sampler(cache, dtype=torch.bfloat16, storage_device="cpu").batch(0)
    assert batch.condition.dtype == torch.bfloat16


def test_large_stores_are_drawn_from_evenly():
    """10^8 targets: float32 draws would miss most of them, 32-bit integers favour some by 1 %."""
    sampler = object.__new__(ResidentSampler)
    sampler.seed, sampler.batch_size, sampler.clip_frames = 0, 100_000, 16
    videos, legal = 10_000, 10_000
    sampler._legal_offsets = np.arange(videos + 1) * legal
    sampler._video_offsets = np.arange(videos + 1) * (legal + 2)
    target = sampler.indices(0).target
    place = target % (legal + 2)
    assert int(place.min()) >= 2
    odd = (place % 2).double().mean()
    assert abs(float(odd) - 0.5) < 5 * 0.5 / np.sqrt(100_000)
    assert len(target.unique()) > 99_900  # with float32 draws there would be a quarter fewer values to land on
    assert float((target >= 75_000_000).double().mean()) == pytest.approx(0.25, abs=0.01)


def test_generators_of_neighbouring_steps_have_nothing_in_common():
    draws = torch.stack([torch.rand(512, generator=step_generator(0, step)) for step in range(64)])
    correlation = torch.corrcoef(draws) - torch.eye(64)
    assert correlation.abs().max() < 5 / np.sqrt(512)
    assert abs(float(draws[:, 0].mean()) - 0.5) < 5 * 0.289 / 8


def test_generators_do_not_repeat_within_a_run():
    firsts = {step_generator(12, step).initial_seed() % 2**32 for step in range(20_000)}
    assert len(firsts) == 20_000


def test_streams_and_seeds_differ():
    seeds = {step_generator(*key).initial_seed() for key in [(0, 1), (1, 0), (0, 0), (2**40, 0)]}
    seeds.add(step_generator(0, 0, stream="frames").initial_seed())
    assert len(seeds) == 5
    with pytest.raises(ValueError, match="seed = -1"):
        step_generator(-1, 0)


def test_videos_that_are_all_too_short(kit, tmp_path):
    path = kit.build(tmp_path / "short.zarr", {"train": kit.plan([2, 1, 2])})
    with pytest.raises(StoreError, match="no video has the 3 frames of a sample; the 3 videos have 1 to 2"):
        make_sampler(latent_cache.open(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0"),
        ({"clip_frames": 2}, "clip_frames = 2"),
        ({"storage_device": "meta"}, "storage_device = meta: the CPU or the device, cpu, is wanted"),
    ],
)
def test_sizes_out_of_range(cache, options, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(cache, **options)


def test_ranks_that_do_not_fit(cache):
    sampler = make_sampler(cache)
    for rank, world_size in [(0, 3), (2, 2), (-1, 2)]:
        with pytest.raises(ValueError, match="choose a batch size that the number of processes divides"):
            sampler.batch(0, rank, world_size)


@pytest.mark.parametrize(
    ("device_free", "host_free", "wanted", "expected"),
    [
        (10**6, 10**6, "auto", "device"),
        (2500, 10**6, "auto", "host"),
        (1900, 1900, "auto", None),
        (10**6, 1900, "host", None),
        (10**6, 10**6, "host", "host"),
    ],
)
def test_residency_follows_free_memory(cache, monkeypatch, device_free, host_free, wanted, expected):
    free = {"cuda": device_free, "cpu": host_free}
    monkeypatch.setattr("latent_cache.sampler.free_memory", lambda device: free[device.type])
    assert cache.nbytes == sum(LENGTHS) * 2 * 3 * 4 * 2
    if expected is None:
        with pytest.raises(StoreError, match=rf"cache.residency = '{wanted}', but the latents take 0.0 GiB"):
            choose_residency(cache, "cuda", wanted)
    else:
        assert choose_residency(cache, "cuda", wanted) == expected


def test_free_memory_is_known_here(cache):
    assert choose_residency(cache, "cpu", "auto") == "device"
