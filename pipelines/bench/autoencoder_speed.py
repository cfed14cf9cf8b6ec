"""Benchmarks of the autoencoder: encoding and decoding, compared to the same network run as the public code runs it."""

import copy
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from pipelines.bench.measurement import Measurement
from pipelines.bench.workbench import Workbench
from pipelines.encoding.chunk_encoder import GPU_ENCODERS
from pipelines.runtime.context import image_memory_format
from stage1_autoencoder.autoencoder import Autoencoder, image_to_unit
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.frame_encoder import FrameEncoder, Precision, exact_kernels
from stage1_autoencoder.views import ViewTransform
from stage1_autoencoder.vqgan import VQGAN, AttnBlock, ResnetBlock

PLAIN_BATCH = {"cpu": 4, "cuda": 64}  # the fastest power of two where it was measured


def autoencoder_measurements(bench: Workbench) -> Iterator[Measurement]:
    """Measure the configuration's VQGAN; no row for other families."""
    autoencoder, device = random_autoencoder(bench), bench.device
    if not isinstance(autoencoder, VQGAN):
        return
    frame_size = bench.config.dataset.frame_size
    plain = plain_twin(autoencoder)
    # Whole batches for both, and equally many for each thread.
    batch, threads = PLAIN_BATCH[device.type], encoder_threads(bench)
    frames = math.lcm(batch, FrameEncoder(autoencoder, device, frame_size).frames * threads)
    images = np.random.default_rng(0).integers(0, 256, (frames, *frame_size, 3), np.uint8)
    for precision, at_least in (("fp32", 1.3), ("bf16", None)):
        with exact_kernels(precision):
            encoder = FrameEncoder(autoencoder, device, frame_size, precision=precision)
            ours, reference = bench.in_turn(
                lambda encoder=encoder: encode_frames(encoder, images, threads),
                lambda precision=precision: _encode_plainly(plain, images, precision),
            )
        yield _measurement(f"encode, {precision}", frames, ours, reference, at_least)
    latents = torch.randn(frames, *bench.latent_shape)
    decoder = autoencoder.to(memory_format=image_memory_format(device))
    with exact_kernels():
        ours, reference = bench.in_turn(
            lambda: _decode(decoder, latents, device),
            lambda: _decode(plain, latents, device),
        )
    yield _measurement("decode, fp32", frames, ours, reference, None)


def random_autoencoder(bench: Workbench) -> Autoencoder:
    """The configuration's autoencoder at random weights: speed does not depend on them."""
    torch.manual_seed(0)
    return build_autoencoder(bench.config.autoencoder.model).to(bench.device).eval().requires_grad_(False)


def encoder_threads(bench: Workbench) -> int:
    """Threads that encode at the same time."""
    return bench.cores if bench.device.type == "cpu" else GPU_ENCODERS


def encode_frames(encoder: FrameEncoder, images: np.ndarray, threads: int) -> None:
    """Encode images [n, h, w, 3] as the command `encode` does: single-threaded computing in several threads."""
    before, size = torch.get_num_threads(), encoder.frames

    def encode(start: int) -> None:
        part = images[start : start + size]
        encoded = encoder.encode(part, [ViewTransform()] * len(part))
        encoded.latents.cpu(), encoded.codes.cpu()

    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(encode, range(0, len(images), size)))
    torch.set_num_threads(before)


def _measurement(what: str, frames: int, ours: float, reference: float, at_least: float | None) -> Measurement:
    words = f"the same network, plain: {frames / reference:.1f} frames/s"
    return Measurement(f"autoencoder: {what}", frames / ours, "frames/s", words, reference / ours, at_least=at_least)


@torch.no_grad()
def _encode_plainly(plain: VQGAN, images: np.ndarray, precision: Precision) -> None:
    device = plain.quantizer.codebook.device
    for part in torch.from_numpy(images).split(PLAIN_BATCH[device.type]):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            latents = plain.encode(image_to_unit(part.to(device)))
        latents = latents.float()
        latents.cpu(), plain.quantizer.nearest(latents).cpu()


@torch.no_grad()
def _decode(autoencoder: VQGAN, latents: Tensor, device: torch.device) -> None:
    for part in latents.split(PLAIN_BATCH[device.type]):
        autoencoder.decode(part.to(device)).cpu()


def plain_twin(model: VQGAN) -> VQGAN:
    """A copy whose blocks compute as the public code's: swish and attention of basic operations, nothing in place."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, ResnetBlock):
            module.__class__ = PlainBlock
        elif isinstance(module, AttnBlock):
            module.__class__ = PlainAttention
    return twin


class PlainBlock(ResnetBlock):
    """The same block in the public code's operations."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        h = self.conv1(h * torch.sigmoid(h))
        h = self.norm2(h)
        h = self.conv2(self.dropout(h * torch.sigmoid(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class PlainAttention(AttnBlock):
    """The same attention as two matrix products and a softmax."""

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q = rearrange(self.q(normed), "b c h w -> b (h w) c")
        k, v = (rearrange(layer(normed), "b c h w -> b c (h w)") for layer in (self.k, self.v))
        weights = torch.softmax(torch.bmm(q, k) * q.shape[2] ** -0.5, 2)
        attended = torch.bmm(v, rearrange(weights, "b query key -> b key query"))
        return x + self.proj_out(rearrange(attended, "b c (h w) -> b c h w", h=x.shape[2]))
