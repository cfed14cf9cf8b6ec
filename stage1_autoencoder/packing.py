"""Convolutions whose weights are laid out once, for networks that infer on a CPU."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class PackedConv2d(nn.Module):
    """An `nn.Conv2d` with constant weights in oneDNN's layout, for float inputs on a CPU; computes in channels_last.

    The layout is chosen in the first call, for the shape of its input and the number of threads of its caller. Where
    another input needs another one, oneDNN lays the weights out again in that call.
    """

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._layer = [layer]  # in a list: not a submodule
        self._arguments = (layer.padding, layer.stride, layer.dilation, layer.groups)
        self._packed: tuple[Tensor, Tensor | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype, memory_format=torch.channels_last)
        if self._packed is None:  # concurrent threads compute the same
            (layer,) = self._layer
            weight = torch.ops.mkldnn._reorder_convolution_weight(
                layer.weight.detach().to(self.dtype), *self._arguments, list(x.shape)
            )
            self._packed = weight, None if layer.bias is None else layer.bias.detach().to(self.dtype)
        return torch.ops.mkldnn._convolution_pointwise(x, *self._packed, *self._arguments, "none", [], "")


def can_pack(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN, and it computes in `dtype` on this processor."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")):
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def with_packed_convolutions(network: nn.Module, dtype: torch.dtype, shared: Iterable[nn.Module] = ()) -> nn.Module:
    """A copy of a network on the CPU for inference, with packed convolutions. Its weights must not change afterwards.

    Args:
        dtype: float32 or bfloat16, see `can_pack`.
        shared: parts that are not copied, but shared with the network.
    """
    parts = {id(part): part for part in shared}
    packed = {
        id(module): PackedConv2d(module, dtype)
        for module in network.modules()
        if type(module) is nn.Conv2d and module.padding_mode == "zeros"
    }
    # The memo of `deepcopy` replaces convolutions, and keeps the shared parts whole.
    return copy.deepcopy(network, {**packed, **parts})
