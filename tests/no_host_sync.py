"""A check that code never makes the host wait for the device, which works on a CPU as well."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Their results are Python numbers or have shapes that depend on values, so the host must wait for them.
SYNCHRONIZING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class NoHostSync(TorchDispatchMode):
    """Fails on operations that read a value of a tensor, in the forward pass and in the backward pass."""

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert function not in SYNCHRONIZING, f"{function} makes the host wait for the device"
        return function(*args, **(kwargs or {}))
