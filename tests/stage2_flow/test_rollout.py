"""Rollouts: the official one replayed, sampling plans, cached embeddings, and what a rollout leaves unchanged."""

import weakref
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

from stage2_flow.conditioning import SamplingDraws, make_draws
from stage2_flow.config import SamplingConfig, VectorFieldConfig
from stage2_flow.path import SIGMA_MIN
from stage2_flow.rollout import CachedEvaluator, PlainEvaluator, Rollout, generate_latents
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.vector_field import VectorField
from tests.no_host_sync import NoHostSync

SHAPE = (2, 3, 4)


class Recorder(nn.Module):
    """Passes calls on to a field (or answers with zeros) and keeps them; not a `VectorField`, so nothing is cached."""

    def __init__(self, field: nn.Module | None = None) -> None:
        super().__init__()
        self.field = field
        self.calls: list[dict[str, Tensor]] = []

    def forward(self, x_t, reference, condition, distance, t):
        output = torch.zeros_like(x_t) if self.field is None else self.field(x_t, reference, condition, distance, t)
        names = ("x_t", "reference", "condition", "distance", "t", "output")
        self.calls.append(dict(zip(names, (x_t, reference, condition, distance, t, output), strict=True)))
        return output


def rolled_out(
    field, context, num_frames, plan, keys=((0, 0), (1, 0)), past_horizon=None
) -> tuple[Tensor, SamplingDraws]:
    """Latents, and the draws that they were made with."""
    draws = draws_for(plan, keys[: len(context)], num_frames, context.shape[1], past_horizon)
    return generate_latents(field, context, num_frames, plan, draws, past_horizon=past_horizon), draws


def numbered_context(batch: int, frames: int) -> Tensor:
    """Each frame holds its index in all places, so that a call shows which frame it saw."""
    return torch.arange(frames, dtype=torch.float32)[None, :, None, None, None].expand(batch, frames, *SHAPE).clone()


def plan(**options) -> SamplingPlan:
    return SamplingPlan.from_config(SamplingConfig(**options))


def euler(steps: int, **options) -> SamplingPlan:
    return plan(solver="euler", steps=steps, **options)


def draws_for(plan: SamplingPlan, keys, num_frames: int, context_frames: int, past_horizon=None, seed=0):
    return make_draws(seed, keys, num_frames, plan.evaluations, context_frames, SHAPE, past_horizon, "cpu")


def small_field(**sizes) -> VectorField:
    torch.manual_seed(0)
    sizes = {"width": 32, "depth": 1, "mid_depth": 1, "heads": 4, "dropout": 0.5} | sizes
    field = VectorField(VectorFieldConfig(**sizes), SHAPE[0])
    if sizes.get("head") == "bn":
        field.project_out["3"].running_mean.normal_()
    return field


def test_replays_the_official_rollout(official_field, official_rollout, fp32_output):
    field = Recorder(official_field)
    latents = generate_latents(
        field,
        official_rollout["latents"][:, :3],
        2,
        plan(preset="official", steps=10),
        SamplingDraws(official_rollout["noise"], official_rollout["conditioning_indices"]),
    )
    # The network's Lipschitz constants (spectral norms of its float64 Jacobians) are 0.45 for x_t, 0.35 for the
    # reference and 0.46 for the condition, so an integration amplifies errors by e^0.45 = 1.6 at most, and the second
    # frame also has those of the first: 1.6 (1 + (0.35 + 0.46) 1.6) < 4.
    assert (latents - official_rollout["latents"]).abs().max() < 4 * fp32_output
    times = torch.stack([call["t"] for call in field.calls]).reshape(2, 36, 2)
    # Linspace, step, product and sum round by half a last place (2^-25 below 1) each, and so they did when recorded.
    assert (times - official_rollout["call_times"][:, :, None]).abs().max() <= 8 * 2**-25
    distances = torch.stack([call["distance"] for call in field.calls]).reshape(2, 36, 2)
    assert torch.equal(distances, official_rollout["index_distances"])
    for call, x_t, output in zip(
        field.calls, official_rollout["first_frame_inputs"], official_rollout["first_frame_outputs"], strict=False
    ):
        assert (call["x_t"] - x_t).abs().max() < 4 * fp32_output
        assert (call["output"] - output).abs().max() < 4 * fp32_output


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
    ("options", "message"),
    [
        ({"solver": "heun", "nfe": 7}, r"sampling\.nfe 7.* 6 or 8"),
        ({"solver": "rk4-38", "nfe": 2}, r"sampling\.nfe 2.* 4 or 8"),
        ({"solver": "rk4", "nfe": 397}, r"sampling\.nfe 397.* 396 or 400"),
        ({"preset": "official", "steps": 1}, r"sampling\.steps 1 .*= 1 time points.* raise steps"),
        ({"preset": "official", "steps": 10, "warm_start": 0.9}, r"warm_start 0\.9 .*= 0 time points"),
        ({"preset": "official", "steps": 3, "warm_start": 0.5}, "= 1 time points"),
    ],
)
def test_refuses_plans_without_whole_steps(options, message):
    with pytest.raises(ValueError, match=message):
        plan(**options)


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
    rolled_out(field, torch.zeros(1, 2, *SHAPE), 1, resolved)
    assert [call["t"].item() for call in field.calls] == pytest.approx(resolved.evaluation_times().tolist())


@pytest.mark.parametrize("warm_start", [0.0, 0.3])
def test_warm_start_is_the_path_to_the_previous_frame(warm_start):
    field, context = Recorder(), torch.randn(2, 3, *SHAPE)
    latents, draws = rolled_out(field, context, 1, plan(steps=1, warm_start=warm_start))
    start = (1 - (1 - SIGMA_MIN) * warm_start) * draws.noise[0] + warm_start * context[:, -1]
    torch.testing.assert_close(field.calls[0]["x_t"], start)
    torch.testing.assert_close(field.calls[0]["t"], torch.full((2,), warm_start))
    # A field of zeros leaves the start where it is.
    torch.testing.assert_close(latents[:, 3], start)
    assert torch.equal(latents[:, :3], context)


def test_reference_condition_and_distance_belong_together():
    """Of given frames, and of generated ones once they are context."""
    field, resolved = Recorder(), plan(steps=3, solver="midpoint")
    latents, draws = rolled_out(field, numbered_context(2, 5), 3, resolved)
    assert len(field.calls) == 3 * resolved.evaluations == 18
    for number, call in enumerate(field.calls):
        frame, evaluation = divmod(number, 6)
        indices = draws.condition_indices[frame, evaluation]
        assert torch.equal(call["reference"], latents[:, 4 + frame])
        assert torch.equal(call["condition"], latents[torch.arange(2), indices])
        assert torch.equal(call["distance"], 4 + frame - indices)


@pytest.mark.parametrize(("horizon", "farthest"), [(3, 2), (20, 7)])
def test_past_horizon_bounds_the_distance(horizon, farthest):
    field = Recorder()
    rolled_out(field, numbered_context(2, 8), 1, euler(50), past_horizon=horizon)
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
    field, resolved, context = small_field(head=head), plan(steps=2), torch.randn(2, 2, *SHAPE)
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

    def interrupt(frames: int) -> None:
        raise RuntimeError(f"{frames} done")

    with pytest.raises(RuntimeError, match="1 done"):
        generate_latents(field, context, 2, resolved, draws, on_frame=interrupt)
    assert [module.training for module in field.modules()] == modes


def test_a_video_does_not_depend_on_its_batch_nor_on_the_length():
    field, resolved, context = small_field().double(), plan(steps=3), torch.randn(3, 2, *SHAPE, dtype=torch.float64)
    keys = [(4, 0), (7, 0), (7, 1)]
    together, _ = rolled_out(field, context, 4, resolved, keys)
    for row, key in enumerate(keys):
        alone, _ = rolled_out(field, context[row : row + 1], 2, resolved, [key])
        torch.testing.assert_close(together[row : row + 1, :4], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_state_is_kept_in_fp32_or_wider(given, expected):
    field = Recorder()
    latents, _ = rolled_out(field, torch.randn(1, 2, *SHAPE).to(given), 1, plan(steps=2))
    assert latents.dtype == field.calls[0]["x_t"].dtype == field.calls[0]["t"].dtype == expected


def test_stages_of_a_bf16_field_are_added_in_fp32():
    class Constant(nn.Module):
        def forward(self, x_t, *arguments):
            return torch.full_like(x_t, 1 / 3, dtype=torch.bfloat16)

    latents, draws = rolled_out(Constant(), torch.zeros(1, 2, *SHAPE), 1, plan(solver="rk4", steps=1))
    velocity = torch.tensor(1 / 3, dtype=torch.bfloat16).float()
    torch.testing.assert_close(latents[:, 2], draws.noise[0] + velocity)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": torch.zeros(2, *SHAPE)}, r"context .*\[2, 2, 3, 4\]"),
        ({"context": torch.zeros(2, 0, *SHAPE)}, "at least 1 context frame"),
        ({"context": torch.zeros(3, 4, *SHAPE)}, r"noise .*\[2, 3, 2, 3, 4\].*\[2, 2, 2, 3, 4\]"),
        ({"num_frames": 0}, "num_frames .* 0"),
        ({"num_frames": 3}, r"noise .*\[3, "),
        ({"plan": euler(3)}, r"condition_indices .*\[2, 3, 2\].*\[2, 2, 2\]"),
        ({"past_horizon": 2}, r"condition_indices .*0\.\.2.* 2\.\.2 \(past_horizon 2\)"),
        ({"context": torch.zeros(2, 3, *SHAPE)}, r"condition_indices of frame 0 .*0\.\.2.* 0\.\.1"),
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


@pytest.mark.parametrize("sizes", [{}, {"head": "bn"}, {"reference": False}, {"qk_norm": True},
                                   {"recent_frames": 3}, {"past_noise": 0.25}, {"convolutions": True}])  # fmt: skip
def test_cached_embeddings_are_the_fields_own(sizes):
    field = small_field(**sizes).eval().requires_grad_(False).double()
    times = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    y, condition, *newest = torch.randn(2 + field.config.recent_frames, 4, *SHAPE, dtype=torch.float64)
    reference, distance = torch.cat(newest, dim=1), torch.tensor([1, 2, 7, 3])
    evaluators = PlainEvaluator(field), CachedEvaluator(field, times, 7, y)
    for number in range(3):
        values = []
        for evaluator in evaluators:
            evaluator.begin_frame(reference + number)
            values.append(evaluator.velocity(times[number], y, torch.tensor([number]), condition, distance))
        # The sinusoids of the time are fp32 in both.
        torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("warm_start", [0.0, 0.1])
def test_a_rollout_with_cached_embeddings_is_the_plain_one(warm_start):
    """Conditions as far away as can be, too: the first frame, at distances 5 to 8."""
    field, resolved = small_field().double().eval(), plan(solver="rk4", nfe=8, warm_start=warm_start)
    context = torch.randn(2, 6, *SHAPE, dtype=torch.float64)
    draws = draws_for(resolved, [(0, 0), (1, 0)], 4, 6)
    farthest = SamplingDraws(draws.noise, torch.zeros_like(draws.condition_indices))
    for each in (draws, farthest):
        cached, plain = (generate_latents(f, context, 4, resolved, each) for f in (field, Recorder(field)))
        torch.testing.assert_close(cached, plain, rtol=1e-12, atol=1e-12)


class Wrapped(nn.Module):
    """Called like a field."""

    def __init__(self, field: VectorField) -> None:
        super().__init__()
        self.field, self.recent_frames = field, field.recent_frames

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.field(*arguments)


@pytest.mark.parametrize("given", [1, 2, 5])
def test_the_reference_is_the_newest_frames(given):
    """The newest first; before the first frame of the video is that frame again."""
    field, references = small_field(recent_frames=3).eval(), []
    context, resolved = torch.randn(2, given, *SHAPE), euler(1)
    field.register_forward_pre_hook(lambda _, arguments: references.append(arguments[1]))
    # Of a field itself, a rollout computes the embedding in parts.
    wrapped = Wrapped(field)
    video = generate_latents(wrapped, context, 3, resolved, draws_for(resolved, [(0, 0), (1, 0)], 3, given))
    assert len(references) == 3
    for frame, reference in enumerate(references):
        length = given + frame
        newest = [video[:, max(0, length - back)] for back in (1, 2, 3)]
        assert torch.equal(reference, torch.cat(newest, dim=1))
    own = generate_latents(field, context, 3, resolved, draws_for(resolved, [(0, 0), (1, 0)], 3, given))
    torch.testing.assert_close(own, video)


def test_embeddings_are_exact_under_autocast():
    field, times, seen = small_field().eval().requires_grad_(False), torch.tensor([0.5]), []

    def trunk(tokens, time_token, height, width):
        seen.append((tokens, time_token))
        return field.trunk(tokens, time_token, height, width)

    reference, y, condition = torch.randn(3, 2, *SHAPE)
    for bf16 in (False, True):
        evaluator = CachedEvaluator(field, times, 9, y, trunk)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            evaluator.begin_frame(reference)
            output = evaluator.velocity(times[0], y, torch.tensor([0]), condition, torch.tensor([8, 9]))
    assert output.dtype == torch.bfloat16
    for ours, exact in zip(*seen, strict=True):
        assert torch.equal(ours, exact)


@pytest.mark.parametrize(("options", "calls_per_frame"), [({"nfe": 6}, 1), ({"solver": "euler", "nfe": 65}, 65)])
def test_a_frame_or_a_step_can_be_recorded_and_batches_follow_one_another(options, calls_per_frame):
    """A frame of many evaluations would be too large a graph: its steps are recorded."""
    field, resolved, calls = small_field(), plan(**options), []

    def record(step):
        return lambda: (calls.append("step"), step())

    rollout = Rollout(field, resolved, (2, *SHAPE), 4, torch.float32, torch.device("cpu"), record=record)
    results, frames = [], []
    for seed in (0, 1):
        context = torch.randn(2, 2, *SHAPE, generator=torch.Generator().manual_seed(seed))
        draws = draws_for(resolved, [(0, 0), (1, 0)], 3, 2, seed=seed)
        results.append(rollout.run(context, 3, draws, on_frame=frames.append))
        assert torch.equal(results[-1], generate_latents(field, context, 3, resolved, draws))
    assert not torch.equal(*results)  # what was returned first has not been overwritten
    assert calls == ["step"] * (2 * 3 * calls_per_frame)
    gone = weakref.ref(rollout)
    del rollout
    assert gone() is None  # at once, with a graph's memory
    assert frames == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("options", [{"solver": "rk4-38", "steps": 2}, {"nfe": 4, "warm_start": 0.2}])
def test_the_host_does_not_wait_for_the_device_from_frame_to_frame(options):
    """Draws are checked before the first frame, which reads them once per rollout."""
    checked = ExitStack()

    def on_frame(done: int) -> None:
        if done == 1:
            checked.enter_context(NoHostSync())
        elif done == 4:
            checked.close()

    draws = draws_for(plan(**options), [(0, 0), (1, 0)], 4, 2)
    field, context = small_field(), numbered_context(2, 2)
    assert generate_latents(field, context, 4, plan(**options), draws, on_frame=on_frame).shape[1] == 6


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("read", [Tensor.item, Tensor.tolist, bool, float, int, Tensor.nonzero])
def test_a_read_value_is_noticed(read, inference):
    with pytest.raises(AssertionError, match="makes the host wait"), torch.inference_mode(inference), NoHostSync():
        read(torch.ones(()))
