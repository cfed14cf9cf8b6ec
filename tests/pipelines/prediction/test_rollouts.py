"""Rollouts by the means of a device: recorded steps and compiled trunks, played on a CPU; memory that is counted."""

import pytest
import torch

from pipelines.prediction import rollouts as field_rollouts
from pipelines.prediction.rollouts import FieldRollouts, clip_bytes
from stage2_flow.conditioning import make_draws
from stage2_flow.config import SamplingConfig, VectorFieldConfig
from stage2_flow.rollout import Rollout
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.vector_field import VectorField
from tests.pipelines.runtime.test_cuda_graph_step import played  # noqa: F401  (a fixture)

SHAPE, CPU = (2, 4, 4), torch.device("cpu")


@pytest.fixture
def field() -> VectorField:
    torch.manual_seed(0)
    return VectorField(VectorFieldConfig(width=32, depth=1, mid_depth=1, heads=4), SHAPE[0]).eval()


def generate(rollouts: FieldRollouts, options: SamplingConfig, *, rows: int = 3, frames: int = 4, seed: int = 0):
    context = torch.randn(rows, 2, *SHAPE, generator=torch.Generator().manual_seed(seed))
    nfe = SamplingPlan.from_config(options).evaluations
    draws = make_draws(seed, [(row, 0) for row in range(rows)], frames, nfe, 2, SHAPE, None, CPU)
    return rollouts.generate(context, frames, options, draws)


@pytest.mark.parametrize("options", [{"solver": "euler", "nfe": 3}, {"solver": "rk4-38", "nfe": 8, "warm_start": 0.2}])
def test_recorded_steps_are_the_steps(field, monkeypatch, played, options):  # noqa: F811
    """What is recorded once serves all steps, frames and batches of a shape: nothing in it is a number of Python's."""
    options, made = SamplingConfig(**options, batch_size=3), []
    expected = [generate(FieldRollouts(field, CPU), options, rows=6, seed=seed) for seed in (0, 1)]
    original = Rollout.__init__

    def init(rollout, *arguments, **others):
        original(rollout, *arguments, **others)
        made.append(rollout)
        played.extend([rollout.y, rollout.step])

    monkeypatch.setattr(Rollout, "__init__", init)
    monkeypatch.setattr(FieldRollouts, "_records", lambda *_: True)
    recorded = FieldRollouts(field, CPU)
    for seed in (0, 1):
        torch.testing.assert_close(generate(recorded, options, rows=6, seed=seed), expected[seed])
    assert len(made) == 1


def test_a_compiled_trunk_is_one_graph_and_gives_the_same(field, monkeypatch):
    compiled, graphs = torch.compile, []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(field_rollouts.torch, "compile", lambda f, **options: compiled(f, backend=backend, **options))
    rollouts = FieldRollouts(field, CPU)
    for precision in ("fp32", "bf16"):
        options = SamplingConfig(nfe=4, precision=precision)
        usual = generate(FieldRollouts(field, CPU), options)
        fast = generate(rollouts, options.model_copy(update={"compile": True}))
        torch.testing.assert_close(fast, usual, rtol=2e-2, atol=2e-2 if precision == "bf16" else 1e-5)
    assert len(graphs) == 2  # one a precision, for all times and frames


def test_a_gpu_compiles_for_many_evaluations_alone(field):
    rollouts = FieldRollouts(field, CPU)
    rollouts.device = torch.device("cuda")
    assert not rollouts._compiles(SamplingConfig(), 9_999)
    assert rollouts._compiles(SamplingConfig(), 10_000)
    assert rollouts._compiles(SamplingConfig(compile=True), 1)
    assert rollouts._records(SamplingConfig())
    assert not rollouts._records(SamplingConfig(cuda_graphs=False))
    rollouts.field = torch.nn.Identity()  # nothing is known of it
    assert not rollouts._records(SamplingConfig())
    assert not rollouts._compiles(SamplingConfig(compile=True), 1)


def test_a_gpu_takes_as_many_clips_as_fit(field, monkeypatch):
    rollouts, context = FieldRollouts(field, CPU), torch.empty(1, 2, *SHAPE)
    rollouts.device = torch.device("cuda")
    each = clip_bytes(field, context, 5)
    assert each > 4 * 17 * 32 * 24  # of 17 tokens of width 32
    for clips in (1, 7, 10_000):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_, clips=clips: (int(clips * each / 0.6) + 9, 0))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 5)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 5)
        assert rollouts._batch_size(context, 5, SamplingConfig()) == min(clips, 512)
    assert rollouts._batch_size(context, 5, SamplingConfig(batch_size=9)) == 9


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
