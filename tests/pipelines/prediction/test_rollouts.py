"""Rollouts in batches, with recorded steps and compiled trunks emulated on a CPU; frames refined as official ones."""

import contextlib
import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelines.errors import UserError
from pipelines.official import load_refiner
from pipelines.prediction import rollouts as rollouts_module
from pipelines.prediction.rollouts import (
    FieldRollouts,
    clip_bytes,
    clips_that_fit,
    overlapped,
    refine_frames,
    uses_compilation,
    uses_cuda_graphs,
    with_matrices_in,
)
from stage1_autoencoder.rcan import RCAN
from stage2_flow.conditioning import make_draws
from stage2_flow.config import SamplingConfig, VectorFieldConfig
from stage2_flow.packed_trunk import PackedTrunk
from stage2_flow.rollout import Rollout
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.vector_field import VectorField

FIXTURES = Path(__file__).parents[2] / "fixtures"
SHAPE, CPU, GPU = (2, 4, 4), torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def field() -> VectorField:
    torch.manual_seed(0)
    return VectorField(VectorFieldConfig(width=32, depth=1, mid_depth=1, heads=4), SHAPE[0]).eval()


def generate(
    rollouts: FieldRollouts, options: SamplingConfig, *, rows: int = 3, frames: int = 4, seed: int = 0, on_frames=None
) -> Tensor:
    context = torch.randn(rows, 2, *SHAPE, generator=torch.Generator().manual_seed(seed))
    nfe = SamplingPlan.from_config(options).evaluations
    draws = make_draws(seed, [(row, 0) for row in range(rows)], frames, nfe, 2, SHAPE, None, CPU)
    return rollouts.generate(context, frames, options, draws, on_frames)


class Operations(TorchDispatchMode):
    """Notes operations with the tensors that they work on, as a CUDA graph does with kernels and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, list[Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, tree_leaves(outputs)))
        return outputs


class Graph:
    """Instead of `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.recorder = Operations()

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
    def record(graph: Graph, **options: Any) -> Iterator[None]:
        before = [tensor.detach().clone() for tensor in state]
        with graph.recorder:
            yield
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)

    class Stream:
        def __init__(self, device: torch.device) -> None:
            pass

        def wait_stream(self, other: object) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return state


def record_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(rollouts_module, "uses_cuda_graphs", lambda *_: True)


@pytest.mark.parametrize("options", [{"solver": "euler", "nfe": 3}, {"solver": "rk4-38", "nfe": 8, "warm_start": 0.2}])
def test_recorded_steps_are_the_steps(field, monkeypatch, played, options):
    """One record serves all steps, frames and batches of a shape."""
    options, made = SamplingConfig(**options, batch_size=3), []
    expected = [generate(FieldRollouts(field, CPU), options, rows=6, seed=seed) for seed in (0, 1)]
    original = Rollout.__init__

    def init(rollout, *arguments, **others):
        original(rollout, *arguments, **others)
        made.append(rollout)
        played.append(rollout.past)

    monkeypatch.setattr(Rollout, "__init__", init)
    record_steps(monkeypatch)
    recorded = FieldRollouts(field, CPU)
    for seed in (0, 1):
        torch.testing.assert_close(generate(recorded, options, rows=6, seed=seed), expected[seed])
    assert len(made) == 1


@pytest.mark.parametrize(
    ("threads", "precision", "used", "light", "beside"),
    [(4, "fp32", None, False, 2), (4, "fp32", 1, True, 1), (4, "fp32", 3, True, 0), (4, "bf16", None, False, 0),
     (1, "fp32", None, False, 0)],
)  # fmt: skip
def test_work_is_done_beside_the_next_item(threads, precision, used, light, beside):
    """On a CPU in another thread; before the next item where that costs more, or items change the whole process."""
    meeting, computed = threading.Barrier(2), []

    def items() -> Iterator[int]:
        for number in range(4):
            if beside and number:
                meeting.wait(20)
            computed.append(number)
            yield number

    def work(number: int) -> Tensor:
        if beside:
            meeting.wait(20)
        if number == 2:
            raise ValueError("work 2")
        return torch.tensor([number, torch.get_num_threads()])

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = overlapped(work, items(), CPU, precision, used, light)
        for number in range(2):
            assert next(results).tolist() == [number, beside or used or threads]
            assert len(computed) == number + 1 + (beside > 0)
            assert torch.get_num_threads() == threads
        with pytest.raises(ValueError, match="work 2"):
            next(results)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_on_a_gpu_work_is_done_in_another_stream(monkeypatch):
    """It waits for its item, but not for the next one, whose kernels are queued first."""
    log: list[str] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = name if isinstance(name, str) else "beside"

        def wait_stream(self, other: "Stream") -> None:
            log.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def inside(stream: Stream) -> Iterator[None]:
        log.append(f"in {stream.name}")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current"))
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    items = iter(log.append(f"item {number}") or number for number in range(5))
    results = overlapped(lambda number: log.append(f"work {number}") or torch.tensor(number), items, GPU, "bf16")
    for number in range(2):
        log.clear()
        assert next(results) == number
        expected = ["beside waits for current", f"item {number + 1}", "in beside", f"work {number}"]
        assert log[-5:] == [*expected, "current waits for beside"]


def refuse(monkeypatch, error: RuntimeError, times: int) -> None:
    """Let the next captures fail."""
    record = torch.cuda.graph
    errors = [error] * times

    @contextlib.contextmanager
    def fails(graph: Graph, **options: Any) -> Iterator[None]:
        with record(graph, **options):
            if errors:
                raise errors.pop()
            yield

    monkeypatch.setattr(torch.cuda, "graph", fails)


def test_a_step_that_cannot_be_captured_is_refused_with_the_way_out(field, monkeypatch, played):
    refuse(monkeypatch, RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors"), 1)
    record_steps(monkeypatch)
    options = SamplingConfig(solver="euler", nfe=8)
    with pytest.raises(UserError, match=r"operation not permitted.*sampling\.cuda_graphs=false") as caught:
        generate(FieldRollouts(field, CPU), options)
    assert "\n" not in str(caught.value)


def test_a_batch_that_cannot_be_captured_for_memory_is_made_smaller(field, monkeypatch, played, capsys):
    options = SamplingConfig(solver="euler", nfe=2)
    expected = generate(FieldRollouts(field, CPU), options, rows=4)
    record_steps(monkeypatch)
    refuse(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), 1)
    original = Rollout.__init__

    def init(rollout, *arguments, **others):
        original(rollout, *arguments, **others)
        played[:] = [rollout.past]

    monkeypatch.setattr(Rollout, "__init__", init)
    torch.testing.assert_close(generate(FieldRollouts(field, CPU), options, rows=4), expected)
    assert "4 clips" in capsys.readouterr().err


def test_many_predictors_of_a_process_may_compile(monkeypatch):
    """More sizes than torch compiles versions of one function: the rest is predicted all the same."""
    compiled = torch.compile
    monkeypatch.setattr(rollouts_module.torch, "compile", lambda f, **options: compiled(f, backend="eager", **options))
    torch._dynamo.reset()
    options = SamplingConfig(solver="euler", nfe=1)
    with torch._dynamo.config.patch(recompile_limit=2):
        for number in range(4):
            field = VectorField(VectorFieldConfig(width=8, depth=1, mid_depth=number, heads=2), SHAPE[0]).eval()
            usual = generate(FieldRollouts(field, CPU), options, frames=1)
            fast = generate(FieldRollouts(field, CPU), options.model_copy(update={"compile": True}), frames=1)
            torch.testing.assert_close(fast, usual, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


class Products(TorchDispatchMode):
    """Notes the dtypes in which matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        words = ("mm", "linear")  # attention and the last convolution may be more precise
        if any(word in function.__name__ for word in words) and "weight" not in function.__name__:
            self.dtypes |= {x.dtype for x in tree_leaves(args) if isinstance(x, Tensor)}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_trunk_multiplies_in_the_precision_asked_for(field, monkeypatch, precision, dtype):
    products = Products()
    for network, name in ((VectorField, "trunk"), (PackedTrunk, "__call__")):
        trunk = getattr(network, name)

        def noted(*arguments: Any, trunk=trunk) -> Tensor:
            with products:
                return trunk(*arguments)

        monkeypatch.setattr(network, name, noted)
    generate(FieldRollouts(field, CPU), SamplingConfig(nfe=2, precision=precision))
    assert products.dtypes == {dtype}


def test_one_compiled_trunk_serves_all_batch_sizes(field, monkeypatch):
    compiled, graphs = torch.compile, []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(rollouts_module.torch, "compile", lambda f, **options: compiled(f, backend=backend, **options))
    torch._dynamo.reset()
    options, rollouts = SamplingConfig(solver="euler", nfe=1, compile=True), FieldRollouts(field, CPU)
    for rows in range(2, 14):
        generate(rollouts, options, rows=rows, frames=1)
    assert len(graphs) <= 2  # of the first size, and of all others


def test_a_compiled_trunk_is_one_graph_and_gives_the_same(field, monkeypatch):
    compiled, graphs = torch.compile, []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(rollouts_module.torch, "compile", lambda f, **options: compiled(f, backend=backend, **options))
    rollouts = FieldRollouts(field, CPU)
    for precision in ("fp32", "bf16"):
        options = SamplingConfig(nfe=4, precision=precision)
        usual = generate(FieldRollouts(field, CPU), options)
        fast = generate(rollouts, options.model_copy(update={"compile": True}))
        torch.testing.assert_close(fast, usual, rtol=2e-2, atol=2e-2 if precision == "bf16" else 1e-5)
    assert len(graphs) == 2  # one per precision, for all times and frames


def test_frames_are_counted_over_all_batches(field):
    counted: list[int] = []
    generate(FieldRollouts(field, CPU), SamplingConfig(nfe=2, batch_size=2), rows=5, frames=3, on_frames=counted.append)
    assert counted == [2, 2, 2, 2, 2, 2, 1, 1, 1]


def test_what_auto_means_on_each_device(field):
    auto, other = SamplingConfig(), torch.nn.Identity()  # another module than a vector field
    assert not uses_compilation(field, auto, GPU, 9_999)
    assert uses_compilation(field, auto, GPU, 10_000)
    assert not uses_compilation(field, auto, CPU, 10_000)
    assert uses_compilation(field, SamplingConfig(compile=True), CPU, 1)
    assert uses_cuda_graphs(field, auto, GPU)
    assert not uses_cuda_graphs(field, auto, CPU)
    assert not uses_cuda_graphs(field, SamplingConfig(cuda_graphs=False), GPU)
    with pytest.raises(UserError, match=r"sampling\.cuda_graphs.*cpu.*auto"):
        uses_cuda_graphs(field, SamplingConfig(cuda_graphs=True), CPU)
    assert not uses_cuda_graphs(other, auto, GPU)
    assert not uses_compilation(other, SamplingConfig(compile=True), GPU, 10_000)


def test_a_gpu_takes_as_many_clips_as_fit(field, monkeypatch):
    context = torch.empty(1, 2, *SHAPE)
    each = clip_bytes(field, context, 5)
    assert each > 4 * 17 * 32 * 24  # of 17 tokens of width 32
    for clips in (1, 7, 10_000):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_, clips=clips: (int(clips * each / 0.6) + 9, 0))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 5)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 5)
        assert clips_that_fit(field, context, 5, GPU) == min(clips, 512)
    assert clips_that_fit(field, context, 5, CPU) == 32


def test_bf16_matrices_are_those_of_autocast(field):
    copied = with_matrices_in(field, torch.bfloat16)
    inputs = (*torch.randn(3, 2, *SHAPE), torch.tensor([1, 5]), torch.rand(2))
    with torch.autocast("cpu", torch.bfloat16):
        tokens, time = torch.randn(2, 16, 32), torch.randn(2, 32)
        assert torch.equal(copied.trunk(tokens, time, 4, 4), field.trunk(tokens, time, 4, 4))
        assert field(*inputs).isfinite().all()
    assert copied.in_blocks[0].linear1.weight.dtype == torch.bfloat16
    assert copied.in_blocks[0].norm1.weight.dtype == torch.float32
    assert copied.project_in["1"].weight.dtype == torch.float32


def test_the_estimate_covers_what_an_evaluation_holds(field, monkeypatch):
    """Live tensors at the peak of a rollout of one more clip, counted."""
    from pipelines.training.step_memory import LiveMemory

    monkeypatch.setattr(rollouts_module, "packs", lambda *_: False)  # as on a GPU
    peaks = []
    for rows in (2, 6):
        context = torch.randn(rows, 2, *SHAPE)
        draws = make_draws(0, [(row, 0) for row in range(rows)], 5, 2, 2, SHAPE, None, CPU)
        with LiveMemory("cpu") as live:
            FieldRollouts(field, CPU).generate(context, 5, SamplingConfig(nfe=2), draws)
        peaks.append(live.peak)
    a_clip = (peaks[1] - peaks[0]) / 4
    assert 0.1 * clip_bytes(field, context, 5) < a_clip < clip_bytes(field, context, 5)


class Recorder(nn.Module):
    """A refiner that adds a step to the decoded frame, beyond [-1, 1], and notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, 1, 1)  # its type is the network's
        self.given: list[tuple[Tensor, Tensor]] = []

    def forward(self, previous: Tensor, decoded: Tensor) -> Tensor:
        self.given.append((previous, decoded))
        return decoded + 0.5


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    """Official clips as [b, t, 3, h, w]: `recon` and `refined_video` are of the frames 1, 2, 3 of `video`."""
    arrays = np.load(FIXTURES / "rcan_s3_b3_c16_r4.npz")
    return {name: torch.from_numpy(arrays[name]).transpose(1, 2) for name in ("video", "recon", "refined_video")}


@pytest.fixture(scope="module")
def official() -> RCAN:
    return load_refiner(FIXTURES / "rcan_s3_b3_c16_r4.pth")


@pytest.fixture(scope="module")
def noise(official, recorded) -> float:
    """Ten times the rounding of the recorded fp32 frames, told by the network in float64."""
    previous, decoded = recorded["video"][:, :-1].flatten(0, 1).double(), recorded["recon"].flatten(0, 1).double()
    with torch.no_grad():
        exact = copy.deepcopy(official).double()(previous, decoded)
    rounding = (recorded["refined_video"].flatten(0, 1) - exact).abs().max().item()
    assert rounding < 100 * torch.finfo(torch.float32).eps * exact.abs().max()
    return 10 * rounding


def test_each_frame_is_given_the_unclamped_refined_one_before():
    refiner = Recorder()
    last, decoded = torch.full((2, 3, 4, 4), -0.25), torch.rand(2, 3, 3, 4, 4) * 2.4 - 1.2
    refined = refine_frames(refiner, last, decoded)
    assert refined.shape == decoded.shape
    assert torch.equal(refined, (decoded + 0.5).clamp(-1, 1))
    assert len(refiner.given) == 3  # one call a frame, for all clips
    assert torch.equal(refiner.given[0][0], last)
    for number in (1, 2):
        previous, frame = refiner.given[number]
        assert torch.equal(previous, decoded[:, number - 1] + 0.5)
        assert torch.equal(frame, decoded[:, number])
    assert (refiner.given[1][0] > 1).any()


def test_the_first_refined_frame_is_the_official_one(official, recorded, noise):
    refined = refine_frames(official, recorded["video"][:, 0], recorded["recon"])
    assert (refined[:, 0] - recorded["refined_video"][:, 0]).abs().max() < noise
    # The recorded clip is one of training, where each later frame is given the real one before. In use that one is
    # not there, and the refined one takes its place.
    assert (refined[:, 1:] - recorded["refined_video"][:, 1:]).abs().amax((0, 2, 3, 4)).min() > 0.01


def test_given_the_real_frames_before_all_refined_frames_are_the_official_ones(official, recorded, noise):
    for number in range(3):
        one = recorded["recon"][:, number : number + 1]
        refined = refine_frames(official, recorded["video"][:, number], one)
        assert (refined[:, 0] - recorded["refined_video"][:, number]).abs().max() < noise


def test_a_clip_is_refined_alike_in_any_batch(official, recorded, noise):
    together = refine_frames(official, recorded["video"][:, 0], recorded["recon"])
    alone = refine_frames(official, recorded["video"][1:, 0], recorded["recon"][1:])
    assert (together[1:] - alone).abs().max() < 3 * noise  # three frames, each refined from the one before


def test_a_half_precision_refiner_gives_floats_in_range(official, recorded):
    half = copy.deepcopy(official).to(torch.bfloat16)
    exact = refine_frames(official, recorded["video"][:, 0], recorded["recon"])
    refined = refine_frames(half, recorded["video"][:, 0], recorded["recon"])
    assert refined.dtype == torch.float32
    assert (refined - exact).abs().max() < 0.05
