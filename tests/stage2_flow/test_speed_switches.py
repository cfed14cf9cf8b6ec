"""What makes training fast changes no number: the official recordings hold with every switch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latent_cache.sampling.sampler import FlowBatch
from stage2_flow.loss import FlowDraws, flow_matching_loss
from stage2_flow.path import SIGMA_MIN
from stage2_flow.vector_field import VectorField, attention

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
COMPILED = {"compiled": Switches(compile=True), "all": Switches(compile=True, matmul="high", bf16=True)}
# Importing inductor defines a module in the way that torch itself gave up.
ignore_inductor = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
every_switch = [
    pytest.param(switches, repeats, id=f"{name}-{4 * repeats}x65")
    for name, switches in EAGER.items()
    for repeats in (1, 4)
]
every_switch += [
    pytest.param(switches, 4, id=f"{name}-16x65", marks=[pytest.mark.slow, ignore_inductor])
    for name, switches in COMPILED.items()
]


@pytest.fixture
def switched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[VectorField, Switches], Callable[..., Tensor]]]:
    """A field with switches on; they are off again after the test."""
    before = torch.get_float32_matmul_precision()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()

    def switch(field: VectorField, switches: Switches) -> Callable[..., Tensor]:
        torch.set_float32_matmul_precision(switches.matmul)
        forward = torch.compile(field, fullgraph=True) if switches.compile else field

        def call(*arguments: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=switches.bf16):
                return forward(*arguments)

        return call

    yield switch
    torch.set_float32_matmul_precision(before)
    torch._dynamo.reset()


def tiled(x: Tensor, repeats: int) -> Tensor:
    """The rows so many times over: outputs of rows, mean losses and their gradients stay what they are."""
    return x.repeat(repeats, *(1,) * (x.ndim - 1))


def recorded_inputs(regressor: dict[str, Tensor], repeats: int = 1) -> list[Tensor]:
    return [tiled(regressor[name], repeats) for name in INPUTS]


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


def relative(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


@contextmanager
def rounded_to_bf16(field: VectorField) -> Iterator[None]:
    """The field in float64, with weights that bf16 can name."""
    kept = {name: value.clone() for name, value in field.state_dict().items()}
    field.load_state_dict({name: value.bfloat16() for name, value in kept.items()})
    yield
    field.load_state_dict(kept)


def errors_of_bf16(field: VectorField, arguments: list[Tensor], target: Tensor) -> tuple[float, float]:
    """What rounding weights and latents to bf16 ONCE does to the exact output and to the exact gradient, relative.

    A run in bf16 rounds each activation as well, but its errors add up to no more than twice this.
    """
    results = []
    field.double()
    frames, (distance, t) = arguments[:3], arguments[3:]
    wide = [x.double() for x in frames]
    narrow = [x.bfloat16().double() for x in frames]

    def run(latents: list[Tensor]) -> None:
        output = field(*latents, distance, t.double())
        (output - target).square().mean().backward()
        results.append((output.detach(), flat(gradients(field))))

    run(wide)
    with rounded_to_bf16(field):
        run(narrow)
    field.float()
    return relative(results[1][0], results[0][0]), relative(results[1][1], results[0][1])


@pytest.mark.parametrize(("switches", "repeats"), every_switch)
def test_official_outputs_losses_and_gradients(
    official_field, regressor, regressor_grad_names, train_forward, switched, switches, repeats
):
    arguments, target = recorded_inputs(regressor, repeats), tiled(regressor["target"], repeats)
    field = switched(official_field, switches)
    output = field(*arguments)
    (output.float() - target).square().mean().backward()
    found = gradients(official_field)
    assert list(found) == regressor_grad_names
    norms = torch.stack([gradient.norm() for gradient in found.values()])
    exact = tiled(regressor["output_f64"], repeats)
    loss = flow_matching_loss(field, *recorded_training(train_forward, repeats))
    assert loss.dtype == torch.float32

    if switches.bf16:
        output_error, gradient_error = errors_of_bf16(official_field, arguments, target)
        assert 2**-10 < output_error < 2**-5, "the measure itself is one of bf16"
        assert 2**-10 < gradient_error < 2**-5
        official_field.double()(*(x.double() if x.is_floating_point() else x for x in arguments)).sub(
            target
        ).square().mean().backward()
        assert relative(output, exact) < 2 * output_error
        assert relative(flat(found), flat(gradients(official_field))) < 2 * gradient_error
        assert abs(loss - train_forward["loss"]) < 2 * output_error * train_forward["loss"]
        return
    assert (output - exact).abs().max() < 1e-5
    assert (output - tiled(regressor["output"], repeats)).abs().max() < 1e-5
    assert ((norms - regressor["grad_norms"]).abs() < 2e-6 * regressor["grad_norms"]).all()
    for recorded, name in RECORDED_GRADIENTS.items():
        assert relative(found[name][: len(regressor[recorded])], regressor[recorded]) < 2e-6, name
    assert abs(loss - train_forward["loss"]) < 1e-6


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("switches", [pytest.param(value, id=name) for name, value in EAGER.items()])
def test_a_batch_in_parts_has_the_loss_and_the_gradient_of_the_whole(
    official_field, regressor, train_forward, switched, switches, parts
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
    tolerance = 2**-7 if switches.bf16 else 2e-6
    assert abs(sum(losses) - whole) < tolerance * whole
    assert relative(flat(found), flat(expected)) < tolerance
    if not switches.bf16:  # in which some biases' gradients are small differences of large sums
        for name, gradient in found.items():
            assert relative(gradient, expected[name]) < tolerance, name


@pytest.mark.parametrize("shape", [(2, 8, 65, 96), (16, 8, 65, 96), (3, 2, 17, 8)])
def test_attention_in_fp32_is_the_multiplied_out_one_with_its_gradients(shape):
    generator = torch.Generator().manual_seed(0)
    frames = [torch.randn(shape, generator=generator) for _ in range(4)]
    results = []
    for dtype in (torch.float32, torch.float64):
        query, key, value = leaves = [x.to(dtype).requires_grad_() for x in frames[:3]]
        if dtype == torch.float32:
            mixed = attention(query, key, value, dropout=0.0)
        else:
            mixed = torch.softmax(query @ key.mT / shape[-1] ** 0.5, dim=-1) @ value
        results.append([mixed, *torch.autograd.grad(mixed, leaves, frames[3].to(dtype))])
    for found, wanted in zip(*results, strict=True):
        assert relative(found, wanted) < 1e-6


@pytest.mark.parametrize("shape", [(2, 8, 65, 96), (3, 2, 17, 8)])
def test_attention_in_bf16_has_the_gradients_of_its_exact_form(shape):
    """Also on a CPU, where it is not the fused kernel."""
    generator = torch.Generator().manual_seed(0)
    frames = [torch.randn(shape, generator=generator).bfloat16() for _ in range(4)]
    narrow = [x.clone().requires_grad_() for x in frames[:3]]
    wide = [x.double().requires_grad_() for x in frames[:3]]
    found = attention(*narrow, dropout=0.0)
    wanted = F.softmax(wide[0] @ wide[1].mT / shape[-1] ** 0.5, dim=-1) @ wide[2]
    pairs = [(found, wanted)]
    pairs += zip(
        torch.autograd.grad(found, narrow, frames[3]),
        torch.autograd.grad(wanted, wide, frames[3].double()),
        strict=True,
    )
    for ours, exact in pairs:
        assert relative(ours, exact) < 4 * 2**-8
