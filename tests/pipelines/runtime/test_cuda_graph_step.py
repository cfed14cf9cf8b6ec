"""A captured step equals the eager one. Capturing is simulated on a CPU: operations are recorded and repeated."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelines.runtime.cuda_graph_step import WARM_UP_STEPS, CudaGraphStep


class Recorder(TorchDispatchMode):
    """Notes operations with the tensors that they work on, as a CUDA graph does with kernels and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, list[Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, tree_leaves(outputs)))
        return outputs


class Graph:
    """In place of `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.recorder = Recorder()

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, before in self.recorder.operations:
            for old, new in zip(before, tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """CUDA's recording on a CPU. The list takes the tensors that recording must leave as they are."""
    state: list[Tensor] = []

    @contextlib.contextmanager
    def record(graph: Graph) -> Iterator[None]:
        before = [tensor.detach().clone() for tensor in state]
        with torch.random.fork_rng(devices=[]), graph.recorder:
            yield
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return state


def test_a_captured_step_is_the_step(played):
    """Outputs stay what they were, though a replay writes to the same places."""
    expected, recorded = torch.zeros(3), torch.zeros(3)

    def walk(state: Tensor, given: Tensor) -> tuple[Tensor]:
        state += given.square()
        return (2 * state,)

    step = CudaGraphStep(lambda given: walk(recorded, given))
    for number in range(3 * WARM_UP_STEPS):
        if number == WARM_UP_STEPS:
            played.append(recorded)
        given = torch.full((3,), float(number))
        assert torch.equal(step(given)[0], walk(expected, given)[0])
    assert torch.equal(recorded, expected)
