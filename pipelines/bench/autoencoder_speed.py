"""Benchmarks of the autoencoder: encoding and decoding against the same network run as the public code runs it."""

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.bench.measurement import Measurement, in_turn
from pipelines.config import RiverConfig
from pipelines.encoding.chunk_encoder import GPU_ENCODERS
from pipelines.runtime.context import image_memory_format
from stage1_autoencoder.autoencoder import Autoencoder, image_to_unit
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.frame_encoder import FrameEncoder, Precision, exact_kernels
from stage1_autoencoder.views import ViewTransform
from stage1_autoencoder.vqgan import VQGAN, AttnBlock, ResnetBlock

PLAIN_BATCH = {"cpu": 4, "cuda": 64}  # the fastest of powers of two, where it was measured
SECONDS = 1.0  # that a measurement takes, about
REPEATS = 3


def autoencoder_measurements(config: RiverConfig, device: torch.device) -> Iterator[Measurement]:
    """Measure the configuration's autoencoder at random weights; nothing for other families than the VQGAN."""
    torch.manual_seed(0)
    autoencoder = build_autoencoder(config.autoencoder.model).to(device).eval().requires_grad_(False)
    if not isinstance(autoencoder, VQGAN):
        return
    side = config.dataset.image_size
    # The plain one shares the weights, and so does everything else: `FrameEncoder` changes the layout of its own.
    plain = build_autoencoder(config.autoencoder.model).to(device).eval().requires_grad_(False)
    plain.load_state_dict(autoencoder.state_dict())
    frames = _affordable_frames(plain, device, side, FrameEncoder(autoencoder, device, side).frames)
    images = np.random.default_rng(0).integers(0, 256, (frames, side, side, 3), np.uint8)
    for precision, wanted in (("fp32", 1.3), ("bf16", None)):
        with exact_kernels(precision):
            encoder = FrameEncoder(autoencoder, device, side, precision=precision)
            ours, reference = in_turn(
                lambda encoder=encoder: _encode(encoder, images),
                lambda precision=precision: _encode_plainly(plain, images, device, precision),
                repeats=REPEATS,
            )
        yield _measurement(f"encode, {precision}", frames, ours, reference, wanted)
    latents = torch.randn(frames, autoencoder.config.latent_channels, *[side // autoencoder.downsampling] * 2)
    decoder = autoencoder.to(memory_format=image_memory_format(device))
    with exact_kernels():
        ours, reference = in_turn(
            lambda: _decode(decoder.decode, latents, device),
            lambda: _decode(lambda part: plain_decode(plain, part), latents, device),
            repeats=REPEATS,
        )
    yield _measurement("decode, fp32", frames, ours, reference, None)


def _measurement(what: str, frames: int, ours: float, reference: float, wanted: float | None) -> Measurement:
    words = f"the same network, plainly: {frames / reference:.1f}/s"
    return Measurement(f"autoencoder: {what}", frames / ours, "frames/s", words, reference / ours, at_least=wanted)


def _affordable_frames(plain: VQGAN, device: torch.device, side: int, encoder_batch: int) -> int:
    """As many as take about as long as one measurement should, in whole batches, and equally many for each thread."""
    batch = PLAIN_BATCH[device.type]
    few = np.zeros((batch, side, side, 3), np.uint8)
    seconds = min(in_turn(lambda: _encode_plainly(plain, few, device, "fp32"), repeats=2))
    unit = math.lcm(batch, encoder_batch * _threads(device))
    return unit * max(1, round(SECONDS / seconds * batch / unit))


def _threads(device: torch.device) -> int:
    """That encode at once."""
    return len(os.sched_getaffinity(0)) if device.type == "cpu" else GPU_ENCODERS


def _encode(encoder: FrameEncoder, images: np.ndarray) -> None:
    """As `encode` does: threads that compute alone, each with the batches that the encoder wants."""
    before = torch.get_num_threads()
    size = encoder.frames

    def encode(start: int) -> None:
        part = images[start : start + size]
        encoded = encoder.encode(part, [ViewTransform()] * len(part))
        encoded.latents.cpu(), encoded.codes.cpu()

    with ThreadPoolExecutor(_threads(encoder.device), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(encode, range(0, len(images), size)))
    torch.set_num_threads(before)


@torch.no_grad()
def _encode_plainly(plain: VQGAN, images: np.ndarray, device: torch.device, precision: Precision) -> None:
    for part in torch.from_numpy(images).split(PLAIN_BATCH[device.type]):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            latents = plain_encode(plain, image_to_unit(part.to(device)))
        latents = latents.float()
        latents.cpu(), plain_codes(plain, latents).cpu()


@torch.no_grad()
def _decode(decode: Callable[[Tensor], Tensor], latents: Tensor, device: torch.device) -> None:
    for part in latents.split(PLAIN_BATCH[device.type]):
        decode(part.to(device)).cpu()


def plain_encode(model: VQGAN, images: Tensor) -> Tensor:
    """Images [b, 3, h, w] to latents as the public code computes them, with a model's weights."""
    encoder = model.encoder
    x = encoder.conv_in(images)
    for level in encoder.down:
        x = _level(level, x)
        if hasattr(level, "downsample"):
            x = level.downsample.conv(F.pad(x, (0, 1, 0, 1)))
    return model.quant_conv(encoder.conv_out(_swish(encoder.norm_out(_middle(encoder.mid, x)))))


def plain_codes(model: Autoencoder, latents: Tensor) -> Tensor:
    """Nearest codes [n] of latents' vectors, from all their distances at once."""
    vectors, codebook = rearrange(latents, "b c h w -> (b h w) c"), model.quantizer.codebook
    squares = vectors.square().sum(1, keepdim=True) + codebook.square().sum(1)
    return torch.argmin(squares - 2 * vectors @ codebook.T, 1)


def plain_decode(model: VQGAN, latents: Tensor) -> Tensor:
    """Latents [b, c, h, w] to images, by way of their codes, as the public code computes them."""
    b, _, h, _ = latents.shape
    quantized = rearrange(
        model.quantizer.codebook[plain_codes(model, latents)], "(b h w) c -> b c h w", b=b, h=h
    ).contiguous()
    decoder = model.decoder
    x = _middle(decoder.mid, decoder.conv_in(model.post_quant_conv(quantized)))
    for level in reversed(decoder.up):
        x = _level(level, x)
        if hasattr(level, "upsample"):
            x = level.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    return decoder.conv_out(_swish(decoder.norm_out(x)))


def _level(level: nn.Module, x: Tensor) -> Tensor:
    for i, block in enumerate(level.block):
        x = _block(block, x)
        if level.attn:
            x = _attention(level.attn[i], x)
    return x


def _middle(middle: nn.Module, x: Tensor) -> Tensor:
    return _block(middle.block_2, _attention(middle.attn_1, _block(middle.block_1, x)))


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _block(block: ResnetBlock, x: Tensor) -> Tensor:
    h = block.conv1(_swish(block.norm1(x)))
    h = block.conv2(block.dropout(_swish(block.norm2(h))))
    return (block.nin_shortcut(x) if hasattr(block, "nin_shortcut") else x) + h


def _attention(block: AttnBlock, x: Tensor) -> Tensor:
    normed = block.norm(x)
    q = rearrange(block.q(normed), "b c h w -> b (h w) c")
    k, v = (rearrange(layer(normed), "b c h w -> b c (h w)") for layer in (block.k, block.v))
    weights = torch.softmax(torch.bmm(q, k) * q.shape[2] ** -0.5, 2)
    attended = torch.bmm(v, rearrange(weights, "b query key -> b key query"))
    return x + block.proj_out(rearrange(attended, "b c (h w) -> b c h w", h=x.shape[2]))
