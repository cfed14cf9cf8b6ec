"""Memory of flow training, estimated by tracing one step on fake tensors."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import latent_cache
from latent_cache import FlowBatch, StoreError
from pipelines.config import RiverConfig
from pipelines.runtime.context import resolve_precision
from pipelines.runtime.files import size_text
from pipelines.runtime.throughput import step_flops
from pipelines.runtime.train_state import Optimizers, build_optimizers
from stage2_flow.config import FlowTrainingConfig, VectorFieldConfig
from stage2_flow.loss import FlowDraws, flow_matching_loss
from stage2_flow.vector_field import VectorField


@dataclass(frozen=True)
class FlowMemory:
    """Bytes in use at the peak of a training step.

    Attributes:
        parameters: of the vector field, buffers included.
        gradients: at the peak. Without accumulation the peak is at the end of the forward pass, with hardly any.
        optimizer: its state.
        average: the averaged weights.
        activations: everything else: what the backward pass needs, the batch, bf16 copies, temporaries.
        latents: cached latents in the same memory.
    """

    parameters: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    latents: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))

    def describe(self) -> str:
        """The sum and its parts as text."""
        parts = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return f"{size_text(self.total)}: " + ", ".join(f"{name} {size_text(size)}" for name, size in parts if size)


def estimate_memory(
    model: VectorFieldConfig,
    training: FlowTrainingConfig,
    latent_shape: tuple[int, int, int],
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    latents_bytes: int = 0,
) -> FlowMemory:
    """Estimate the peak of an eager training step: forward and backward pass, clipping, optimizer, average.

    Not included: Python and libraries, temporaries inside kernels, the allocator's overhead (glibc's heap: another
    fifth at the paper's sizes), other processes, validation. Compiled steps take less.

    Args:
        model: sizes of the field.
        training: batch size, parts it is computed in, precision, optimizer, average.
        latent_shape: (c, h, w).
        device: `cuda` requires a GPU, but none of its memory: kernels differ in what they keep for the backward pass
            (dropout on a CPU keeps four times the bytes, attention all weights), and PyTorch selects them by device.
        latents_bytes: size of cached latents in the same memory.
    Raises:
        ValueError: `cuda` on a machine without a GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda': the estimate for a GPU needs a GPU")
    precision = resolve_precision(training.precision, torch.device(device))
    with FakeTensorMode(), torch.device(device), LiveMemory(device) as memory:
        field = VectorField(model, latent_shape[0])
        parameters = memory.now
        optimizers = build_optimizers(
            field,
            name=training.optimizer,
            learning_rate=training.learning_rate,
            muon_learning_rate=training.muon_learning_rate,
            betas=training.betas,
            weight_decay=training.weight_decay,
            never_matrices=field.boundary_parameters(),
        )
        _make_state(field, optimizers)
        optimizer = memory.now - parameters
        memory.restart()
        batch, draws = _batch(-(-training.batch_size // training.accumulate), latent_shape)
        for _ in range(min(training.accumulate, 2)):  # a third part equals the second
            _train_part(field, batch, draws, precision)
        _update(field, optimizers, training.grad_clip)
        gradients = memory.at_peak([parameter.grad for parameter in field.parameters()])
    return FlowMemory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        average=parameters if training.ema_decay else 0,
        activations=memory.peak - parameters - optimizer - gradients,
        latents=latents_bytes,
    )


def _make_state(field: VectorField, optimizers: Optimizers) -> None:
    """Make the optimizers create their state by a first update."""
    for parameter in field.parameters():
        parameter.grad = torch.zeros_like(parameter)
    _update(field, optimizers, None)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def _batch(rows: int, latent_shape: tuple[int, int, int]) -> tuple[FlowBatch, FlowDraws]:
    target, reference, condition, noise = torch.empty(4, rows, *latent_shape).unbind()
    batch = FlowBatch(target, reference, condition, torch.ones(rows, dtype=torch.int64))
    return batch, FlowDraws(noise, torch.empty(rows))


def _train_part(field: VectorField, batch: FlowBatch, draws: FlowDraws, precision: str) -> None:
    """Forward and backward pass of one part of a batch; gradients accumulate."""
    with torch.autocast(draws.t.device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = flow_matching_loss(field, batch, draws)
    loss.backward()


def _update(field: VectorField, optimizers: Optimizers, grad_clip: float | None) -> None:
    """As `TrainState.step`, which can't check fake gradients. The average is updated in place and needs no memory."""
    norm = nn.utils.get_total_norm([parameter.grad for parameter in field.parameters()], foreach=True)
    if grad_clip is not None:
        nn.utils.clip_grads_with_norm_(field.parameters(), grad_clip, norm)
    for optimizer in optimizers:
        optimizer.step()


class LiveMemory(TorchDispatchMode):
    """Tracks the memory of tensors created inside the context, by the results of PyTorch's operations.

    Tensors from before and temporaries inside an operation are not counted.

    Attributes:
        now: bytes alive.
        peak: maximum of `now` since the last `restart`.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.now = self.peak = 0
        self._alive: dict[int, tuple[int, int]] = {}  # a storage's address -> its serial number, bytes
        self._at_peak: set[int] = set()  # serial numbers
        self._serial = 0

    def restart(self) -> None:
        """Reset the peak to what is alive."""
        self.peak, self._at_peak = self.now, {serial for serial, _ in self._alive.values()}

    def at_peak(self, tensors: list[Tensor | None]) -> int:
        """Bytes of these tensors that were alive already at the peak."""
        addresses = {tensor.untyped_storage()._cdata for tensor in tensors if tensor is not None}
        held = [self._alive[address] for address in addresses & self._alive.keys()]
        return sum(size for serial, size in held if serial in self._at_peak)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        if self.now > self.peak:
            self.restart()
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if tensor.device.type != self.device or address in self._alive:
            return
        self._serial += 1
        self._alive[address] = (self._serial, storage.nbytes())
        self.now += storage.nbytes()
        weakref.finalize(storage, self._forget, address).atexit = False

    def _forget(self, address: int) -> None:
        self.now -= self._alive.pop(address)[1]


def describe_costs(config: RiverConfig, latent_shape: tuple[int, int, int], device: torch.device) -> list[str]:
    """FLOP and peak memory of a training step of the flow, as lines of text."""
    training, residency = config.flow.training, config.cache.residency
    beside = device.type == "cuda" and residency in ("host", "stream")
    latents = 0 if beside else _latents_in_memory(config)
    memory = estimate_memory(config.flow.model, training, latent_shape, device=device.type, latents_bytes=latents)
    lines = [
        f"{step_flops(config.flow.model, latent_shape, training.batch_size) / 1e9:.0f} GFLOP per training step of "
        f"{training.batch_size} samples",
        f"peak memory of a step on {device}, {resolve_precision(training.precision, device)}, not compiled: "
        f"{memory.describe()}",
    ]
    if beside:
        lines.append(f"latents in host memory (cache.residency {residency})")
    elif not latents:
        lines.append("plus the latents, whose size is unknown until there is a store")
    if residency == "auto":
        lines.append("cache.residency auto: latents are kept on the device if they fit into half of its free memory")
    return lines


def _latents_in_memory(config: RiverConfig) -> int:
    """Bytes of latents that training keeps in memory; 0 without a store."""
    try:
        if not config.store_path.exists() or not latent_cache.is_complete(config.store_path):
            return 0
        size = latent_cache.open(config.store_path, "train").nbytes
    except StoreError:
        return 0
    return min(size, config.cache.memory_budget_bytes) if config.cache.residency == "stream" else size
