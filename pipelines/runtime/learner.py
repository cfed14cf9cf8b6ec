"""A model while it is trained: its optimizers, its averaged copy, one update, and what resuming needs of them."""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipelines.runtime.checkpoints import Checkpoint, Tensors, pack_optimizers, unpack_optimizers
from pipelines.runtime.optimizers import build_optimizers, set_learning_rate


class OptimizerSettings(Protocol):
    """What a training's settings say about updates."""

    optimizer: str
    learning_rate: float
    muon_learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    grad_clip: float | None
    ema_decay: float | None


class Learner:
    """Updates a model by its gradients.

    Attributes:
        model: what is trained.
        learning_rate: of the last update (of AdamW; Muon's has the same course).
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
        """Make optimizers and average.

        Args:
            model: on its device already.
            never_matrices: parameters that Muon leaves to AdamW.
            name: of the file with the weights; others than `model` are in the names of the other files, too.
            recordable: updates may be recorded as a CUDA graph; with AdamW only.
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
        """What the training delivers: the averaged model where there is one."""
        return self.model if self.average is None else self.average.module

    def update(self, loss: Tensor, factor: float) -> Tensor:
        """One update by a scalar loss; see `apply`."""
        loss.backward()
        return self.apply(factor)

    def apply(self, factor: float) -> Tensor:
        """One update by the gradients that are there, with `factor` of the full learning rates; see `step`."""
        self.set_rate(factor)
        return self.step()

    def set_rate(self, factor: float) -> None:
        """Take `factor` of the full learning rates from here on."""
        set_learning_rate(self.optimizers, factor)
        self.learning_rate = self.settings.learning_rate * factor

    def step(self) -> Tensor:
        """One update by the gradients that are there.

        With gradients that are not finite nothing is updated (on a GPU the average still moves towards the weights).
        Only Muon on a GPU makes the host wait to know.

        Returns:
            Scalar bool on the device: whether the gradients were finite.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        finite = norm.isfinite()
        on_device = finite.is_cuda and all(isinstance(o, torch.optim.AdamW) for o in self.optimizers)
        skipping = self.recordable or on_device
        if skipping:
            # Fused AdamW looks at this flag on the device, as it does for gradient scaling.
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
        """Go on from a checkpoint of the same configuration."""
        prefix = "" if self.name == "model" else f"{self.name}_"
        self.model.load_state_dict(checkpoint.tensors(self.name, device))
        unpack_optimizers(self.optimizers, checkpoint.tensors(f"{prefix}optimizer", device))
        if self.average is not None:
            self.average.module.load_state_dict(checkpoint.tensors(f"{prefix}ema", device))
            self.average.n_averaged.copy_(checkpoint.tensors(f"{prefix}average", device)["n_averaged"])
