"""Which tier a split is read in, and what is said about it."""

import threading
from concurrent.futures import ThreadPoolExecutor

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
    ("residency", "kind"),
    [("auto", ResidentSampler), ("device", ResidentSampler), ("host", ResidentSampler), ("stream", StreamingSampler)],
)
def test_one_interface(cache, residency, kind):
    for horizon, distances in ((2, [1]), (None, [1, 2, 3, 4])):
        options = {"residency": residency, "memory_budget": 10**6, "past_horizon": horizon}
        sampler = open_sampler(cache, "cpu", 3, 64, 6, **options)
        assert isinstance(sampler, kind)
        assert sampler.legal_targets == sum(max(length - 2, 0) for length in LENGTHS)
        batch = sampler.batch(0)
        assert batch.target.shape == batch.reference.shape == batch.condition.shape == (64, 2, 3, 4)
        assert (batch.target.dtype, batch.distance.dtype) == (torch.float32, torch.int64)
        assert batch.distance.unique().tolist() == distances
        assert ("50%" if residency == "auto" else f"cache.residency = '{residency}'") in sampler.describe()
        for _ in range(2):
            sampler.close()
        with pytest.raises(ValueError, match="closed"):
            sampler.batch(0)
    with pytest.raises(ValueError, match="past_horizon = 1"):
        open_sampler(cache, "cpu", 3, 64, 6, residency=residency, memory_budget=10**6, past_horizon=1)


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


def in_processes(monkeypatch, memories, call):
    """Call `call(agree)` in one thread per process, each with its own free memory (device, host); the results."""
    here, answers = threading.local(), [True] * len(memories)
    barrier = threading.Barrier(len(memories), timeout=30)

    def agree(answer):
        answers[here.rank] = answer
        barrier.wait()
        agreed = all(answers)
        barrier.wait()
        return agreed

    def run(rank):
        here.rank, (here.cuda, here.cpu) = rank, memories[rank]
        try:
            return call(agree)
        except StoreError as error:
            return error

    monkeypatch.setattr("latent_cache.sampling.residency.free_memory", lambda device: getattr(here, device.type))
    with ThreadPoolExecutor(len(memories)) as pool:
        return list(pool.map(run, range(len(memories))))


MUCH = 10**6


@pytest.mark.parametrize(
    ("memories", "expected"),
    [
        ([(MUCH, MUCH), (MUCH, MUCH)], "device"),
        ([(MUCH, MUCH), (2687, MUCH)], "host"),
        ([(MUCH, 1919), (2687, MUCH)], "stream"),  # the first has no room on the host, the second none on the device
        ([(MUCH, MUCH), (MUCH, MUCH), (0, 0)], "stream"),
    ],
)
def test_residency_is_one_decision_of_all_processes(cache, monkeypatch, memories, expected):
    chosen = in_processes(monkeypatch, memories, lambda agree: choose_residency(cache, "cuda", "auto", agree=agree))
    assert [choice.tier for choice in chosen] == [expected] * len(memories)


@pytest.mark.parametrize("residency", ["device", "host", "stream"])
def test_what_does_not_fit_in_one_process_is_refused_in_all(cache, monkeypatch, residency):
    def opened(agree):
        return open_sampler(cache, "cpu", 3, 8, 6, residency=residency, memory_budget=10**6, agree=agree)

    errors = in_processes(monkeypatch, [(MUCH, MUCH), (0, 0)], opened)
    assert [type(error) for error in errors] == [StoreError, StoreError]
    assert "less in another process" in str(errors[0])
    assert "less in another process" not in str(errors[1])


def test_processes_of_one_machine_share_its_memory(cache, monkeypatch):
    set_free_memory(monkeypatch, 10**6, 2 * 1920)
    assert choose_residency(cache, "cuda", "host", sharing=2).tier == "host"
    with pytest.raises(StoreError, match="per process"):
        choose_residency(cache, "cuda", "host", sharing=3)
    assert choose_residency(cache, "cuda", "auto", sharing=3).tier == "device"  # each has its own GPU
    assert choose_residency(cache, "cpu", "auto", sharing=3).tier == "stream"
    set_free_memory(monkeypatch, 10**6, 10**6)
    sampler = open_tier(cache, "stream")
    size = sampler.plan.nbytes
    sampler.close()
    set_free_memory(monkeypatch, 10**6, 2 * size)
    options = {"residency": "stream", "memory_budget": 10**6}
    open_sampler(cache, "cpu", 3, 8, 6, sharing=2, **options).close()
    with pytest.raises(StoreError, match=r"per process.*cache\.memory_budget"):
        open_sampler(cache, "cpu", 3, 8, 6, sharing=3, **options)


def test_free_memory_is_known_here(cache):
    assert choose_residency(cache, "cpu", "auto").tier == "device"
