"""The discriminator (taming-transformers' PatchGAN): its network, its losses, and warnings about its training."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stage1_autoencoder.config import AdversarialConfig

# The adaptive ratio of gradient norms, as in taming.
SMALL_GRADIENT = 1e-4
LARGEST_RATIO = 1e4


class PatchDiscriminator(nn.Module):
    """Convolutions with BatchNorm, and one logit per patch of an image (Isola et al. 2017).

    Modules have the official names (`main.0`, ...). The default has 2 765 633 parameters and patches of 70 pixels.
    """

    def __init__(self, filters: int = 64, layers: int = 3) -> None:
        """Build the network.

        Args:
            filters: channels after the first convolution; each layer doubles them, up to 8 times.
            layers: number of convolutions that halve the side.
        """
        super().__init__()
        self.layers = layers
        modules: list[nn.Module] = [nn.Conv2d(3, filters, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        width = filters
        for layer in range(1, layers + 1):
            before, width = width, filters * min(2**layer, 8)
            # Without bias: BatchNorm has one.
            modules.append(nn.Conv2d(before, width, 4, 2 if layer < layers else 1, 1, bias=False))
            modules += [nn.BatchNorm2d(width), nn.LeakyReLU(0.2, inplace=True)]
        self.main = nn.Sequential(*modules, nn.Conv2d(width, 1, 4, 1, 1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    @property
    def smallest_side(self) -> int:
        """Smallest side of an image in pixels: the map is halved `layers` times and then loses 1 twice."""
        return AdversarialConfig(layers=self.layers).smallest_side

    def forward(self, images: Tensor) -> Tensor:
        """Map images [b, 3, h, w] in [-1, 1] to logits.

        Returns:
            [b, 1, h / 2^layers - 2, w / 2^layers - 2] logits, large for real images.
        Raises:
            ValueError: not three channels, or a side below `smallest_side`.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < self.smallest_side:
            raise ValueError(
                f"a discriminator of {self.layers} layers cannot take images of shape {list(images.shape)}: expected "
                f"[b, 3, h, w] with both sides at least {self.smallest_side}; lower "
                "autoencoder.training.adversarial.layers, or train on larger frames"
            )
        return self.main(images)


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's loss: 1/2 (mean max(0, 1 - real) + mean max(0, 1 + fake)), reduced in fp32."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """The autoencoder's adversarial loss: -mean of the logits of reconstructions, reduced in fp32."""
    return -fake_logits.float().mean()


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """The ratio of gradient norms that balances both terms at one layer (Esser et al. 2021, Eq. 7).

    Args:
        reconstruction_gradient, adversarial_gradient: of the two terms at the decoder's last layer, of equal shape.
    Returns:
        detached fp32 scalar in [0, 1e4].
    """
    ours, theirs = (
        torch.linalg.vector_norm(gradient.detach().float())
        for gradient in (reconstruction_gradient, adversarial_gradient)
    )
    return (ours / (theirs + SMALL_GRADIENT)).clamp(0.0, LARGEST_RATIO)


def adversarial_weight(step: int, config: AdversarialConfig) -> float:
    """Weight of the adversarial term at a step counted from 0: 0 until `start`, `weight` from `start + warm_in` on."""
    if step < config.start:
        return 0.0
    return config.weight * min(1.0, (step - config.start) / config.warm_in) if config.warm_in else config.weight


class DiscriminatorWatch:
    """Warns, from logged metrics, when the discriminator degrades reconstructions, as is common at its start."""

    # Decay of the running level before the start.
    DECAY = 0.8
    RISE = 1.25
    RISE_UPDATES = 5
    WIN_UPDATES = 20

    def __init__(self) -> None:
        self.level: float | None = None
        self.rise, self.win = _Alarm(self.RISE_UPDATES), _Alarm(self.WIN_UPDATES)

    def update(self, step: int, reconstruction: float, real: float, fake: float, weight: float) -> str | None:
        """Take the metrics of one step.

        Args:
            step: for the message.
            reconstruction: the perceptual term (L1 if there is none), without its weight.
            real, fake: mean logits of images and reconstructions; ignored while `weight` is 0.
            weight: of the adversarial term, see `adversarial_weight`. Updates with weight 0 set the reference level.
        Returns:
            a warning, or None. A warning is repeated only after as many good updates.
        """
        if not weight:
            kept = reconstruction if self.level is None else self.level
            self.level = self.DECAY * kept + (1 - self.DECAY) * reconstruction
            return None
        warnings = []
        if self.level is not None and self.rise.update(reconstruction > self.RISE * self.level):
            warnings.append(
                f"the reconstruction term was too high {self.RISE_UPDATES} times in a row, now {reconstruction:.3g}: "
                f"{reconstruction / self.level - 1:.0%} above {self.level:.3g}, its level before the start"
            )
        if self.win.update(real > 1 and fake < -1):
            warnings.append(
                "the discriminator separated reconstructions from images easily "
                f"{self.WIN_UPDATES} times in a row (mean logits {fake:.2g} and {real:.2g})"
            )
        if not warnings:
            return None
        return (
            f"autoencoder: step {step}: {'; '.join(warnings)}. If this persists, restart from an earlier checkpoint or "
            "from scratch with a later autoencoder.training.adversarial.start, a smaller weight, or a longer warm_in"
        )

    def state(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {"level": self.level, "rise": self.rise.state(), "win": self.win.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of `state`."""
        self.level = state["level"]
        self.rise.load_state(state["rise"])
        self.win.load_state(state["win"])


class _Alarm:
    """Goes off after a number of bad updates in a row, and is armed again after as many good ones."""

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self.raised, self.against = False, 0

    def update(self, bad: bool) -> bool:
        """Whether the alarm goes off at this update."""
        self.against = self.against + 1 if bad != self.raised else 0
        if self.against < self.updates:
            return False
        self.raised, self.against = not self.raised, 0
        return self.raised

    def state(self) -> dict[str, Any]:
        return {"raised": self.raised, "against": self.against}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.raised, self.against = state["raised"], state["against"]
