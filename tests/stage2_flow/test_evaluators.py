"""The field with its constant parts computed once, held to the field as it is."""

import pytest
import torch

from stage2_flow.conditioning import SamplingDraws, make_draws
from stage2_flow.config import SamplingConfig, VectorFieldConfig
from stage2_flow.evaluators import CachedEvaluator, PlainEvaluator
from stage2_flow.rollout import Rollout, generate_latents
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.vector_field import VectorField

SHAPE = (2, 3, 5)


def network(**sizes) -> VectorField:
    torch.manual_seed(1)
    sizes = {"width": 32, "depth": 2, "mid_depth": 1, "heads": 4, "dropout": 0.0} | sizes
    field = VectorField(VectorFieldConfig(**sizes), SHAPE[0]).eval().requires_grad_(False)
    if sizes.get("head") == "bn":
        field.project_out["3"].running_mean.normal_()
    return field


class _Wrapped(torch.nn.Module):
    """A module that is only called like a field."""

    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, *inputs):
        return self.field(*inputs)


@pytest.mark.parametrize("sizes", [{}, {"head": "bn"}, {"reference": False}, {"qk_norm": True}])
def test_equals_the_field_in_float64(sizes):
    field = network(**sizes).double()
    times = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    reference, y, condition = torch.randn(3, 4, *SHAPE, dtype=torch.float64)
    distance = torch.tensor([1, 2, 7, 3])
    evaluators = PlainEvaluator(field, y), CachedEvaluator(field, times, 7, y)
    for number in range(3):
        values = []
        for evaluator in evaluators:
            evaluator.begin_frame(reference + number)
            values.append(evaluator.velocity(times[number], y, torch.tensor([number]), condition, distance))
        # The time's sinusoids are fp32 in both.
        torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)


def test_a_rollout_is_the_same_as_with_a_module_that_is_only_called_like_a_field():
    field, plan = network(), SamplingPlan.from_config(SamplingConfig(solver="rk4", nfe=8, warm_start=0.1))
    context = torch.randn(2, 3, *SHAPE)
    draws = make_draws(0, [(0, 0), (1, 0)], 4, plan.evaluations, 3, SHAPE, None, "cpu")
    cached = generate_latents(field, context, 4, plan, draws)
    torch.testing.assert_close(cached, generate_latents(_Wrapped(field), context, 4, plan, draws), rtol=0, atol=2e-5)


def test_a_solver_step_can_be_recorded_and_batches_follow_one_another():
    field, plan = network(), SamplingPlan.from_config(SamplingConfig(solver="midpoint", nfe=6))
    recorded = []

    def record(step):
        recorded.append(step)
        return lambda: (recorded.append("step"), step())

    rollout = Rollout(field, plan, (2, 2, *SHAPE), 3, torch.float32, torch.device("cpu"), record=record)
    first = None
    for seed in (0, 1):
        context = torch.randn(2, 2, *SHAPE, generator=torch.Generator().manual_seed(seed))
        draws = make_draws(seed, [(0, 0), (1, 0)], 3, plan.evaluations, 2, SHAPE, None, "cpu")
        latents = rollout.run(context, draws)
        torch.testing.assert_close(latents, generate_latents(field, context, 3, plan, draws))
        if first is not None:
            assert not torch.equal(first, latents)  # what was handed out stays what it was
        first = latents
    assert recorded.count("step") == 2 * 3 * 3
    assert callable(recorded[0])


def test_the_tables_reach_the_farthest_condition():
    field, plan = network(), SamplingPlan.from_config(SamplingConfig(solver="euler", nfe=1))
    context = torch.randn(1, 6, *SHAPE)
    indices = torch.zeros(4, 1, 1, dtype=torch.int64)  # the first frame: distances 5 to 8
    draws = SamplingDraws(torch.randn(4, 1, *SHAPE), indices)
    cached = generate_latents(field, context, 4, plan, draws)
    torch.testing.assert_close(cached, generate_latents(_Wrapped(field), context, 4, plan, draws), rtol=0, atol=2e-5)


def test_embeddings_are_exact_under_autocast():
    field, times = network(), torch.tensor([0.5])
    seen = []

    def trunk(tokens, time_token, height, width):
        seen.append((tokens, time_token))
        return field.trunk(tokens, time_token, height, width)

    reference, y, condition = torch.randn(3, 2, *SHAPE)
    for precise in (True, False):
        evaluator = CachedEvaluator(field, times, 9, y, trunk)
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            evaluator.begin_frame(reference)
            output = evaluator.velocity(times[0], y, torch.tensor([0]), condition, torch.tensor([8, 9]))
    assert output.dtype == torch.bfloat16
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])
