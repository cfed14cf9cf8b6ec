"""The interface of both families of autoencoders, and the images they take."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from stage1_autoencoder.config import VQGANConfig, VQVAEConfig
from stage1_autoencoder.quantizer import VectorQuantizer

# Images that were resized or converted may leave [-1, 1] by a rounding error.
RANGE_SLACK = 1e-3


@dataclass(frozen=True)
class Reconstruction:
    """The result of one pass through the autoencoder.

    Attributes:
        images: [b, 3, h, w], about [-1, 1], not clamped.
        latents: [b, c, h / f, w / f] before quantization.
        codes: [b, h / f, w / f] int64.
        codebook_loss, commitment_loss: scalars, see `Quantized`.
    """

    images: Tensor
    latents: Tensor
    codes: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


class Autoencoder(nn.Module, ABC):
    """Autoencoder with a quantized bottleneck. RIVER's flow lives on the latents *before* quantization.

    A family defines `encoder` and `decoder`, and how they are put together.
    """

    encoder: nn.Module
    decoder: nn.Module
    quantizer: VectorQuantizer

    def __init__(self, config: VQGANConfig | VQVAEConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def to_latents(self, images: Tensor) -> Tensor:
        """Like `encode`, without checks of the images, and before any normalization of the latents."""

    @abstractmethod
    def to_features(self, quantized: Tensor) -> Tensor:
        """Map latents [b, c, h, w] to the input of `to_images`: the decoder without its last convolution."""

    @abstractmethod
    def to_images(self, features: Tensor) -> Tensor:
        """Map features to images [b, 3, h f, w f] by `last_layer`."""

    @property
    @abstractmethod
    def last_layer(self) -> nn.Conv2d:
        """The convolution whose output is the image: adversarial training compares gradients there."""

    @abstractmethod
    def boundary_parameters(self) -> list[nn.Parameter]:
        """The codebook and the layers from or to few channels, which an optimizer for hidden matrices skips."""

    def compile_networks(self) -> None:
        """Compile encoder and decoder, without `last_layer`, at their next call."""
        self.encoder.compile()
        self.decoder.compile()

    @property
    def downsampling(self) -> int:
        """Pixels per latent position, along each side."""
        return self.config.downsampling

    @property
    def parameter_count(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def encode(self, images: Tensor) -> Tensor:
        """Map images to pre-quantization latents.

        Args:
            images: [b, 3, h, w] float in [-1, 1]; h and w multiples of `self.downsampling`.
        Returns:
            [b, c, h / f, w / f] float latents, before the nearest-code lookup.
        Raises:
            ValueError: not three channels, sides that `f` does not divide, integers, or values out of range.
        """
        check_image_shape(images, self.downsampling)
        check_image_range(images)
        return self._latents(images)

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Move latents [b, c, h, w] to their nearest codes: (values [b, c, h, w], codes [b, h, w] int64)."""
        codes = self.quantizer.nearest(latents)
        return self.embed(codes), codes

    def embed(self, codes: Tensor) -> Tensor:
        """The vectors [b, c, h, w] of codes [b, h, w] int64."""
        return self.quantizer.embed(codes)

    def decode(self, latents: Tensor) -> Tensor:
        """Quantize latents [b, c, h, w] and map them to images [b, 3, h f, w f], about [-1, 1], not clamped."""
        return self.decode_quantized(self.quantize(latents)[0])

    def decode_quantized(self, quantized: Tensor) -> Tensor:
        """Map latents [b, c, h, w] to images without the nearest-code lookup."""
        return self.to_images(self.to_features(quantized))

    def forward(self, images: Tensor) -> Reconstruction:
        """Encode, quantize and decode, for training. Checks the shape of the images, but not their values."""
        check_image_shape(images, self.downsampling)
        latents = self._latents(images)
        quantized = self.quantizer(latents)
        return Reconstruction(
            images=self.decode_quantized(quantized.latents),
            latents=latents,
            codes=quantized.codes,
            codebook_loss=quantized.codebook_loss,
            commitment_loss=quantized.commitment_loss,
        )

    def _latents(self, images: Tensor) -> Tensor:
        latents = self.to_latents(images)
        return F.normalize(latents, dim=1) if self.config.normalize_codes else latents


def check_image_shape(images: Tensor, downsampling: int) -> None:
    """Check that an autoencoder can take a batch of images.

    Raises:
        ValueError: not [b, 3, h, w], integers, or sides that `downsampling` does not divide.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [b, 3, h, w], not {list(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floats in [-1, 1], not {images.dtype}: convert uint8 with x / 127.5 - 1")
    if images.shape[2] % downsampling or images.shape[3] % downsampling:
        raise ValueError(
            f"cannot encode images of {images.shape[2]}x{images.shape[3]}: both sides must be multiples of the "
            f"autoencoder's down-sampling factor {downsampling}"
        )


def check_image_range(images: Tensor) -> None:
    """Check that images lie in [-1, 1]; synchronizes with the device.

    Raises:
        ValueError: they do not.
    """
    if not images.numel():
        return
    low, high = torch.aminmax(images.detach())
    # Negated, so that NaN fails too.
    if not (low >= -1 - RANGE_SLACK and high <= 1 + RANGE_SLACK):
        raise ValueError(
            f"images must lie in [-1, 1], these reach from {low.item():.3g} to {high.item():.3g}; convert uint8 frames "
            "with x / 127.5 - 1"
        )


def image_to_unit(images: Tensor) -> Tensor:
    """Convert uint8 [..., h, w, 3] to float [..., 3, h, w] in [-1, 1] (x / 127.5 - 1)."""
    return rearrange(images, "... h w c -> ... c h w").to(torch.float32).div(127.5).sub(1.0)
