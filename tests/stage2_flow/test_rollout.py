"""Rollouts: the official one replayed, sampling plans, and what a rollout must leave alone."""

import pytest
import torch
from torch import Tensor, nn

from stage2_flow.conditioning import SamplingDraws, make_draws
from stage2_flow.config import SamplingConfig, VectorFieldConfig
from stage2_flow.path import SIGMA_MIN
from stage2_flow.rollout import generate_latents
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.vector_field import VectorField

SHAPE = (2, 3, 3)


class Recorder(nn.Module):
    """Passes calls on to a field (or answers with zeros) and keeps them."""

    def __init__(self, field: nn.Module | None = None) -> None:
        super().__init__()
        self.field = field
        self.calls: list[dict[str, Tensor]] = []

    def forward(self, x_t, reference, condition, distance, t):
        output = torch.zeros_like(x_t) if self.field is None else self.field(x_t, reference, condition, distance, t)
        names = ("x_t", "reference", "condition", "distance", "t", "output")
        self.calls.append(dict(zip(names, (x_t, reference, condition, distance, t, output), strict=True)))
        return output


def numbered_context(batch: int, frames: int) -> Tensor:
    """Each frame holds its index in all places, so that a call shows which frame it saw."""
    return torch.arange(frames, dtype=torch.float32)[None, :, None, None, None].expand(batch, frames, *SHAPE).clone()


def plan(**options) -> SamplingPlan:
    return SamplingPlan.from_config(SamplingConfig(**options))


def euler(steps: int, **options) -> SamplingPlan:
    return plan(solver="euler", steps=steps, **options)


def draws_for(plan: SamplingPlan, keys, num_frames: int, context_frames: int, shape=SHAPE, past_horizon=None):
    return make_draws(0, keys, num_frames, plan.evaluations, context_frames, shape, past_horizon, "cpu")


def small_field(head: str = "ln") -> VectorField:
    torch.manual_seed(0)
    return VectorField(VectorFieldConfig(width=32, depth=1, mid_depth=0, heads=4, head=head, dropout=0.5), SHAPE[0])


def test_replays_the_official_rollout(official_field, official_rollout):
    field = Recorder(official_field)
    latents = generate_latents(
        field,
        official_rollout["latents"][:, :3],
        2,
        plan(preset="official", steps=10),
        SamplingDraws(official_rollout["noise"], official_rollout["conditioning_indices"]),
    )
    assert (latents - official_rollout["latents"]).abs().max() < 1e-5
    times = torch.stack([call["t"] for call in field.calls]).reshape(2, 36, 2)
    # The times follow torchdiffeq's operations one by one; a rounding may differ in the last place.
    assert (times - official_rollout["call_times"][:, :, None]).abs().max() <= 2**-24
    distances = torch.stack([call["distance"] for call in field.calls]).reshape(2, 36, 2)
    assert torch.equal(distances, official_rollout["index_distances"])
    for call, x_t, output in zip(
        field.calls, official_rollout["first_frame_inputs"], official_rollout["first_frame_outputs"], strict=False
    ):
        assert (call["x_t"] - x_t).abs().max() < 1e-5
        assert (call["output"] - output).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "solver", "points", "evaluations"),
    [
        ({}, "midpoint", 5, 8),
        ({"solver": "euler"}, "euler", 9, 8),
        ({"steps": 1}, "midpoint", 2, 2),
        ({"steps": 5, "warm_start": 0.5, "solver": "midpoint"}, "midpoint", 6, 10),
        ({"solver": "heun"}, "heun", 5, 8),
        ({"solver": "rk4", "steps": 10}, "rk4", 11, 40),
        ({"solver": "rk4-38", "nfe": 8, "steps": 5}, "rk4-38", 3, 8),
        ({"nfe": 6}, "midpoint", 4, 6),
        ({"preset": "official", "nfe": 40, "warm_start": 0.9}, "rk4-38", 11, 40),
        ({"preset": "official"}, "rk4-38", 100, 396),
        ({"preset": "official", "warm_start": 0.5}, "rk4-38", 50, 196),
        ({"preset": "official", "warm_start": 0.9}, "rk4-38", 9, 32),  # int() truncates 9.999999999999998
        ({"preset": "official", "steps": 2}, "rk4-38", 2, 4),
        ({"preset": "official", "solver": "euler"}, "euler", 100, 99),
    ],
)
def test_plans(options, solver, points, evaluations):
    resolved = plan(**options)
    assert (resolved.solver.name, resolved.points, resolved.evaluations) == (solver, points, evaluations)
    times = resolved.time_points(torch.float64)
    assert times[0] == options.get("warm_start", 0)
    assert times[-1] == 1
    torch.testing.assert_close(times.diff(), times.diff()[:1].expand(points - 1))


@pytest.mark.parametrize(
    ("solver", "nfe", "message"),
    [
        ("heun", 7, "multiple of that: take 6 or 8"),
        ("rk4-38", 2, "4 times a step.*take 4 or 8"),
        ("rk4", 397, "396 or 4"),
    ],
)
def test_evaluations_must_be_whole_steps(solver, nfe, message):
    with pytest.raises(ValueError, match=message):
        plan(solver=solver, nfe=nfe)


@pytest.mark.parametrize(
    ("solver", "fractions"),
    [("euler", [0]), ("midpoint", [0, 1 / 2]), ("heun", [0, 1]), ("rk4", [0, 1 / 2, 1 / 2, 1]),
     ("rk4-38", [0, 1 / 3, 2 / 3, 1])],
)  # fmt: skip
def test_evaluation_times(solver, fractions):
    resolved = plan(solver=solver, steps=2, warm_start=0.2)
    expected = [0.2 + 0.4 * (step + fraction) for step in range(2) for fraction in fractions]
    assert resolved.evaluation_times(torch.float64).tolist() == pytest.approx(expected)
    field = Recorder()
    generate_latents(field, torch.zeros(1, 2, *SHAPE), 1, resolved, draws_for(resolved, [(0, 0)], 1, 2))
    assert [call["t"].item() for call in field.calls] == pytest.approx(resolved.evaluation_times().tolist())


@pytest.mark.parametrize(("steps", "warm_start", "points"), [(1, 0.0, 1), (10, 0.9, 0), (3, 0.5, 1)])
def test_the_official_preset_refuses_fewer_than_two_points(steps, warm_start, points):
    with pytest.raises(ValueError, match=rf"= {points} time points, .* at least 2: raise steps"):
        plan(preset="official", steps=steps, warm_start=warm_start)


@pytest.mark.parametrize("warm_start", [0.0, 0.3])
def test_warm_start_is_the_path_to_the_previous_frame(warm_start):
    field, resolved, context = Recorder(), plan(steps=1, warm_start=warm_start), torch.randn(2, 3, *SHAPE)
    draws = draws_for(resolved, [(0, 0), (1, 0)], 1, 3)
    latents = generate_latents(field, context, 1, resolved, draws)
    start = (1 - (1 - SIGMA_MIN) * warm_start) * draws.noise[0] + warm_start * context[:, -1]
    torch.testing.assert_close(field.calls[0]["x_t"], start)
    torch.testing.assert_close(field.calls[0]["t"], torch.full((2,), warm_start))
    # A field of zeros leaves the start where it is.
    torch.testing.assert_close(latents[:, 3], start)
    assert torch.equal(latents[:, :3], context)


def test_reference_condition_and_distance_belong_together():
    field, resolved = Recorder(), plan(steps=3, solver="midpoint")
    keys = [(0, 0), (1, 0)]
    draws = draws_for(resolved, keys, 1, 5)
    generate_latents(field, numbered_context(2, 5), 1, resolved, draws)
    assert len(field.calls) == resolved.evaluations == 6
    for evaluation, call in enumerate(field.calls):
        assert (call["reference"] == 4).all()
        seen = call["condition"][:, 0, 0, 0]
        assert torch.equal(seen.long(), draws.condition_indices[0, evaluation])
        assert torch.equal(call["distance"], 4 - seen.long())


def test_generated_frames_become_context():
    field, resolved = Recorder(), euler(1)
    draws = draws_for(resolved, [(0, 0)], 3, 2)
    latents = generate_latents(field, numbered_context(1, 2), 3, resolved, draws)
    for frame, call in enumerate(field.calls):
        assert torch.equal(call["reference"], latents[:, 1 + frame])
        assert torch.equal(call["condition"][0], latents[0, draws.condition_indices[frame, 0, 0]])


@pytest.mark.parametrize(("horizon", "farthest"), [(3, 2), (20, 7)])
def test_past_horizon_bounds_the_distance(horizon, farthest):
    field, resolved = Recorder(), euler(50)
    draws = draws_for(resolved, [(0, 0), (1, 0)], 1, 8, past_horizon=horizon)
    generate_latents(field, numbered_context(2, 8), 1, resolved, draws, past_horizon=horizon)
    distances = torch.stack([call["distance"] for call in field.calls])
    assert distances.unique().tolist() == list(range(1, farthest + 1))


def test_a_single_context_frame_is_duplicated_and_the_copy_dropped():
    field, resolved, context = small_field(), plan(steps=4), torch.randn(2, 1, *SHAPE)
    draws = draws_for(resolved, [(0, 0), (1, 0)], 3, 1)
    recorder = Recorder(field)
    latents = generate_latents(recorder, context, 3, resolved, draws)
    twice = generate_latents(Recorder(field), context.repeat(1, 2, 1, 1, 1), 3, resolved, draws)
    assert latents.shape == (2, 4, *SHAPE)
    assert torch.equal(latents, twice[:, 1:])
    for call in recorder.calls[:4]:
        assert torch.equal(call["condition"], context[:, 0])
        assert torch.equal(call["reference"], context[:, 0])
        assert call["distance"].tolist() == [1, 1]


@pytest.mark.parametrize("head", ["ln", "bn"])
def test_runs_in_evaluation_mode_and_leaves_the_field_as_it_was(head):
    field, resolved, context = small_field(head), plan(steps=2), torch.randn(2, 2, *SHAPE)
    field.train()
    field.mid_blocks.eval()  # a frozen part
    modes = [module.training for module in field.modules()]
    state = {name: tensor.clone() for name, tensor in field.state_dict().items()}
    draws = draws_for(resolved, [(0, 0), (1, 0)], 2, 2)
    latents = generate_latents(field, context, 2, resolved, draws)
    assert [module.training for module in field.modules()] == modes
    for name, tensor in field.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert not latents.requires_grad
    # No dropout: the same again.
    assert torch.equal(generate_latents(field, context, 2, resolved, draws), latents)


def test_the_mode_comes_back_after_an_error():
    class Failing(nn.Module):
        def forward(self, *arguments):
            raise RuntimeError("out of luck")

    field = Failing().train()
    with pytest.raises(RuntimeError, match="out of luck"):
        generate_latents(field, torch.zeros(1, 2, *SHAPE), 1, euler(1), draws_for(euler(1), [(0, 0)], 1, 2))
    assert field.training


def test_a_video_does_not_depend_on_its_batch_nor_on_the_length():
    field, resolved, context = small_field(), plan(steps=3), torch.randn(3, 2, *SHAPE)
    keys = [(4, 0), (7, 0), (7, 1)]
    together = generate_latents(field, context, 4, resolved, draws_for(resolved, keys, 4, 2))
    for row, key in enumerate(keys):
        alone = generate_latents(field, context[row : row + 1], 2, resolved, draws_for(resolved, [key], 2, 2))
        torch.testing.assert_close(together[row : row + 1, :4], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_state_is_kept_in_fp32_or_wider(given, expected):
    field, resolved = Recorder(), plan(steps=2)
    context = torch.randn(1, 2, *SHAPE).to(given)
    latents = generate_latents(field, context, 1, resolved, draws_for(resolved, [(0, 0)], 1, 2))
    assert latents.dtype == field.calls[0]["x_t"].dtype == field.calls[0]["t"].dtype == expected


def test_a_bf16_field_moves_an_fp32_state():
    field, resolved, context = small_field(), plan(steps=3), torch.randn(2, 2, *SHAPE)
    draws = draws_for(resolved, [(0, 0), (1, 0)], 2, 2)
    exact = generate_latents(field, context, 2, resolved, draws)
    with torch.autocast("cpu", torch.bfloat16):
        latents = generate_latents(field, context, 2, resolved, draws)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, exact, rtol=0.05, atol=0.05)


def test_stages_of_a_bf16_field_are_added_in_fp32():
    class Constant(nn.Module):
        def forward(self, x_t, *arguments):
            return torch.full_like(x_t, 1 / 3, dtype=torch.bfloat16)

    resolved, context = plan(solver="rk4", steps=1), torch.zeros(1, 2, *SHAPE)
    draws = draws_for(resolved, [(0, 0)], 1, 2)
    latents = generate_latents(Constant(), context, 1, resolved, draws)
    velocity = torch.tensor(1 / 3, dtype=torch.bfloat16).float()
    torch.testing.assert_close(latents[:, 2], draws.noise[0] + velocity, rtol=1e-6, atol=1e-6)


def test_on_frame_counts_the_frames_done():
    counted = []
    resolved = euler(1)
    draws = draws_for(resolved, [(0, 0)], 3, 2)
    generate_latents(Recorder(), numbered_context(1, 2), 3, resolved, draws, on_frame=counted.append)
    assert counted == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": torch.zeros(2, *SHAPE)}, r"context must be \[b, n, c, h, w\]"),
        ({"context": torch.zeros(2, 0, *SHAPE)}, "at least 1 context frame"),
        ({"context": torch.zeros(3, 4, *SHAPE)}, r"noise must be .* = \[2, 3, 2, 3, 3\], got \[2, 2, 2, 3, 3\]"),
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"num_frames": 3}, r"noise must be .* = \[3, "),
        ({"plan": euler(3)}, r"condition_indices must be .* = \[2, 3, 2\] for this plan, got \[2, 2, 2\]"),
        ({"past_horizon": 2}, r"frame 0 lie in 0\.\.2; allowed are 2\.\.2 \(past_horizon 2\)"),
        ({"context": torch.zeros(2, 3, *SHAPE)}, r"frame 0 lie in 0\.\.2; allowed are 0\.\.1"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    indices = torch.tensor([[[0, 1], [1, 2]], [[0, 1], [2, 3]]])
    arguments = {
        "context": torch.zeros(2, 4, *SHAPE),
        "num_frames": 2,
        "plan": euler(2),
        "draws": SamplingDraws(torch.zeros(2, 2, *SHAPE), indices),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        generate_latents(Recorder(), **arguments)
