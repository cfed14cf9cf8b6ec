"""A model while it is trained: its optimizers, its averaged copy, one update, and what resuming needs of them."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipelines.runtime.checkpoints import Checkpoint, Tensors, pack_optimizers, unpack_optimizers
from pipelines.runtime.optimizers import build_optimizers, set_learning_rate
from stage1_autoencoder.config import AutoencoderTrainingConfig
from stage2_flow.config import FlowTrainingConfig


class Learner:
    """Updates a model by its losses.

    Attributes:
        model: what is trained.
        learning_rate: of the last update (of AdamW; Muon's has the same course).
    """

    def __init__(
        self,
        model: nn.Module,
        settings: AutoencoderTrainingConfig | FlowTrainingConfig,
        never_matrices: list[nn.Parameter],
    ) -> None:
        """Make optimizers and average.

        Args:
            model: on its device already.
            settings: optimizer, learning rates, betas, weight decay, clipping, EMA decay.
            never_matrices: parameters that Muon leaves to AdamW.
        """
        self.model, self.settings = model, settings
        self.optimizers = build_optimizers(
            model,
            name=settings.optimizer,
            learning_rate=settings.learning_rate,
            muon_learning_rate=settings.muon_learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            never_matrices=never_matrices,
        )
        decay = settings.ema_decay
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None
        self.learning_rate = 0.0

    @property
    def best_model(self) -> nn.Module:
        """What the training delivers: the averaged model where there is one."""
        return self.model if self.average is None else self.average.module

    def update(self, loss: Tensor, factor: float) -> None:
        """One update by a scalar loss, with `factor` of the full learning rates; does not wait for the device."""
        set_learning_rate(self.optimizers, factor)
        self.learning_rate = self.settings.learning_rate * factor
        loss.backward()
        if self.settings.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)

    def files(self) -> dict[str, Tensors]:
        """The files of a checkpoint."""
        files = {"model": self.model.state_dict(), "optimizer": pack_optimizers(self.optimizers)}
        if self.average is not None:
            files["ema"] = self.average.module.state_dict()
            files["average"] = {"n_averaged": self.average.n_averaged}
        return files

    def load(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Go on from a checkpoint of the same configuration."""
        self.model.load_state_dict(checkpoint.tensors("model", device))
        unpack_optimizers(self.optimizers, checkpoint.tensors("optimizer", device))
        if self.average is not None:
            self.average.module.load_state_dict(checkpoint.tensors("ema", device))
            self.average.n_averaged.copy_(checkpoint.tensors("average", device)["n_averaged"])
