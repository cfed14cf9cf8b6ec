"""Encoding frames to latents, bitwise reproducible: the latent of a frame does not depend on the rest of its batch.

Kernels add in different orders for different shapes and numbers of threads. So all batches have one fixed shape, and
callers on a CPU use threads that compute alone (`torch.set_num_threads(1)`).
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stage1_autoencoder.autoencoder import Autoencoder, image_to_unit
from stage1_autoencoder.packing import can_pack, with_packed_convolutions
from stage1_autoencoder.precision import float32_products
from stage1_autoencoder.quantizer import Rounded
from stage1_autoencoder.views import ViewTransform, apply_views

# Pixels per batch: a CPU is fastest while they fit into its cache, a GPU with many.
PASS_PIXELS = {"cpu": 2**16, "cuda": 2**19}
# On a CPU also: bytes of a feature map of the first level.
PASS_BYTES = 2**23
# Feature maps of the first level in memory at the same time.
LIVE_FEATURE_MAPS = 6

Precision = Literal["fp32", "tf32", "bf16"]


@contextmanager
def exact_kernels(precision: Precision = "fp32") -> Iterator[None]:
    """Make CUDA kernels a function of the shapes, with TF32 only if `precision` says so. Affects all threads.

    TF32 loses as many digits as storing latents in fp16. It is for convolutions alone: nearest codes need full matrix
    products, and threads cannot have different settings. Kernels are not chosen by measuring (`cudnn.benchmark`): the
    same frames would get other bits in another process.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    with float32_products(matrices=True, convolutions=precision != "tf32"):
        cudnn.benchmark, cudnn.deterministic = False, True
        try:
            yield
        finally:
            cudnn.benchmark, cudnn.deterministic = before


@dataclass(frozen=True)
class EncodedFrames:
    """A batch of the network's inputs and outputs; rows beyond those of the caller are padding.

    Attributes:
        images: [b, 3, h, w] float32 in [-1, 1], views applied.
        latents: [b, c, h / f, w / f] float32, pre-quantization.
        codes: [b, h / f, w / f] int64, the nearest code of each.
    """

    images: Tensor
    latents: Tensor
    codes: Tensor


class FrameEncoder:
    """An autoencoder that encodes batches of one shape, from many threads at once, inside `exact_kernels`.

    Args:
        autoencoder: on `device`; its weights must not change afterwards.
        frame_size: (h, w) of the frames.
        precision: fp32; tf32: the same here, but `exact_kernels` enables it for CUDA's convolutions; bf16:
            convolutions and attention in bf16, latents still in float32.
        compile: compile the encoder at its first batch.
        frames: batch size; by default chosen by the size of frames, width of the network, and type of device.

    Attributes:
        frames: batch size.
        memory: approximate bytes of the host's memory that encoding one batch takes.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        device: torch.device,
        frame_size: tuple[int, int],
        *,
        precision: Precision = "fp32",
        compile: bool = False,
        frames: int | None = None,
    ) -> None:
        # Faster than the contiguous layout: 20 % on a CPU.
        self.autoencoder, self.device = autoencoder.to(memory_format=torch.channels_last), device
        self.half = precision == "bf16"
        self.network = _for_inference(self.autoencoder, device, torch.bfloat16 if self.half else torch.float32, compile)
        feature_map = 4 * autoencoder.config.full_resolution_channels * math.prod(frame_size)
        if frames is None:
            frames = PASS_PIXELS[device.type] // math.prod(frame_size)
            if device.type == "cpu":
                frames = min(frames, PASS_BYTES // feature_map)
        self.frames = max(1, frames)
        # On a GPU feature maps are in its own memory, and the host has the bytes of the frames.
        each = LIVE_FEATURE_MAPS * feature_map if device.type == "cpu" else 3 * math.prod(frame_size)
        self.memory = each * self.frames

    @torch.inference_mode()
    def encode(self, frames: np.ndarray, views: Sequence[ViewTransform]) -> EncodedFrames:
        """Encode up to `self.frames` frames.

        Args:
            frames: [n, h, w, 3] uint8 RGB.
            views: [n] transforms that are applied first.
        Returns:
            `self.frames` rows, of which the first n are results.
        """
        count = len(frames)
        assert 0 < count <= self.frames, (count, self.frames)
        filled = torch.from_numpy(frames)[torch.arange(self.frames).clamp(max=count - 1)]
        views = [*views, *[views[-1]] * (self.frames - count)]
        images = apply_views(image_to_unit(filled.to(self.device)), views)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            latents = self.network.encode(images.contiguous(memory_format=torch.channels_last))
        latents = latents.float()
        return EncodedFrames(images, latents, self.autoencoder.quantizer.nearest(latents))

    @torch.inference_mode()
    def rounded(self, encoded: EncodedFrames, dtype: torch.dtype) -> Rounded:
        """The latents in the dtype of the store, with unchanged nearest codes."""
        return self.autoencoder.quantizer.rounded(encoded.latents, encoded.codes, dtype)

    @torch.inference_mode()
    def preview(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Images [b, 3, h, w] in [-1, 1] made small by averaging areas: [b, y, x, 3] uint8 of size (y, x)."""
        small = torch.nn.functional.adaptive_avg_pool2d(images.clamp(-1, 1), size)
        return ((small + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)

    @torch.inference_mode()
    def round_trip_psnr(self, image: Tensor, latent: Tensor) -> float:
        """PSNR in dB of the decoded latent [c, h, w] against its image [3, h, w] in [-1, 1]; at most 100."""
        decoded = self.autoencoder.decode(latent[None])[0].clamp(-1, 1)
        error = ((decoded - image) / 2).square().mean().item()
        return -10 * math.log10(max(error, 1e-10))


def _for_inference(autoencoder: Autoencoder, device: torch.device, dtype: torch.dtype, compile: bool) -> Autoencoder:
    """The autoencoder, or a faster copy that shares its quantizer and decoder."""
    shared = [autoencoder.decoder, autoencoder.quantizer]
    if compile:
        network = copy.deepcopy(autoencoder, {id(part): part for part in shared})
        # Freezing packs the kernels as below. It makes the weights constants, so it needs a copy.
        options = {"freezing": True} if device.type == "cpu" else None
        network.encoder.compile(dynamic=False, options=options)
        return network
    if device.type == "cpu" and can_pack(dtype):
        return with_packed_convolutions(autoencoder, dtype, shared)
    return autoencoder
