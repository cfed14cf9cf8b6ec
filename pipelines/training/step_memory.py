"""Memory of training steps, estimated by tracing one on fake tensors."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
from pipelines.runtime.context import image_memory_format, resolve_precision
from pipelines.runtime.files import size_text
from pipelines.runtime.throughput import step_flops
from pipelines.runtime.train_state import OptimizerSettings, build_optimizers
from pipelines.training.autoencoder_trainer import discriminator_settings
from pipelines.training.refiner_trainer import make_example
from stage1_autoencoder.config import (
    AutoencoderTrainingConfig,
    RefinerModelConfig,
    RefinerTrainingConfig,
    VQGANConfig,
    VQVAEConfig,
)
from stage1_autoencoder.discriminator import PatchDiscriminator
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.lpips import LPIPS, STAGES, vgg16
from stage1_autoencoder.rcan import RCAN
from stage1_autoencoder.st_lpips import STLPIPS, WIDTHS, shift_tolerant_alexnet
from stage1_autoencoder.training import DiscriminatorStep, backward
from stage2_flow.config import FlowTrainingConfig, VectorFieldConfig
from stage2_flow.loss import FlowDraws, flow_matching_loss
from stage2_flow.vector_field import VectorField

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class StepMemory:
    """Bytes in use at the peak of a training step.

    Attributes:
        parameters: of all networks, buffers included.
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


def estimate_flow_memory(
    model: VectorFieldConfig,
    training: FlowTrainingConfig,
    latent_shape: tuple[int, int, int],
    *,
    device: Device = "cpu",
    latents_bytes: int = 0,
) -> StepMemory:
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
    precision = resolve_precision(training.precision, torch.device(device))
    with _tracing(device) as memory:
        field = VectorField(model, latent_shape[0])
        trained = _Trained(field, training, field.boundary_parameters())

        def step() -> None:
            rows = -(-training.batch_size // training.accumulate)
            target, condition, noise = torch.empty(3, rows, *latent_shape).unbind()
            reference = torch.empty(rows, model.recent_frames * latent_shape[0], *latent_shape[1:])
            batch = FlowBatch(target, reference, condition, torch.ones(rows, dtype=torch.int64))
            draws = FlowDraws(noise, torch.empty(rows))
            if model.past_noise:
                past_noise = torch.empty(rows, (model.recent_frames + 1) * latent_shape[0], *latent_shape[1:])
                draws = FlowDraws(noise, torch.empty(rows), past_noise, torch.empty(rows))
            for _ in range(min(training.accumulate, 2)):  # a third part equals the second
                with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                    loss = flow_matching_loss(field, batch, draws)
                loss.backward()

        return _measure(memory, [trained], step, latents_bytes)


def estimate_autoencoder_memory(
    model: VQGANConfig | VQVAEConfig,
    training: AutoencoderTrainingConfig,
    frame_size: tuple[int, int],
    *,
    device: Device = "cpu",
) -> StepMemory:
    """Estimate the peak of an eager training step of the autoencoder, as `estimate_flow_memory` does for the flow.

    Args:
        model: sizes of the autoencoder.
        training: likewise. The step has the perceptual network and the discriminator if the training ever has.
        frame_size: (height, width).
        device: as for `estimate_flow_memory`.
    Raises:
        ValueError: `cuda` on a machine without a GPU.
    """
    adversarial, layout = training.adversarial, image_memory_format(torch.device(device))

    def autocasting(module: Callable[..., Any]) -> Callable[..., Any]:
        def call(*images: Tensor) -> Any:
            with torch.autocast(device, torch.bfloat16, enabled=training.precision == "bf16"):
                return module(*images)

        return call

    with _tracing(device) as memory:
        autoencoder = build_autoencoder(model)
        trained = [_Trained(autoencoder, training, autoencoder.boundary_parameters())]
        perceptual, judge, judge_step = None, None, None
        if training.perceptual == "lpips":
            trunk = {f"features.{name}": torch.empty_like(value) for name, value in vgg16()[0].state_dict().items()}
            heads = {f"lin{i}.model.1.weight": torch.empty(1, stage[-1], 1, 1) for i, stage in enumerate(STAGES)}
            perceptual = autocasting(LPIPS(trunk, heads))
            del trunk, heads
        elif training.perceptual == "st_lpips":
            weights = {f"net.slice.{name}": value for name, value in shift_tolerant_alexnet().state_dict().items()}
            weights |= {f"lin{i}.model.1.weight": torch.empty(1, width, 1, 1) for i, width in enumerate(WIDTHS)}
            perceptual = autocasting(STLPIPS(weights))
            del weights
        if adversarial.weight:
            discriminator = PatchDiscriminator(adversarial.filters, adversarial.layers)
            trained.append(_Trained(discriminator, discriminator_settings(training), []))
            judge, judge_step = autocasting(discriminator), autocasting(DiscriminatorStep(discriminator))

        def step() -> None:
            images = torch.empty(training.batch_size, 3, *frame_size).contiguous(memory_format=layout)
            reconstructed = []
            for part in images.chunk(training.accumulate)[:2]:  # a third part equals the second
                output = autocasting(autoencoder)(part)
                backward(
                    output,
                    part,
                    training,
                    last_layer=autoencoder.last_layer.weight,
                    perceptual=perceptual,
                    discriminator=judge,
                    adversarial_weight=adversarial.weight,
                )
                reconstructed.append(output.images.detach().float())
            if judge_step is not None:
                for part, images_part in zip(reconstructed, images.chunk(training.accumulate), strict=False):
                    judge_step(images_part, part)[0].backward()

        return _measure(memory, trained, step)


def estimate_refiner_memory(
    model: RefinerModelConfig,
    training: RefinerTrainingConfig,
    autoencoder: VQGANConfig | VQVAEConfig,
    frame_size: tuple[int, int],
    *,
    device: Device = "cpu",
) -> StepMemory:
    """Estimate the peak of a training step of the refiner, as `estimate_flow_memory` does for the flow.

    Args:
        model: sizes of the refiner.
        training: likewise; a perceptual network is not included.
        autoencoder: that decodes the clips.
        frame_size: (height, width).
        device: as for `estimate_flow_memory`.
    Raises:
        ValueError: `cuda` on a machine without a GPU.
    """
    settings = training.model_copy(update={"learning_rate": training.peak_learning_rate})
    clip = -(-training.batch_size // training.accumulate), training.clip_frames
    with _tracing(device) as memory:
        decoder, refiner = build_autoencoder(autoencoder).eval().requires_grad_(False), RCAN(model)

        def step() -> None:
            pixels = torch.empty(*clip, *frame_size, 3, dtype=torch.uint8)
            latents = torch.empty(*clip, *autoencoder.latent_shape(frame_size))
            for _ in range(min(training.accumulate, 2)):  # a third part equals the second
                example = make_example(decoder, pixels, latents)
                with torch.autocast(device, torch.bfloat16, enabled=training.precision == "bf16"):
                    refined = refiner(example.previous.flatten(0, 1), example.decoded.flatten(0, 1))
                (refined.float() - example.truth.flatten(0, 1)).square().mean().backward()

        return _measure(memory, [_Trained(refiner, settings, refiner.boundary_parameters())], step)


@contextmanager
def _tracing(device: Device) -> "Iterator[LiveMemory]":
    """Everything is computed on fake tensors, and their memory is counted."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda': the estimate for a GPU needs a GPU")
    with FakeTensorMode(), torch.device(device), LiveMemory(device) as memory:
        yield memory


class _Trained:
    """A network of a step and its optimizers."""

    def __init__(self, model: nn.Module, settings: OptimizerSettings, never_matrices: list[nn.Parameter]) -> None:
        self.model, self.settings = model, settings
        self.optimizers = build_optimizers(model, settings, never_matrices)

    @property
    def average_bytes(self) -> int:
        """Of the averaged weights, which are updated in place."""
        tensors: Iterable[Tensor] = (*self.model.parameters(), *self.model.buffers())
        return sum(tensor.nbytes for tensor in tensors) if self.settings.ema_decay else 0

    def make_state(self) -> None:
        """Make the optimizers create their state by a first update."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.update(None)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def update(self, grad_clip: float | None) -> None:
        """As `TrainState.update`, which can't check fake gradients."""
        norm = nn.utils.get_total_norm([parameter.grad for parameter in self.model.parameters()], foreach=True)
        if grad_clip is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), grad_clip, norm)
        for optimizer in self.optimizers:
            optimizer.step()


def _measure(
    memory: "LiveMemory", trained: list[_Trained], step: Callable[[], None], latents_bytes: int = 0
) -> StepMemory:
    """Trace a step.

    Args:
        step: accumulates the gradients of all networks.
    """
    parameters = memory.now
    for network in trained:
        network.make_state()
    optimizer = memory.now - parameters
    memory.restart()
    step()
    for network in trained:
        network.update(network.settings.grad_clip)
    gradients = memory.at_peak([parameter.grad for network in trained for parameter in network.model.parameters()])
    return StepMemory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        average=sum(network.average_bytes for network in trained),
        activations=memory.peak - parameters - optimizer - gradients,
        latents=latents_bytes,
    )


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


def autoencoder_costs(config: RiverConfig, device: torch.device) -> list[str]:
    """Peak memory of a training step of the autoencoder, as lines of text."""
    training = config.autoencoder.training
    memory = estimate_autoencoder_memory(
        config.autoencoder.model, training, config.dataset.frame_size, device=device.type
    )
    unit = {"none": "frames", "lpips": "frames with LPIPS", "st_lpips": "frames with ST-LPIPS"}[training.perceptual]
    return [
        _peak_text(training.batch_size, unit, device, training.precision, memory),
        f"plus decoded frames in host memory, at most {training.pool_memory} (autoencoder.training.pool_memory)",
    ]


def refiner_costs(config: RiverConfig, device: torch.device) -> list[str]:
    """Peak memory of a training step of the refiner, as lines of text."""
    training = config.refiner.training
    memory = estimate_refiner_memory(
        config.refiner.model, training, config.autoencoder.model, config.dataset.frame_size, device=device.type
    )
    clips = f"clips of {training.clip_frames} frames"
    return [_peak_text(training.batch_size, clips, device, training.precision, memory)]


def flow_costs(config: RiverConfig, latent_shape: tuple[int, int, int], device: torch.device) -> list[str]:
    """FLOP and peak memory of a training step of the flow, as lines of text."""
    training, residency = config.flow.training, config.cache.residency
    beside = device.type == "cuda" and residency in ("host", "stream")
    latents = 0 if beside else _latents_in_memory(config)
    memory = estimate_flow_memory(config.flow.model, training, latent_shape, device=device.type, latents_bytes=latents)
    flops = step_flops(config.flow.model, latent_shape, training.batch_size)
    precision = resolve_precision(training.precision, device)
    lines = [
        f"{flops / 1e9:.0f} GFLOP per training step of {training.batch_size} samples",
        _peak_text(training.batch_size, "samples", device, precision, memory),
    ]
    if beside:
        lines.append(f"latents in host memory (cache.residency {residency})")
    elif not latents:
        lines.append("plus the latents, whose size is unknown until there is a store")
    if residency == "auto":
        lines.append("cache.residency auto: latents are kept on the device if they fit into half of its free memory")
    return lines


def _peak_text(batch_size: int, unit: str, device: torch.device, precision: str, memory: StepMemory) -> str:
    return (
        f"peak memory of a training step of {batch_size} {unit} on {device}, {precision}, not compiled: "
        f"{memory.describe()}"
    )


def _latents_in_memory(config: RiverConfig) -> int:
    """Bytes of latents that training keeps in memory; 0 without a store."""
    try:
        if not config.store_path.exists() or not latent_cache.is_complete(config.store_path):
            return 0
        size = latent_cache.open(config.store_path, "train").nbytes
    except StoreError:
        return 0
    return min(size, config.cache.memory_budget_bytes) if config.cache.residency == "stream" else size
