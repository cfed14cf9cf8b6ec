"""Linear layers that use the faster of PyTorch's two CPU libraries.

PyTorch multiplies float32 matrices on a CPU with MKL, which does not use AVX-512 on processors that are not Intel's;
oneDNN, which is built in as well, does, and is 2.2 times as fast there.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, as `torch.nn.functional.linear`, with gradients.

    Args:
        x: [..., k] float.
        weight: [n, k]; bias: [n].
    Returns:
        [..., n]; equal to `F.linear` within the rounding of float32.
    """
    if not _takes_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _OneDNNLinear.apply(x, weight, bias)
    return _product(x, weight, bias)


class Linear(nn.Linear):
    """An `nn.Linear` that computes with `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            _product(gradient, weight.t(), None) if of_x else None,
            _product(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        type(x) is Tensor  # no subclass, such as the fake tensors that count FLOPs
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.is_contiguous()  # for columns of a wider matrix oneDNN is a hundred times slower
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and _onednn_is_faster()
    )


@cache
def _onednn_is_faster() -> bool:
    """Decided by the processor and not by a measurement: a resumed training must compute as before."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() not in ("GenuineIntel", "")


def _vendor() -> str:
    """Vendor of the processor as Linux reports it; empty on other systems."""
    try:
        rows = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((row.partition(":")[2].strip() for row in rows if row.startswith("vendor_id")), "")
