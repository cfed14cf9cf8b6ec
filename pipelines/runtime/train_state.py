"""A model in training: its optimizers, its averaged copy, one update, and what resuming needs of them."""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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


def build_optimizers(
    model: nn.Module,
    *,
    name: str,
    learning_rate: float,
    muon_learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    never_matrices: Iterable[nn.Parameter] = (),
    recordable: bool = False,
) -> Optimizers:
    """Build the optimizers of a model; each group keeps its full learning rate as `base_lr`.

    AdamW is fused: one pass over memory, on a CPU too, where it takes a fourth of the default's time.

    Args:
        name: `adamw`, or `muon`: Muon for the weights of linear layers and convolutions.
        never_matrices: parameters that Muon must not update, such as embeddings and input and output layers.
        recordable: learning rates are tensors on the device, so that an update captured as a CUDA graph follows them;
            `adamw` only.
    """

    def adamw(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        rate = torch.tensor(learning_rate, device=parameters[0].device) if recordable else learning_rate
        return torch.optim.AdamW(
            parameters, lr=rate, betas=betas, weight_decay=weight_decay, fused=True, capturable=recordable
        )

    assert name == "adamw" or not recordable, name
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "adamw":
        optimizers: Optimizers = [adamw(parameters)]
    else:
        excluded = {id(p) for p in never_matrices}
        matrices = [p for p in parameters if p.ndim >= 2 and id(p) not in excluded]
        chosen = {id(p) for p in matrices}
        rest = [p for p in parameters if id(p) not in chosen]
        optimizers = [ConvolutionMuon(matrices, lr=muon_learning_rate, weight_decay=weight_decay, momentum=0.95)]
        if rest:
            optimizers.append(adamw(rest))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = float(group["lr"])
    return optimizers


def set_learning_rate(optimizers: Optimizers, factor: float) -> None:
    """Set every learning rate to `factor` of its full value."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(group["base_lr"] * factor)
            else:
                group["lr"] = group["base_lr"] * factor


class OptimizerSettings(Protocol):
    """A training's settings for updates."""

    optimizer: str
    learning_rate: float
    muon_learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    grad_clip: float | None
    ema_decay: float | None


class TrainState:
    """Updates a model by its gradients.

    Attributes:
        model: the trained model.
        learning_rate: of the last update (of AdamW; Muon's follows the same schedule).
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        never_matrices: list[nn.Parameter],
        *,
        name: str = "model",
        recordable: bool = False,
    ) -> None:
        """Build optimizers and average.

        Args:
            model: already on its device.
            never_matrices: parameters that Muon leaves to AdamW.
            name: of the file with the weights; prefixes the other files unless it is `model`.
            recordable: updates may be captured as a CUDA graph; AdamW only.
        """
        self.model, self.settings, self.name, self.recordable = model, settings, name, recordable
        self.optimizers = build_optimizers(
            model,
            name=settings.optimizer,
            learning_rate=settings.learning_rate,
            muon_learning_rate=settings.muon_learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            never_matrices=never_matrices,
            recordable=recordable,
        )
        decay = settings.ema_decay
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None
        self.learning_rate = 0.0

    @property
    def best_model(self) -> nn.Module:
        """The model that the training delivers: the averaged one if there is one."""
        return self.model if self.average is None else self.average.module

    def update(self, loss: Tensor, factor: float) -> Tensor:
        """One update by a scalar loss; see `apply`."""
        loss.backward()
        return self.apply(factor)

    def apply(self, factor: float) -> Tensor:
        """One update by the accumulated gradients, with `factor` of the full learning rates; see `step`."""
        self.set_rate(factor)
        return self.step()

    def set_rate(self, factor: float) -> None:
        """Set the learning rates to `factor` of their full values."""
        set_learning_rate(self.optimizers, factor)
        self.learning_rate = self.settings.learning_rate * factor

    def step(self) -> Tensor:
        """One update by the accumulated gradients.

        Non-finite gradients update nothing (on a GPU the average still moves towards the weights). Only Muon on a GPU
        makes the host wait for the device.

        Returns:
            Scalar bool on the device: whether all gradients were finite.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        finite = norm.isfinite()
        on_device = finite.is_cuda and all(isinstance(o, torch.optim.AdamW) for o in self.optimizers)
        skipping = self.recordable or on_device
        if skipping:
            # Fused AdamW reads this flag on the device, as it does for gradient scaling.
            for optimizer in self.optimizers:
                optimizer.found_inf = (~finite).float()
                optimizer.grad_scale = torch.ones((), device=finite.device)
        if skipping or finite:
            if self.settings.grad_clip is not None:
                nn.utils.clip_grads_with_norm_(self.model.parameters(), self.settings.grad_clip, norm)
            for optimizer in self.optimizers:
                optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return finite

    def files(self) -> dict[str, Tensors]:
        """The files of a checkpoint."""
        prefix = "" if self.name == "model" else f"{self.name}_"
        files = {self.name: self.model.state_dict(), f"{prefix}optimizer": pack_optimizers(self.optimizers)}
        if self.average is not None:
            files[f"{prefix}ema"] = self.average.module.state_dict()
            files[f"{prefix}average"] = {"n_averaged": self.average.n_averaged}
        return files

    def load(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Resume from a checkpoint of the same configuration."""
        prefix = "" if self.name == "model" else f"{self.name}_"
        self.model.load_state_dict(checkpoint.tensors(self.name, device))
        unpack_optimizers(self.optimizers, checkpoint.tensors(f"{prefix}optimizer", device))
        if self.average is not None:
            self.average.module.load_state_dict(checkpoint.tensors(f"{prefix}ema", device))
            self.average.n_averaged.copy_(checkpoint.tensors(f"{prefix}average", device)["n_averaged"])
