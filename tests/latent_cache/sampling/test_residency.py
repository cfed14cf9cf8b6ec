"""Which tier a split is read in, and what is said about it."""

import re
from contextlib import closing

import pytest
import torch

from latent_cache import ResidentSampler, StoreError, StreamingSampler, choose_residency, open_sampler

LENGTHS = [1, 5, 2, 3, 12, 1, 4]


@pytest.fixture
def cache(numbered):
    return numbered(LENGTHS)


def open_tier(cache, residency, budget=10**6):
    return open_sampler(cache, "cpu", 3, 8, 6, residency=residency, memory_budget=budget)


def set_free_memory(monkeypatch, device_free, host_free):
    free = {"cuda": device_free, "cpu": host_free}
    monkeypatch.setattr("latent_cache.sampling.residency.free_memory", lambda device: free[device.type])


@pytest.mark.parametrize(
    ("device_free", "host_free", "wanted", "expected"),
    [
        (10**6, 10**6, "auto", "device"),
        (2688, 0, "auto", "device"),  # half of it is just enough
        (2687, 10**6, "auto", "host"),
        (2687, 1921, "auto", "host"),
        (2687, 1919, "auto", "stream"),
        (10**6, 1919, "host", None),
        (2687, 10**6, "device", None),
        (10**6, 10**6, "host", "host"),
        (10**6, 10**6, "device", "device"),
        (10**6, 10**6, "stream", "stream"),
        (0, 0, "stream", "stream"),
    ],
)
def test_residency_follows_free_memory(cache, monkeypatch, device_free, host_free, wanted, expected):
    set_free_memory(monkeypatch, device_free, host_free)
    assert cache.nbytes == sum(LENGTHS) * 2 * 3 * 4 * 2 == 1344
    if expected is None:
        message = rf"{cache.url}.*cache\.residency = '{wanted}'.*cache\.residency=stream"
        with pytest.raises(StoreError, match=message):
            choose_residency(cache, "cuda", wanted)
    else:
        chosen = choose_residency(cache, "cuda", wanted)
        assert chosen.tier == expected
        assert (wanted in chosen.why) == (wanted != "auto")


@pytest.mark.parametrize(
    ("residency", "kind", "said"),
    [
        ("auto", ResidentSampler, "0 MB .*cpu .*50%"),
        ("device", ResidentSampler, r"0 MB .*cpu .*cache\.residency = 'device'"),
        ("host", ResidentSampler, r"0 MB .*cpu .*cache\.residency = 'host'"),
        ("stream", StreamingSampler, r"0 MB .* 1 windows .*cache\.residency = 'stream'"),
    ],
)
def test_one_interface(cache, residency, kind, said):
    sampler = open_tier(cache, residency)
    assert isinstance(sampler, kind)
    assert sampler.legal_targets == sum(max(length - 2, 0) for length in LENGTHS)
    batch = sampler.batch(0)
    assert batch.target.shape == batch.reference.shape == batch.condition.shape == (8, 2, 3, 4)
    assert batch.target.dtype == torch.float32
    assert batch.distance.dtype == torch.int64
    assert re.search(said, sampler.describe()), sampler.describe()
    sampler.close()
    sampler.close()
    with pytest.raises(ValueError, match="closed"):
        sampler.batch(0)


@pytest.mark.parametrize("residency", ["device", "host", "stream"])
def test_every_tier_takes_the_horizon(cache, residency):
    options = {"residency": residency, "memory_budget": 10**6}
    for horizon, distances in ((2, [1]), (None, [1, 2, 3, 4])):
        with closing(open_sampler(cache, "cpu", 3, 64, 6, past_horizon=horizon, **options)) as sampler:
            assert sampler.batch(0).distance.unique().tolist() == distances
    with pytest.raises(ValueError, match="past_horizon = 1"):
        open_sampler(cache, "cpu", 3, 64, 6, past_horizon=1, **options)


def test_auto_streams_what_fits_nowhere(numbered, monkeypatch):
    cache = numbered([30] * 20, name="large")
    set_free_memory(monkeypatch, cache.nbytes, cache.nbytes)
    sampler = open_tier(cache, "auto", budget=cache.nbytes // 4)
    assert sampler.tier == "stream"
    assert "free memory" in sampler.describe()
    sampler.close()


def test_a_budget_beyond_the_free_memory(cache, monkeypatch):
    set_free_memory(monkeypatch, 1000, 1000)
    with pytest.raises(StoreError, match=rf"{cache.url}.*0\.0 GiB.*lower cache\.memory_budget"):
        open_tier(cache, "stream")


def test_free_memory_is_known_here(cache):
    assert choose_residency(cache, "cpu", "auto").tier == "device"
