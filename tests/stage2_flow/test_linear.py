"""The faster linear layer, held to PyTorch's own: values, gradients, and where it stands aside."""

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
    """Output and gradients in float64."""
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
    for ours, exact in zip(found, reference(x, weight, bias, gradient), strict=True):
        assert ours.shape == exact.shape
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias), output)
        torch.testing.assert_close(linear(x, weight), output - bias, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_views_and_frozen_weights(onednn):
    x = torch.randn(4, 6, 3, requires_grad=True).transpose(1, 2)
    weight = torch.randn(5, 6)
    output = linear(x, weight)
    torch.testing.assert_close(output, F.linear(x, weight))
    (gradient,) = torch.autograd.grad(output.square().sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(F.linear(x, weight).square().sum(), x)[0])


@needs_onednn
def test_columns_of_a_matrix_go_the_usual_way(onednn, monkeypatch):
    monkeypatch.setattr(module, "_product", None)
    wide, x = torch.randn(5, 12), torch.randn(4, 6)
    assert torch.equal(linear(x, wide[:, 6:]), F.linear(x, wide[:, 6:]))


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_go_the_usual_way(onednn, dtype):
    layer, x = Linear(8, 3).to(dtype), torch.randn(2, 8, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@needs_onednn
def test_autocast_rounds_as_ever(onednn):
    layer, x = Linear(8, 3), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, F.linear(x, layer.weight, layer.bias))


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
