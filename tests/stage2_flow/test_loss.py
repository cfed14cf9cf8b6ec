"""The loss and its gradients are the official ones under every speed switch; draws depend on the generator alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from latent_cache.sampling.sampler import FlowBatch
from stage2_flow.loss import NOISY_SHARE, FlowDraws, draw_flow, flow_matching_loss
from stage2_flow.path import SIGMA_MIN, path_sample
from stage2_flow.vector_field import VectorField

INPUTS = ("input_latents", "reference_latents", "conditioning_latents", "index_distances", "timestamps")
RECORDED_GRADIENTS = {
    "grad_project_in": "project_in.1.weight",
    "grad_conv_out": "project_out.4.weight",
    "grad_skip0": "out_blocks.0.0.weight",
    "grad_row_embed": "position_encoding.row_embed.weight",
}


@dataclass(frozen=True)
class Switches:
    """`matmul`: torch's precision of fp32 products (on a CPU "high" may be fp32 as well); `bf16`: autocast."""

    compile: bool = False
    matmul: str = "highest"
    bf16: bool = False


EAGER = {"plain": Switches(), "high": Switches(matmul="high"), "bf16": Switches(bf16=True)}
compiled = pytest.param(Switches(compile=True), 4, id="compiled-16x65")


@pytest.fixture
def switched() -> Iterator[Callable[[VectorField, Switches], Callable[..., Tensor]]]:
    """A function that turns a field's switches on; they are off again after the test."""
    before = torch.get_float32_matmul_precision()
    torch._dynamo.reset()

    def switch(field: VectorField, switches: Switches) -> Callable[..., Tensor]:
        torch.set_float32_matmul_precision(switches.matmul)
        # Traced for both passes and run by PyTorch's kernels: generating code takes half a minute, and is not ours.
        forward = torch.compile(field, fullgraph=True, backend="aot_eager") if switches.compile else field

        def call(*arguments: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=switches.bf16):
                return forward(*arguments)

        return call

    yield switch
    torch.set_float32_matmul_precision(before)
    torch._dynamo.reset()


def tiled(x: Tensor, repeats: int) -> Tensor:
    """The rows repeated: outputs of rows, mean losses and their gradients do not change."""
    return x.repeat(repeats, *(1,) * (x.ndim - 1))


def recorded_training(train_forward: dict[str, Tensor], repeats: int = 1) -> tuple[FlowBatch, FlowDraws]:
    """The batch and the draws of the official training forward."""
    noise = train_forward["noise"]
    batch = FlowBatch(
        target=tiled((train_forward["target_vectors"].double() + (1 - SIGMA_MIN) * noise.double()).float(), repeats),
        reference=tiled(train_forward["in_reference_latents"], repeats),
        condition=tiled(train_forward["in_conditioning_latents"], repeats),
        distance=tiled(train_forward["in_index_distances"], repeats),
    )
    return batch, FlowDraws(noise=tiled(noise, repeats), t=tiled(train_forward["timestamps"], repeats))


def gradients(field: VectorField) -> dict[str, Tensor]:
    """Taken off the field."""
    taken = {name: parameter.grad.double() for name, parameter in field.named_parameters()}
    field.zero_grad()
    return taken


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()])


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def exact_and_rounded(field: VectorField, arguments: list[Tensor], target: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Output and gradient in float64, and the same with weights and latents rounded to bf16 ONCE.

    A run in bf16 also rounds each activation, but its errors add up to no more than twice those of the second.
    """
    weights = {name: value.clone() for name, value in field.state_dict().items()}
    results = []
    field.double()
    for rounded in (False, True):
        frames = [x.bfloat16().double() if rounded else x.double() for x in arguments[:3]]
        if rounded:
            field.load_state_dict({name: value.bfloat16() for name, value in weights.items()})
        output = field(*frames, arguments[3], arguments[4].double())
        (output - target).square().mean().backward()
        results.append((output.detach(), flat(gradients(field))))
    field.float().load_state_dict(weights)
    return results


@pytest.mark.parametrize(
    ("switches", "repeats"),
    [pytest.param(EAGER[name], n, id=f"{name}-{4 * n}x65") for name in EAGER for n in (1, 4)] + [compiled],
)
def test_official_outputs_losses_and_gradients(
    official_field, regressor, regressor_grad_names, train_forward, switched, switches, repeats,
    fp32_output, fp32_gradient,
):  # fmt: skip
    arguments, target = [tiled(regressor[name], repeats) for name in INPUTS], tiled(regressor["target"], repeats)
    field = switched(official_field, switches)
    output = field(*arguments)
    (output.float() - target).square().mean().backward()
    found = gradients(official_field)
    assert list(found) == regressor_grad_names
    loss = flow_matching_loss(field, *recorded_training(train_forward, repeats))
    assert loss.dtype == torch.float32
    expected_loss = train_forward["loss"].item()

    if switches.bf16:
        (exact, exact_gradient), rounded = exact_and_rounded(official_field, arguments, target)
        output_error, gradient_error = relative(rounded[0], exact), relative(rounded[1], exact_gradient)
        assert 2**-10 < output_error < 2**-5, "the measure itself is one of bf16"
        assert 2**-10 < gradient_error < 2**-5
        assert relative(output, tiled(regressor["output_f64"], repeats)) < 2 * output_error
        assert relative(flat(found), exact_gradient) < 2 * gradient_error
        assert loss.item() == pytest.approx(expected_loss, rel=2 * output_error)
        return
    assert (output - tiled(regressor["output_f64"], repeats)).abs().max() < fp32_output
    norms = torch.stack([gradient.norm() for gradient in found.values()])
    assert ((norms - regressor["grad_norms"]).abs() < fp32_gradient * regressor["grad_norms"]).all()
    for recorded, name in RECORDED_GRADIENTS.items():
        assert relative(found[name][: len(regressor[recorded])], regressor[recorded]) < fp32_gradient, name
    # d(e^2) = 2 e de, and the mean |e| is at most the square root of the loss.
    assert abs(loss.item() - expected_loss) < 2 * expected_loss**0.5 * fp32_output


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("switches", [pytest.param(EAGER[name], id=name) for name in ("plain", "bf16")])
def test_a_batch_in_parts_has_the_loss_and_the_gradient_of_the_whole(
    official_field, regressor, train_forward, switched, switches, parts, fp32_gradient
):
    field = switched(official_field, switches)
    batch, draws = recorded_training(train_forward)
    batch = replace(batch, distance=regressor["index_distances"])  # distances that differ
    size = len(draws.t) // parts

    whole = flow_matching_loss(field, batch, draws)
    whole.backward()
    expected = gradients(official_field)
    losses = []
    for start in range(0, len(draws.t), size):
        rows = slice(start, start + size)
        part = FlowBatch(*(getattr(batch, name)[rows] for name in ("target", "reference", "condition", "distance")))
        loss = flow_matching_loss(field, part, draws.rows(rows)) / parts
        loss.backward()
        losses.append(loss.detach())
    found = gradients(official_field)
    # Rows are computed alike in any batch but for the order of sums; bf16 also rounds each part's weight gradients.
    tolerance = 2**-7 if switches.bf16 else fp32_gradient
    assert abs(sum(losses) - whole) < tolerance * whole
    assert relative(flat(found), flat(expected)) < tolerance
    if not switches.bf16:  # in which some biases' gradients are small differences of large sums
        for name, gradient in found.items():
            assert relative(gradient, expected[name]) < tolerance, name


class Perfect(nn.Module):
    """Answers with a given velocity."""

    def __init__(self, velocity: Tensor) -> None:
        super().__init__()
        self.velocity = velocity

    def forward(self, x_t, reference, condition, distance, t):
        return self.velocity


def test_loss_of_known_velocities_is_reduced_in_fp32():
    generator = torch.Generator().manual_seed(1)
    target, reference, condition = torch.randn((3, 3, 4, 2, 2), generator=generator)
    batch = FlowBatch(target, reference, condition, distance=torch.arange(1, 4))
    draws = draw_flow(target.shape, torch.Generator().manual_seed(0), "cpu")
    velocity = target - (1 - SIGMA_MIN) * draws.noise
    assert flow_matching_loss(Perfect(velocity), batch, draws) == 0
    torch.testing.assert_close(flow_matching_loss(Perfect(velocity + 1), batch, draws), torch.tensor(1.0))
    loss = flow_matching_loss(Perfect(torch.zeros_like(target).bfloat16()), batch, draws)
    assert loss.dtype == torch.float32
    assert loss == velocity.square().mean()


def test_draws_repeat_with_the_generator_and_have_their_distribution():
    first, second, other = (
        draw_flow((4096, 1, 2, 2), torch.Generator().manual_seed(seed), "cpu") for seed in (7, 7, 8)
    )
    assert torch.equal(first.t, second.t)
    assert torch.equal(first.noise, second.noise)
    assert not torch.equal(first.noise, other.noise)
    generator = torch.Generator().manual_seed(7)  # times first: the order decides every number of a training
    assert torch.equal(first.t, torch.rand(4096, generator=generator))
    assert torch.equal(first.noise, torch.randn(first.noise.shape, generator=generator))
    assert first.t.min() >= 0
    assert first.t.max() < 1
    # Four standard errors of 4096 uniform and 16384 normal numbers.
    assert abs(first.t.mean() - 0.5) < 4 * (1 / 12 / 4096) ** 0.5
    assert abs(first.noise.mean()) < 4 / 16384**0.5
    assert abs(first.noise.std() - 1) < 4 / (2 * 16384) ** 0.5


def test_logit_normal_times_are_sigmoids_of_standard_normals():
    n = 40_000
    draws = draw_flow((n, 1, 1, 1), torch.Generator().manual_seed(0), "cpu", torch.float64, times="logit_normal")
    normal = torch.logit(draws.t)
    assert abs(normal.mean()) < 4 / n**0.5
    assert abs(normal.std() - 1) < 4 / (2 * n) ** 0.5
    share = 0.136  # P(N(0, 1) < -ln 3)
    assert abs((draws.t < 0.25).double().mean() - share) < 4 * (share * (1 - share) / n) ** 0.5
    noisier = draw_flow(
        (n, 1, 1, 1), torch.Generator().manual_seed(0), "cpu", torch.float64, times="logit_normal", time_mean=-0.5
    )
    torch.testing.assert_close(torch.logit(noisier.t), normal - 0.5, rtol=1e-9, atol=1e-9)
    assert torch.equal(noisier.noise, draws.noise)


def test_noise_on_the_past_has_a_level_that_the_field_is_told():
    """70 % of the samples have a level, uniform up to the largest; times and noise are drawn as without it."""
    n, largest = 20_000, 0.25
    plain, draws = (
        draw_flow((n, 2, 1, 1), torch.Generator().manual_seed(3), "cpu", past_noise=level, past_frames=3)
        for level in (0.0, largest)
    )
    assert torch.equal(plain.t, draws.t)
    assert torch.equal(plain.noise, draws.noise)
    assert plain.past_noise is plain.noise_level is None
    noisy = draws.noise_level > 0
    assert abs(noisy.double().mean() - NOISY_SHARE) < 4 * (NOISY_SHARE * (1 - NOISY_SHARE) / n) ** 0.5
    assert draws.noise_level.max() < largest
    many = NOISY_SHARE * n
    assert abs(draws.noise_level[noisy].mean() - largest / 2) < 4 * largest / (12 * many) ** 0.5
    normal = draws.past_noise[noisy] / draws.noise_level[noisy][:, None, None, None]
    assert abs(normal.std() - 1) < 5 / (2 * 6 * many) ** 0.5
    assert not draws.past_noise[~noisy].any()

    target, condition, reference = torch.randn(n, 2, 1, 1), torch.randn(n, 2, 1, 1), torch.randn(n, 4, 1, 1)
    seen = []
    field = lambda *inputs: seen.append(inputs) or inputs[0]  # noqa: E731
    flow_matching_loss(field, FlowBatch(target, reference, condition, torch.ones(n, dtype=torch.int64)), draws)
    ((x_t, noisy_reference, noisy_condition, _, t, level),) = seen
    assert torch.equal(x_t, path_sample(target, draws.noise, draws.t).x_t)
    assert torch.equal(noisy_reference, reference + draws.past_noise[:, :4])
    assert torch.equal(noisy_condition, condition + draws.past_noise[:, 4:])
    assert torch.equal(t, draws.t)
    assert torch.equal(level, draws.noise_level)
    part = draws.rows(slice(4, 6))
    assert torch.equal(part.past_noise, draws.past_noise[4:6])
    assert torch.equal(part.noise_level, draws.noise_level[4:6])
