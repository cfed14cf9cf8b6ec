"""The autoencoder's loss and its gradients in a training step, and the learning-rate schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stage1_autoencoder.autoencoder import Reconstruction
from stage1_autoencoder.config import AutoencoderTrainingConfig
from stage1_autoencoder.discriminator import adaptive_weight, generator_loss, hinge_loss


@dataclass(frozen=True)
class ReconstructionLoss:
    """The terms of the reconstruction loss; scalars.

    Attributes:
        total: their weighted sum.
        l1, l2: mean absolute and mean squared error in [-1, 1].
        perceptual: mean LPIPS or ST-LPIPS; None without a perceptual network.
    """

    total: Tensor
    l1: Tensor
    l2: Tensor
    perceptual: Tensor | None


def reconstruction_loss(
    reconstructed: Tensor, images: Tensor, config: AutoencoderTrainingConfig, perceptual: nn.Module | None = None
) -> ReconstructionLoss:
    """The weighted sum of L1, L2 and the perceptual distance, reduced in fp32.

    Args:
        reconstructed, images: [b, 3, h, w], about [-1, 1].
        perceptual: (images, truth) -> [b] distances.
    """
    reconstructed, images = reconstructed.float(), images.float()
    l1 = F.l1_loss(reconstructed, images)
    l2 = F.mse_loss(reconstructed, images)
    total = config.l1_weight * l1 + config.l2_weight * l2
    distance = None
    if perceptual is not None:
        distance = perceptual(reconstructed, images).float().mean()
        total = total + config.perceptual_weight * distance
    return ReconstructionLoss(total=total, l1=l1, l2=l2, perceptual=distance)


def codebook_loss(output: Reconstruction, config: AutoencoderTrainingConfig) -> Tensor:
    """Codebook term + beta * commitment term.

    Beta (`commitment`) weighs the term that moves the encoder, as in van den Oord et al. 2017, Eq. 3; in taming's
    "legacy" loss it weighs the other one.
    """
    return output.codebook_loss + config.commitment * output.commitment_loss


def backward(
    output: Reconstruction,
    images: Tensor,
    config: AutoencoderTrainingConfig,
    *,
    last_layer: nn.Parameter,
    perceptual: nn.Module | None = None,
    discriminator: nn.Module | None = None,
    adversarial_weight: float = 0.0,
    average: Callable[[Tensor], None] = lambda _: None,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Accumulate the gradients of the loss in the parameters (Esser et al. 2021, Eq. 6 and 7).

    The loss is reconstruction + codebook + w * adversarial_weight * adversarial, where w is the ratio of the gradients
    of reconstruction and adversarial term at the last layer. Gradients at the reconstructed images are computed first,
    so that there is one backward pass through the perceptual network and one through the discriminator, and the ratio
    costs only two convolutions.

    Args:
        output: result of the autoencoder.
        images: [b, 3, h, w] in [-1, 1].
        last_layer: the kernel of the convolution whose output is the images.
        perceptual: see `reconstruction_loss`.
        discriminator: images [b, 3, h, w] to logits; gets no gradients.
        adversarial_weight: 0 skips the discriminator.
        average: averages the gradients at the last layer over processes, in place.
        scale: factor of all gradients; one over the number of parts of a batch.
    Returns:
        scalar terms for the log; the gradients are those of `loss`.
    """
    reconstructed = output.images.detach().float().requires_grad_()
    reconstruction = reconstruction_loss(reconstructed, images, config, perceptual)
    (gradient,) = torch.autograd.grad(reconstruction.total, reconstructed)
    codebook = codebook_loss(output, config)
    terms = {
        "loss": reconstruction.total.detach() + config.codebook_weight * codebook.detach(),
        "l1": reconstruction.l1.detach(),
        "l2": reconstruction.l2.detach(),
        "codebook": codebook.detach(),
    }
    if reconstruction.perceptual is not None:
        terms["perceptual"] = reconstruction.perceptual.detach()
    if discriminator is not None and adversarial_weight > 0:
        adversarial = generator_loss(discriminator(reconstructed))
        (adversarial_gradient,) = torch.autograd.grad(adversarial, reconstructed)
        at_last_layer = []
        for part in (gradient, adversarial_gradient):
            (kernel,) = torch.autograd.grad(output.images, last_layer, part.to(output.images.dtype), retain_graph=True)
            kernel = kernel.float()
            average(kernel)
            at_last_layer.append(kernel)
        ratio = adaptive_weight(*at_last_layer)
        gradient = gradient + adversarial_weight * ratio * adversarial_gradient
        terms["loss"] = terms["loss"] + adversarial_weight * ratio * adversarial.detach()
        terms |= {"adversarial": adversarial.detach(), "adaptive_weight": ratio}
    torch.autograd.backward(
        [output.images, config.codebook_weight * codebook],
        [(scale * gradient).to(output.images.dtype), torch.full_like(codebook, scale)],
    )
    return terms


def learning_rate_factor(step: int, *, warmup: int, total: int) -> float:
    """Linear warm-up from 1/warmup, then half a cosine to 0 at `total`; `step` counts from 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


class DiscriminatorStep(nn.Module):
    """The discriminator's loss as one module, so that distributed training exchanges gradients once per step."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, images: Tensor, reconstructed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the loss of images and reconstructions, both [b, 3, h, w].

        Returns:
            scalars: the hinge loss, and the mean logits of images and of reconstructions.
        """
        real, fake = self.discriminator(images), self.discriminator(reconstructed.detach())
        return hinge_loss(real, fake), real.detach().float().mean(), fake.detach().float().mean()
