"""Convolutions of a frozen network on a CPU, with their kernels laid out once, as oneDNN wants them.

As modules they are laid out anew at every call, which at a few frames a pass costs a tenth of the time and more; and
1x1 convolutions of one thread go through a slower library.
"""

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class PackedConv2d(nn.Module):
    """As an `nn.Conv2d` whose weights stay what they are, for float32 or bfloat16 inputs of one shape on a CPU.

    The layout is chosen at the first call, for its input's shape and the number of threads of its caller.
    """

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._layer = [layer]  # not a module of ours: its weights are not
        self._arguments = (layer.padding, layer.stride, layer.dilation, layer.groups)
        self._packed: tuple[Tensor, Tensor | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self._packed is None:  # two threads that come here at once do the same
            (layer,) = self._layer
            weight = torch.ops.mkldnn._reorder_convolution_weight(
                layer.weight.detach().to(self.dtype), *self._arguments, list(x.shape)
            )
            self._packed = weight, None if layer.bias is None else layer.bias.detach().to(self.dtype)
        return torch.ops.mkldnn._convolution_pointwise(x, *self._packed, *self._arguments, "none", [], "")


def can_pack(dtype: torch.dtype) -> bool:
    """Whether torch was built with oneDNN, and it computes in `dtype` on this processor."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")):
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def with_packed_convolutions(network: Network, dtype: torch.dtype, shared: Iterable[nn.Module]) -> Network:
    """A copy of a network on the CPU for inference alone, with packed convolutions.

    Args:
        dtype: float32 or bfloat16, see `can_pack`.
        shared: parts that the copy has in common with the network, and that stay as they are.
    """
    parts = {id(part): part for part in shared}
    packed = {
        id(module): PackedConv2d(module, dtype)
        for module in network.modules()
        if type(module) is nn.Conv2d and module.padding_mode == "zeros"
    }
    # What `deepcopy` has copied already, it takes from here: the shared parts whole, with their convolutions.
    return copy.deepcopy(network, {**packed, **parts})
