"""Processes of one training before they are connected: their devices, and those that fail or do not start."""

import datetime
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist

from pipelines.errors import UserError
from pipelines.runtime import distributed
from pipelines.runtime.distributed import Processes, own_part

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that were made the current one, on a machine with two GPUs, in the second process."""
    chosen: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    return chosen


def test_the_device_of_a_single_process_is_the_current_one(chosen) -> None:
    one = Processes()
    assert one.own_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]
    assert (one.own_device(GPU), one.own_device(CPU)) == (GPU, CPU)


def test_each_process_has_a_gpu_of_its_own(chosen) -> None:
    assert Processes(3, 4, here=2).own_device(GPU) == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]
    assert Processes(1, 2, here=2).own_device(CPU) == CPU


def test_devices_that_processes_cannot_have(chosen) -> None:
    with pytest.raises(UserError, match=r"3 processes.*2 GPU.*NUM_GPUS=2"):
        Processes(0, 3, here=3).own_device(GPU)
    with pytest.raises(UserError, match=r"--device cuda:0.*2 processes.*CUDA_VISIBLE_DEVICES"):
        Processes(0, 2, here=2).own_device(torch.device("cuda:0"))
    assert chosen == []


def test_a_process_that_does_not_start_is_named(monkeypatch) -> None:
    monkeypatch.setattr(distributed, "START", datetime.timedelta(seconds=0.2))
    store = dist.HashStore()
    with pytest.raises(TimeoutError, match=r"process 1, 2 of 3 did not start"):
        Processes(0, 3, store=store).connect(CPU)


def waiting(store: dist.Store) -> Callable[[], str]:
    """Connect the first of two processes in a thread; the returned function gives the message that it ends with."""
    messages: list[str] = []

    def connect() -> None:
        try:
            Processes(0, 2, store=store).connect(CPU)
        except (UserError, ConnectionError) as error:
            messages.append(str(error))

    thread = threading.Thread(target=connect)
    thread.start()

    def end() -> str:
        thread.join(timeout=30)
        return messages[0]

    return end


def test_who_waits_for_the_others_to_start_learns_why_one_failed() -> None:
    store = dist.HashStore()
    first, second = waiting(store), Processes(1, 2, store=store)
    with pytest.raises(UserError, match="no such file"), second.sharing_failures():
        raise UserError("no such file: latents.zarr")
    assert "process 1 of 2" in (message := first())
    assert "no such file: latents.zarr" in message


def test_processes_on_a_cpu_and_a_gpu_are_refused() -> None:
    store = dist.HashStore()
    first = waiting(store)
    with pytest.raises(UserError, match="process 0 on cpu, process 1 on cuda"):
        Processes(1, 2, store=store).connect(GPU)
    assert "process 0 on cpu, process 1 on cuda" in first()


def test_the_first_failure_is_told_and_a_lost_connection_is_none() -> None:
    store = dist.HashStore()
    processes = [Processes(rank, 4, store=store) for rank in range(4)]
    with pytest.raises(ConnectionError, match="lost the connection"), processes[3].sharing_failures():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:1")
    for rank in (2, 1):
        with suppress(ZeroDivisionError), processes[rank].sharing_failures():
            raise ZeroDivisionError(f"of {rank}")
    with pytest.raises(ConnectionError, match="process 2 of 4 failed: of 2"), processes[0].sharing_failures():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:1")


def joined(store: dist.Store, count: int) -> list[dist.Store]:
    """What each of some processes that start at once gets of a store."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: own_part(store, rank, count), range(count)))


def test_processes_that_are_started_again_see_nothing_of_the_earlier_ones() -> None:
    """torchrun keeps its store when it starts them again, perhaps fewer of them."""
    store = dist.HashStore()
    for count in (2, 4, 3, 2):
        first, *others = joined(store, count)
        assert not first.check(["failure"])
        first.set("failure", f"of {count}")
        assert {part.get("failure") for part in others} == {f"of {count}".encode()}
