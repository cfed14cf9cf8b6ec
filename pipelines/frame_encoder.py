"""Frames to latents, with the same bits whenever and in whatever company a frame is encoded.

Kernels for other shapes, and for other numbers of threads, add in other orders. So the network sees batches of one
fixed shape; whoever calls it on a CPU does so from threads that compute alone (`torch.set_num_threads(1)`).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stage1_autoencoder.autoencoder import Autoencoder, image_to_unit
from stage1_autoencoder.quantizer import Rounded
from stage1_autoencoder.views import ViewTransform, apply_views

# Pixels that the network sees at once: a CPU is fastest while they stay in its cache, a GPU when there are many.
PASS_PIXELS = {"cpu": 2**16, "cuda": 2**19}
# Feature maps of the first level that are alive at once while the network encodes.
LIVE_FEATURE_MAPS = 6


@contextmanager
def exact_kernels() -> Iterator[None]:
    """Let CUDA choose the same kernels for the same shapes, and multiply in float32, not TF32. For all threads.

    TF32 would cost as many digits as storing latents in fp16 does.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@dataclass(frozen=True)
class EncodedFrames:
    """Frames as the network saw them, and what it made of them; rows beyond those that were given are padding.

    Attributes:
        images: [b, 3, h, w] float32 in [-1, 1], views applied.
        latents: [b, c, h / f, w / f] float32, pre-quantization.
        codes: [b, h / f, w / f] int64, the nearest code of each.
    """

    images: Tensor
    latents: Tensor
    codes: Tensor


class FrameEncoder:
    """An autoencoder that encodes batches of one shape. Used by many threads at once, inside `exact_kernels`.

    Attributes:
        frames: of a batch, chosen by the pictures' size and the kind of device.
        memory: bytes that one batch takes while it is encoded, about.
    """

    def __init__(self, autoencoder: Autoencoder, device: torch.device, image_size: int) -> None:
        # Faster than the contiguous layout: by 20 % on the CPU where it was measured.
        self.autoencoder, self.device = autoencoder.to(memory_format=torch.channels_last), device
        self.frames = max(1, PASS_PIXELS[device.type] // image_size**2)
        config = autoencoder.config
        feature_map = 4 * config.full_resolution_channels * image_size**2
        self.memory = LIVE_FEATURE_MAPS * feature_map * self.frames

    @torch.inference_mode()
    def encode(self, frames: np.ndarray, views: Sequence[ViewTransform]) -> EncodedFrames:
        """Encode up to `self.frames` frames.

        Args:
            frames: [n, h, w, 3] uint8 RGB.
            views: [n] what is done to each of them before.
        Returns:
            `self.frames` rows, of which the first n are meant.
        """
        count = len(frames)
        assert 0 < count <= self.frames, (count, self.frames)
        filled = torch.from_numpy(frames)[torch.arange(self.frames).clamp(max=count - 1)]
        views = [*views, *[views[-1]] * (self.frames - count)]
        images = apply_views(image_to_unit(filled.to(self.device)), views)
        latents = self.autoencoder.encode(images.contiguous(memory_format=torch.channels_last))
        return EncodedFrames(images, latents, self.autoencoder.quantizer.nearest(latents))

    @torch.inference_mode()
    def rounded(self, encoded: EncodedFrames, dtype: torch.dtype) -> Rounded:
        """The latents as they are stored: in the store's type, each with the nearest code that it had."""
        return self.autoencoder.quantizer.rounded(encoded.latents, encoded.codes, dtype)

    @torch.inference_mode()
    def round_trip_psnr(self, image: Tensor, latent: Tensor) -> float:
        """PSNR in dB of the decoded latent [c, h, w] against its image [3, h, w] in [-1, 1]; at most 100."""
        decoded = self.autoencoder.decode(latent[None])[0].clamp(-1, 1)
        error = ((decoded - image) / 2).square().mean().item()
        return -10 * math.log10(max(error, 1e-10))
