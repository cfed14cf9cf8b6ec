"""A check that code never makes the host wait for the device, which works on a CPU as well."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Their results are Python numbers or have shapes that depend on values, so the host must wait for them.
SYNCHRONIZING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
# In inference mode these do not pass through the dispatcher's modes.
READING = (Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__)


class NoHostSync:
    """Fails on operations that read a value of a tensor, in the forward pass and in the backward pass."""

    def __enter__(self) -> Self:
        self._modes = ExitStack()
        self._modes.enter_context(_NoReadingCall())
        self._modes.enter_context(_NoReadingOperation())
        return self

    def __exit__(self, *error: object) -> None:
        self._modes.close()


class _NoReadingOperation(TorchDispatchMode):
    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert function not in SYNCHRONIZING, f"{function} makes the host wait for the device"
        return function(*args, **(kwargs or {}))


class _NoReadingCall(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert function not in READING, f"{function} makes the host wait for the device"
        return function(*args, **(kwargs or {}))
