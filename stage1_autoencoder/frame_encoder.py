"""Frames to latents, with the same bits whenever and in whatever company a frame is encoded.

Kernels for other shapes, and for other numbers of threads, add in other orders. So the network sees batches of one
fixed shape; whoever calls it on a CPU does so from threads that compute alone (`torch.set_num_threads(1)`).
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from stage1_autoencoder.autoencoder import Autoencoder, image_to_unit
from stage1_autoencoder.quantizer import Rounded
from stage1_autoencoder.views import ViewTransform, apply_views

Network = TypeVar("Network", bound=nn.Module)


class PackedConv2d(nn.Module):
    """As an `nn.Conv2d` whose weights stay what they are, for float32 or bfloat16 inputs of one shape on a CPU.

    The layout is chosen at the first call, for its input's shape and the number of threads of its caller.
    """

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._layer = [layer]  # not a module of ours: its weights are not
        self._arguments = (layer.padding, layer.stride, layer.dilation, layer.groups)
        self._packed: tuple[Tensor, Tensor | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self._packed is None:  # two threads that come here at once do the same
            (layer,) = self._layer
            weight = torch.ops.mkldnn._reorder_convolution_weight(
                layer.weight.detach().to(self.dtype), *self._arguments, list(x.shape)
            )
            self._packed = weight, None if layer.bias is None else layer.bias.detach().to(self.dtype)
        return torch.ops.mkldnn._convolution_pointwise(x, *self._packed, *self._arguments, "none", [], "")


def can_pack(dtype: torch.dtype) -> bool:
    """Whether torch was built with oneDNN, and it computes in `dtype` on this processor."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")):
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def with_packed_convolutions(network: Network, dtype: torch.dtype, shared: Iterable[nn.Module]) -> Network:
    """A copy of a network on the CPU for inference alone, with packed convolutions.

    Args:
        dtype: float32 or bfloat16, see `can_pack`.
        shared: parts that the copy has in common with the network, and that stay as they are.
    """
    parts = {id(part): part for part in shared}
    packed = {
        id(module): PackedConv2d(module, dtype)
        for module in network.modules()
        if type(module) is nn.Conv2d and module.padding_mode == "zeros"
    }
    # What `deepcopy` has copied already, it takes from here: the shared parts whole, with their convolutions.
    return copy.deepcopy(network, {**packed, **parts})


# Pixels that the network sees at once: a CPU is fastest while they stay in its cache, a GPU when there are many.
PASS_PIXELS = {"cpu": 2**16, "cuda": 2**19}
# And bytes of a feature map of the first level, on a CPU.
PASS_BYTES = 2**23
# Feature maps of the first level that are alive at once while the network encodes.
LIVE_FEATURE_MAPS = 6

Precision = Literal["fp32", "tf32", "bf16"]


@contextmanager
def exact_kernels(precision: Precision = "fp32") -> Iterator[None]:
    """Let CUDA choose the same kernels for the same shapes, and multiply in TF32 only if asked. For all threads.

    TF32 costs as many digits as storing latents in fp16 does.
    """
    before, tf32 = torch.get_float32_matmul_precision(), precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


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

    Args:
        autoencoder: on `device`; its weights must not change from now on.
        image_size: side of the frames.
        precision: fp32; tf32: the same, and `exact_kernels` lets CUDA multiply so; bf16: convolutions and attention in
            bf16, latents in float32 all the same.
        compile: have the encoder compiled at its first batch.
        frames: of a batch; by default chosen by the pictures' size, the network's width, and the kind of device.

    Attributes:
        frames: of a batch.
        memory: bytes that one batch takes while it is encoded, about.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        device: torch.device,
        image_size: int,
        *,
        precision: Precision = "fp32",
        compile: bool = False,
        frames: int | None = None,
    ) -> None:
        # Faster than the contiguous layout: by 20 % on the CPU where it was measured.
        self.autoencoder, self.device = autoencoder.to(memory_format=torch.channels_last), device
        self.half = precision == "bf16"
        self.network = _for_inference(self.autoencoder, device, torch.bfloat16 if self.half else torch.float32, compile)
        feature_map = 4 * autoencoder.config.full_resolution_channels * image_size**2
        if frames is None:
            frames = PASS_PIXELS[device.type] // image_size**2
            if device.type == "cpu":
                frames = min(frames, PASS_BYTES // feature_map)
        self.frames = max(1, frames)
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
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            latents = self.network.encode(images.contiguous(memory_format=torch.channels_last))
        latents = latents.float()
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


def _for_inference(autoencoder: Autoencoder, device: torch.device, dtype: torch.dtype, compile: bool) -> Autoencoder:
    """The autoencoder, or a copy of its encoder that is faster; codes and decoder stay those of the autoencoder."""
    shared = [autoencoder.decoder, autoencoder.quantizer]
    if compile:
        network = copy.deepcopy(autoencoder, {id(part): part for part in shared})
        # Freezing packs the kernels as below. It takes the weights for constants, so the copy is for this alone.
        options = {"freezing": True} if device.type == "cpu" else None
        network.encoder.compile(dynamic=False, options=options)
        return network
    if device.type == "cpu" and can_pack(dtype):
        return with_packed_convolutions(autoencoder, dtype, shared)
    return autoencoder
