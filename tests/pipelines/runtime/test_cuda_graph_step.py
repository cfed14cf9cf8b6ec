"""A captured step equals the eager one. Capturing is simulated on a CPU: operations are recorded and repeated."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelines.runtime.cuda_graph_step import WARM_UP_STEPS, CudaGraphStep
from pipelines.runtime.train_state import TrainState
from stage2_flow.config import FlowTrainingConfig


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


def make_train_state() -> TrainState:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.GELU(), nn.Linear(8, 2))
    settings = FlowTrainingConfig(learning_rate=0.1, ema_decay=0.8, grad_clip=0.5)
    return TrainState(model, settings, [], recordable=True)


def changing(train_state: TrainState) -> list[Tensor]:
    """All that an update changes."""
    tensors = [*train_state.model.parameters(), *train_state.average.module.parameters()]
    for optimizer in train_state.optimizers:
        tensors += [value for values in optimizer.state.values() for value in values.values()]
        tensors += [group["lr"] for group in optimizer.param_groups]
    return tensors


def train(
    recorded: bool, steps: int, played: list[Tensor], bad: int = -1
) -> tuple[list[float], list[bool], TrainState]:
    train_state = make_train_state()

    def update(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss = (train_state.model(x) - y).square().mean()
        loss.backward()
        return loss.detach(), train_state.step()

    step_function = CudaGraphStep(update) if recorded else update
    losses, finite = [], []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 3, generator=generator), torch.randn(16, 2, generator=generator)
        if step == bad:
            y[3, 1] = float("nan")
        torch.manual_seed(100 + step)
        train_state.set_rate(1 / (1 + step))
        train_state.model.train()
        if step == WARM_UP_STEPS:
            played[:] = changing(train_state)
        loss, fine = step_function(x, y)
        losses.append(loss)
        finite.append(fine)
    return [loss.item() for loss in losses], [bool(fine) for fine in finite], train_state


def test_a_recorded_training_is_the_training(played):
    expected, _, plain = train(False, 10, played)
    losses, finite, recorded = train(True, 10, played)
    assert losses == expected  # each output stays what it was, though the graph writes to the same places
    assert all(finite)
    for one, other in zip(changing(recorded), changing(plain), strict=True):
        assert torch.equal(one, other)


def test_a_recorded_step_with_numbers_that_are_not_finite_updates_nothing(played):
    _, finite, train_state = train(True, 7, played, bad=5)
    _, _, without = train(True, 5, played)
    assert finite == [True] * 5 + [False, True]
    six = train(True, 6, played, bad=5)[2]
    for one, other in zip(six.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(parameter.isfinite().all() for parameter in train_state.model.parameters())
    assert not torch.equal(train_state.model[0].weight, without.model[0].weight)


def test_a_step_that_cannot_be_captured_runs_eagerly(played, monkeypatch, capsys):
    @contextlib.contextmanager
    def refuse(graph: Graph) -> Iterator[None]:
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    expected, _, _ = train(False, 8, played)
    losses, _, _ = train(True, 8, played)
    assert losses == expected
    assert capsys.readouterr().err.count("(operation not permitted") == 1
