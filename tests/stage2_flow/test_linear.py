"""The faster linear layer against PyTorch's own: values, gradients, and the cases in which it is not used."""

import pytest
import torch
import torch.nn.functional as F

from stage2_flow import linear as module
from stage2_flow.linear import Linear, linear

needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="torch was built without oneDNN",
)


@pytest.fixture
def onednn(monkeypatch):
    monkeypatch.setattr(module, "_onednn_is_faster", lambda: True)


def reference(x, weight, bias, gradient):
    """Output and gradients in float64. Of absolute values, these are the sums that bound the rounding."""
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    output = F.linear(*wide)
    output.backward(gradient.double())
    return [output, *(tensor.grad for tensor in wide)]


@needs_onednn
@pytest.mark.parametrize("shape", [(3, 65, 48), (5, 48), (48,), (1, 1, 48)])
def test_values_and_gradients(onednn, shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).requires_grad_()
    weight = torch.randn(80, 48, generator=generator).requires_grad_()
    bias = torch.randn(80, generator=generator).requires_grad_()
    gradient = torch.randn(*shape[:-1], 80, generator=generator)
    output = linear(x, weight, bias)
    assert "OneDNN" in type(output.grad_fn).__name__
    output.backward(gradient)
    found = [output, x.grad, weight.grad, bias.grad]
    inputs = (x, weight, bias, gradient)
    # |error| <= n eps / 2 times the sum of absolute products, for sums of n products in any order.
    terms = max(81, x.shape[:-1].numel())
    for ours, exact, sums in zip(found, reference(*inputs), reference(*(v.abs() for v in inputs)), strict=True):
        assert ours.shape == exact.shape
        assert ((ours - exact).abs() <= terms * torch.finfo(torch.float32).eps / 2 * sums).all()
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias), output)
        torch.testing.assert_close(linear(x, weight), linear(x, weight, torch.zeros(80)))


@needs_onednn
def test_views_and_frozen_weights(onednn):
    x = torch.randn(4, 6, 3, requires_grad=True).transpose(1, 2)
    weight = torch.randn(5, 6)
    output = linear(x, weight)
    torch.testing.assert_close(output, F.linear(x, weight))
    (gradient,) = torch.autograd.grad(output.square().sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(F.linear(x, weight).square().sum(), x)[0])


@needs_onednn
@pytest.mark.parametrize("case", ["columns", "float64", "bfloat16", "autocast"])
def test_other_cases_are_pytorchs_to_the_bit(onednn, case):
    x, weight, bias = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5)
    if case == "columns":  # of a wider matrix, for which oneDNN is slow
        weight = torch.randn(5, 12)[:, 6:]
    elif case != "autocast":
        x, weight, bias = (value.to(getattr(torch, case)) for value in (x, weight, bias))
    layer = Linear(6, 5)
    layer.weight, layer.bias = (torch.nn.Parameter(value) for value in (weight, bias))
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        output = layer(x)
        assert torch.equal(output, F.linear(x, weight, bias))
    assert "OneDNN" not in type(output.grad_fn).__name__


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [("AuthenticAMD", "AVX512", True), ("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX2", False),
     ("", "AVX512", False)],
)  # fmt: skip
@needs_onednn
def test_the_kind_of_processor_decides(monkeypatch, vendor, capability, expected):
    monkeypatch.setattr(module, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert module._onednn_is_faster.__wrapped__() is expected
