"""Benchmarks of the autoencoder: encoding and decoding, compared to the same network run as the public code runs it."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

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
    side = bench.config.dataset.image_size
    plain = random_autoencoder(bench)  # not shared: `FrameEncoder` changes the memory format of its own
    plain.load_state_dict(autoencoder.state_dict())
    # Whole batches for both, and equally many for each thread.
    batch, threads = PLAIN_BATCH[device.type], encoder_threads(bench)
    frames = math.lcm(batch, FrameEncoder(autoencoder, device, side).frames * threads)
    images = np.random.default_rng(0).integers(0, 256, (frames, side, side, 3), np.uint8)
    for precision, at_least in (("fp32", 1.3), ("bf16", None)):
        with exact_kernels(precision):
            encoder = FrameEncoder(autoencoder, device, side, precision=precision)
            ours, reference = bench.in_turn(
                lambda encoder=encoder: encode_frames(encoder, images, threads),
                lambda precision=precision: _encode_plainly(plain, images, device, precision),
            )
        yield _measurement(f"encode, {precision}", frames, ours, reference, at_least)
    latents = torch.randn(frames, *bench.latent_shape)
    decoder = autoencoder.to(memory_format=image_memory_format(device))
    with exact_kernels():
        ours, reference = bench.in_turn(
            lambda: _decode(decoder.decode, latents, device),
            lambda: _decode(lambda part: plain_decode(plain, part), latents, device),
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
    """Map images [b, 3, h, w] to latents as the public code does, with a model's weights."""
    encoder = model.encoder
    x = encoder.conv_in(images)
    for level in encoder.down:
        x = _level(level, x)
        if hasattr(level, "downsample"):
            x = level.downsample.conv(F.pad(x, (0, 1, 0, 1)))
    return model.quant_conv(encoder.conv_out(_swish(encoder.norm_out(_middle(encoder.mid, x)))))


def plain_codes(model: Autoencoder, latents: Tensor) -> Tensor:
    """Nearest codes [b * h * w] of latents [b, c, h, w], from the distances to all codes at once."""
    vectors, codebook = rearrange(latents, "b c h w -> (b h w) c"), model.quantizer.codebook
    squares = vectors.square().sum(1, keepdim=True) + codebook.square().sum(1)
    return torch.argmin(squares - 2 * vectors @ codebook.T, 1)


def plain_decode(model: VQGAN, latents: Tensor) -> Tensor:
    """Map latents [b, c, h, w] through their codes to images as the public code does."""
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
