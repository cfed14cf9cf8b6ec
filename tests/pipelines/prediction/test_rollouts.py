"""Rollouts in batches, with recorded steps and compiled trunks emulated on a CPU; frames refined as official ones."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipelines.errors import UserError
from pipelines.official import load_refiner
from pipelines.prediction import rollouts as rollouts_module
from pipelines.prediction.rollouts import (
    FieldRollouts,
    clip_bytes,
    clips_that_fit,
    refine_frames,
    uses_compilation,
    uses_cuda_graphs,
    with_matrices_in,
)
from stage1_autoencoder.rcan import RCAN
from stage2_flow.conditioning import make_draws
from stage2_flow.config import SamplingConfig, VectorFieldConfig
from stage2_flow.rollout import Rollout
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.vector_field import VectorField
from tests.pipelines.runtime.test_cuda_graph_step import played  # noqa: F401  (a fixture)

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


@pytest.mark.parametrize("options", [{"solver": "euler", "nfe": 3}, {"solver": "rk4-38", "nfe": 8, "warm_start": 0.2}])
def test_recorded_steps_are_the_steps(field, monkeypatch, played, options):  # noqa: F811
    """One record serves all steps, frames and batches of a shape."""
    options, made = SamplingConfig(**options, batch_size=3), []
    expected = [generate(FieldRollouts(field, CPU), options, rows=6, seed=seed) for seed in (0, 1)]
    original = Rollout.__init__

    def init(rollout, *arguments, **others):
        original(rollout, *arguments, **others)
        made.append(rollout)
        played.extend([rollout.y, rollout.step])

    monkeypatch.setattr(Rollout, "__init__", init)
    monkeypatch.setattr(rollouts_module, "uses_cuda_graphs", lambda *_: True)
    recorded = FieldRollouts(field, CPU)
    for seed in (0, 1):
        torch.testing.assert_close(generate(recorded, options, rows=6, seed=seed), expected[seed])
    assert len(made) == 1


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


def test_the_estimate_covers_what_an_evaluation_holds(field):
    """Live tensors at the peak of a rollout of one more clip, counted."""
    from pipelines.training.flow_memory import LiveMemory

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
