"""A model in training: its optimizers, its averaged copy, one update, and what resuming needs of them."""

import copy
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from pipelines.runtime.checkpoints import Checkpoint, Tensors, pack_optimizers, unpack_optimizers

Optimizers = list[torch.optim.Optimizer]


class ConvolutionMuon(torch.optim.Muon):
    """`torch.optim.Muon` extended to convolution kernels.

    A kernel [out, in, h, w] is updated as the matrix [out, in h w] that shares its memory (Jordan et al. 2024).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **options: object) -> None:
        self.kernels = list(parameters)
        super().__init__([nn.Parameter(_as_matrix(kernel.data)) for kernel in self.kernels], **options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        matrices = self.param_groups[0]["params"]
        for kernel, matrix in zip(self.kernels, matrices, strict=True):
            matrix.grad = None if kernel.grad is None else _as_matrix(kernel.grad, like=kernel)
        super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for kernel in self.kernels:
            kernel.grad = None
        super().zero_grad(set_to_none)


def _as_matrix(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """[out, ...] as [out, rest], without a copy if the memory layout allows; columns in the layout's order."""
    layout = tensor if like is None else like
    if tensor.ndim == 4 and layout.is_contiguous(memory_format=torch.channels_last) and not layout.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(tensor.shape[0], -1)


class OptimizerSettings(Protocol):
    """A training's settings for updates."""

    optimizer: str
    learning_rate: float
    muon_learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    grad_clip: float | None
    ema_decay: float | None


def build_optimizers(
    model: nn.Module, settings: OptimizerSettings, never_matrices: Iterable[nn.Parameter] = ()
) -> Optimizers:
    """Build the optimizers of a model; each group keeps its full learning rate as `base_lr`.

    AdamW is fused: one pass over memory, on a CPU too, where it takes a fourth of the default's time.

    Args:
        settings: with `optimizer` `adamw`, or `muon`: Muon for the weights of linear layers and convolutions.
        never_matrices: parameters that Muon must not update, such as embeddings and input and output layers.
    """

    def adamw(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            parameters, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )

    parameters = [p for p in model.parameters() if p.requires_grad]
    if settings.optimizer == "adamw":
        optimizers: Optimizers = [adamw(parameters)]
    else:
        excluded = {id(p) for p in never_matrices}
        matrices = [p for p in parameters if p.ndim >= 2 and id(p) not in excluded]
        chosen = {id(p) for p in matrices}
        rest = [p for p in parameters if id(p) not in chosen]
        optimizers = [
            ConvolutionMuon(matrices, lr=settings.muon_learning_rate, weight_decay=settings.weight_decay, momentum=0.95)
        ]
        if rest:
            optimizers.append(adamw(rest))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: Optimizers, factor: float) -> None:
    """Set every learning rate to `factor` of its full value."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


class AveragedModel:
    """An exponential moving average of a model's weights, with a warm-up.

    Before update n = 0, 1, ... the average keeps min(decay, (1 + n) / (10 + n)) of itself (the rule of TensorFlow's
    `ExponentialMovingAverage`). A fixed decay of 0.999 would keep 92 % of the random start for 80 steps; with the
    warm-up the average of a short training spans its last tenth. The rule needs no state but the number of the step.

    Attributes:
        module: the averaged model, in eval mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self._norms = [part for part in self.module.modules() if isinstance(part, nn.BatchNorm2d | nn.SyncBatchNorm)]
        averaged = list(self.module.parameters())
        self._share = averaged[0].new_zeros(())
        self._shares = [self._share.expand_as(parameter) for parameter in averaged]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, finite: Tensor) -> None:
        """Move towards the model's weights, unless `finite` (scalar bool on the device) is False."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        torch.mul(finite, share, out=self._share)
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), self._shares)

    @torch.no_grad()
    def observe(self, forward: Callable[[nn.Module], object]) -> None:
        """Let BatchNorm layers, if there are any, gather statistics of the averaged model's own activations.

        Args:
            forward: calls the given model on a batch.
        """
        if not self._norms:
            return
        for norm in self._norms:
            norm.train()
        forward(self.module)
        for norm in self._norms:
            norm.eval()


class TrainState:
    """Updates a model by its gradients.

    Attributes:
        model: the trained model.
        average: its averaged copy, if the settings have an `ema_decay`.
        learning_rate: of the last update (of AdamW; Muon's follows the same schedule).
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        never_matrices: list[nn.Parameter],
        *,
        name: str = "model",
    ) -> None:
        """Build optimizers and average.

        Args:
            model: already on its device.
            never_matrices: parameters that Muon leaves to AdamW.
            name: of the file with the weights; prefixes the other files unless it is `model`.
        """
        self.model, self.settings, self.name = model, settings, name
        self.optimizers = build_optimizers(model, settings, never_matrices)
        self.average = AveragedModel(model, settings.ema_decay) if settings.ema_decay else None
        self._buffers = [*model.buffers(), *([] if self.average is None else self.average.module.buffers())]
        self._kept = [buffer.clone() for buffer in self._buffers]
        self.learning_rate = 0.0

    @property
    def best_model(self) -> nn.Module:
        """The model that the training delivers: the averaged one if there is one."""
        return self.model if self.average is None else self.average.module

    def observe(self, forward: Callable[[nn.Module], object]) -> None:
        """See `AveragedModel.observe`; nothing without an average."""
        if self.average is not None:
            self.average.observe(forward)

    def gradient_norm(self) -> Tensor:
        """Scalar on the device: the L2 norm of all accumulated gradients."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(gradients, foreach=True)

    def update(self, step: int, factor: float, norm: Tensor, finite: Tensor) -> None:
        """One update by the accumulated gradients, which are cleared.

        If `finite` is False, nothing changes: weights, average, optimizers and BatchNorm's statistics are as they were
        before the step. Only Muon makes the host wait for the device.

        Args:
            step: its number, from 0.
            factor: of the full learning rates.
            norm: of the gradients, from `gradient_norm`.
            finite: scalar bool on the device: whether loss and gradients are finite.
        """
        set_learning_rate(self.optimizers, factor)
        self.learning_rate = self.settings.learning_rate * factor
        # Fused AdamW reads a flag on the device, as it does for gradient scaling; Muon has none.
        if all(isinstance(optimizer, torch.optim.AdamW) for optimizer in self.optimizers) or finite:
            if self.settings.grad_clip is not None:
                nn.utils.clip_grads_with_norm_(self.model.parameters(), self.settings.grad_clip, norm)
            for optimizer in self.optimizers:
                optimizer.found_inf = (~finite).float()
                optimizer.step()
            if self.average is not None:
                self.average.update(self.model, step, finite)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            kept.copy_(torch.where(finite, buffer, kept))
            buffer.copy_(kept)

    def files(self) -> dict[str, Tensors]:
        """The files of a checkpoint."""
        prefix = "" if self.name == "model" else f"{self.name}_"
        files = {self.name: self.model.state_dict(), f"{prefix}optimizer": pack_optimizers(self.optimizers)}
        if self.average is not None:
            files[f"{prefix}ema"] = self.average.module.state_dict()
        return files

    def load(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Resume from a checkpoint of the same configuration."""
        prefix = "" if self.name == "model" else f"{self.name}_"
        self.model.load_state_dict(checkpoint.tensors(self.name, device))
        unpack_optimizers(self.optimizers, checkpoint.tensors(f"{prefix}optimizer", device))
        if self.average is not None:
            self.average.module.load_state_dict(checkpoint.tensors(f"{prefix}ema", device))
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            kept.copy_(buffer)
