"""One training step of the autoencoder, and the care of its codebook."""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from stage1_autoencoder.autoencoder import Autoencoder, Reconstruction
from stage1_autoencoder.config import AutoencoderTrainingConfig


@dataclass(frozen=True)
class AutoencoderLoss:
    """Terms of the loss, each a scalar.

    Attributes:
        total: what is differentiated.
        l1, l2: mean absolute and mean squared error of the reconstruction in [-1, 1].
        codebook: codebook term + commitment * commitment term.
    """

    total: Tensor
    l1: Tensor
    l2: Tensor
    codebook: Tensor


def autoencoder_loss(output: Reconstruction, images: Tensor, config: AutoencoderTrainingConfig) -> AutoencoderLoss:
    """Reconstruction + codebook loss, reduced in fp32.

    Beta (`commitment`) stands on the term that moves the encoder, as in van den Oord et al. 2017, Eq. 3; taming's
    "legacy" loss has it on the other.

    Args:
        output: the pass through the autoencoder.
        images: [b, 3, h, w] in [-1, 1].
    """
    reconstructed, images = output.images.float(), images.float()
    l1 = F.l1_loss(reconstructed, images)
    l2 = F.mse_loss(reconstructed, images)
    codebook = output.codebook_loss + config.commitment * output.commitment_loss
    total = config.l1_weight * l1 + config.l2_weight * l2 + config.codebook_weight * codebook
    return AutoencoderLoss(total=total, l1=l1, l2=l2, codebook=codebook)


def learning_rate_factor(step: int, *, warmup: int, total: int) -> float:
    """Linear warm-up from 1/warmup, then half a cosine to 0 at `total`; `step` counts from 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


class CodebookCare:
    """Keeps codes in use: starts them on encoder outputs, and moves codes that nobody chose to where latents are.

    The counts are part of the training's state (`state`, `load_state`), not of the model.
    """

    def __init__(self, autoencoder: Autoencoder, restart_every: int) -> None:
        self.quantizer = autoencoder.quantizer
        self.restart_every = restart_every
        self.chosen = torch.zeros(
            self.quantizer.embedding.num_embeddings, device=self.quantizer.embedding.weight.device
        )

    @torch.no_grad()
    def start(self, latents: Tensor, generator: torch.Generator) -> None:
        """Put the codes on latent vectors [b, c, h, w] of the first batch, each with a little noise."""
        self.quantizer.embedding.weight.copy_(self._draw(latents, len(self.chosen), generator))

    @torch.no_grad()
    def after_step(self, step: int, output: Reconstruction, generator: torch.Generator) -> None:
        """Count the step's codes; every `restart_every` steps move the unused ones to latents of the batch."""
        self.chosen += torch.bincount(output.codes.flatten(), minlength=len(self.chosen))
        if self.restart_every and (step + 1) % self.restart_every == 0:
            fresh = self._draw(output.latents, len(self.chosen), generator)
            unused = (self.chosen == 0)[:, None]
            weight = self.quantizer.embedding.weight
            weight.copy_(torch.where(unused, fresh, weight))
            self.chosen.zero_()

    @staticmethod
    def _draw(latents: Tensor, count: int, generator: torch.Generator) -> Tensor:
        vectors = rearrange(latents.detach().float(), "b c h w -> (b h w) c")
        rows = torch.randint(len(vectors), (count,), generator=generator, device=vectors.device)
        noise = torch.randn(count, vectors.shape[1], generator=generator, device=vectors.device)
        return vectors[rows] + 0.01 * vectors.std(0, correction=0) * noise

    def state(self) -> dict[str, Tensor]:
        return {"chosen": self.chosen}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.chosen.copy_(state["chosen"])
