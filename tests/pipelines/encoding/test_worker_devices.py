"""Encoding on GPUs, decided without one: which GPU a cluster's worker takes, and how many threads feed it."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines.encoding.chunk_encoder import ChunkEncoder, EncodeJob
from pipelines.encoding.cluster import claim_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The UUIDs of the GPUs that a worker sees."""
    gpus = ["GPU-a", "GPU-b", "GPU-c"]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(gpus))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(uuid=gpus[index]))
    return gpus


def test_each_worker_takes_a_gpu_of_its_own_and_then_they_share(gpus) -> None:
    workers = [ExitStack() for _ in range(7)]
    assert [claim_device("auto", worker).index for worker in workers] == [0, 1, 2, 0, 1, 2, 0]
    workers[1].close()
    workers[5].close()
    with ExitStack() as held:
        assert claim_device("cuda", held).index == 1
    for worker in workers:
        worker.close()


def test_workers_that_see_the_gpus_in_other_orders_take_different_ones(gpus) -> None:
    """As dask-cuda starts them: each with its own GPU first."""
    taken = []
    with ExitStack() as held:
        for _ in range(3):
            taken.append(gpus[claim_device("auto", held).index])
            gpus.append(gpus.pop(0))
        gpus[:] = ["GPU-c"]
        assert claim_device("auto", held).index == 0
    assert taken == ["GPU-a", "GPU-b", "GPU-c"]


def test_a_named_device_is_taken_as_it_is(gpus) -> None:
    for _ in range(2):
        with ExitStack() as held:
            assert claim_device("cuda:2", held) == torch.device("cuda:2")
            assert claim_device("cpu", held) == torch.device("cpu")


def test_all_cores_decode_for_a_gpu_whatever_its_network_needs(kit, monkeypatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(48)))
    monkeypatch.setattr("stage1_autoencoder.frame_encoder.LIVE_FEATURE_MAPS", 10**6)  # far beyond the host's memory
    job = EncodeJob(kit.splits, kit.config(memory_budget="1 GiB").cache, None, "", "cuda", (4, 4, 4), {}, {}, 10, "")
    encoder = ChunkEncoder(job, kit.model, torch.device("cuda"))
    assert (encoder.threads.decoders, encoder.threads.encoders) == (48, 2)
    encoder.close()


def test_all_cores_decode_where_a_chunk_has_few_videos(kit, monkeypatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    kit.splits = {"train": kit.Source({"long": 400, "longer": 420})}
    source = kit.splits["train"]
    source.seconds = {"long": 1e-3, "longer": 1e-3}
    decoding, most = [0], [0]
    iterate, lock = source.iterate, threading.Lock()

    def counted(*arguments: int) -> Iterator[np.ndarray]:
        with lock:
            decoding[0] += 1
            most[0] = max(most[0], decoding[0])
        yield from iterate(*arguments)
        with lock:
            decoding[0] -= 1

    monkeypatch.setattr(type(source), "iterate", lambda self, *arguments: counted(*arguments))
    kit.encode(chunk_frames=20)
    assert most[0] == 6
