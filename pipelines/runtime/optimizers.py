"""Optimizers for both stages: AdamW, or Muon on the weight matrices with AdamW on everything else."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

Optimizers = list[torch.optim.Optimizer]


class ConvolutionMuon(torch.optim.Muon):
    """`torch.optim.Muon`, which takes matrices only, on convolution kernels as well.

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
    """[out, ...] as [out, rest] without a copy where the memory layout allows; columns in the layout's order."""
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
    """Make the optimizers of a model; each remembers its full learning rate as `base_lr`.

    AdamW is the fused one: one pass over memory on a CPU too, where it takes a fourth of the default one's time.

    Args:
        name: `adamw`, or `muon`: Muon for the weights of linear layers and convolutions.
        never_matrices: parameters that Muon must not take, such as embeddings and input and output layers.
        recordable: learning rates are tensors beside the parameters, so that an update recorded as a CUDA graph follows
            them; `adamw` only.
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
