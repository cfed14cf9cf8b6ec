"""Encoding frames: packed kernels, other precisions and compiled networks agree with the plain network."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stage1_autoencoder.autoencoder import Autoencoder, image_to_unit
from stage1_autoencoder.config import VQGANConfig, VQVAEConfig
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.frame_encoder import FrameEncoder, Precision, exact_kernels
from stage1_autoencoder.packing import PackedConv2d, can_pack
from stage1_autoencoder.views import ViewTransform, view_transform
from stage1_autoencoder.vqgan import AttnBlock, ResnetBlock

CPU, SIDE, FRAMES = torch.device("cpu"), 32, 4
CONFIGS = {
    "vqgan": VQGANConfig(
        channels=16, channel_multipliers=(1, 2), blocks=1, attention_resolutions=(16,), resolution=32, codes=32,
        norm_groups=8,
    ),
    "vqvae": VQVAEConfig(channels=16, levels=2, codes=32, norm_groups=8),
}  # fmt: skip
# Rms of float32 roundings: some 20 layers with sums of up to 576 terms, whose errors add up like sqrt(20 x 576); and
# with one rounding to bfloat16 per layer like sqrt(20). Five times that.
FP32_ERROR, BF16_ERROR = 5 * (20 * 576) ** 0.5 * 2.0**-24, 5 * 20**0.5 * 2.0**-9


@pytest.fixture(params=CONFIGS)
def model(request) -> Autoencoder:
    torch.manual_seed(0)
    return build_autoencoder(CONFIGS[request.param]).eval().requires_grad_(False)


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (FRAMES, SIDE, SIDE, 3), np.uint8)


def encoder_of(model: Autoencoder, precision: Precision = "fp32", compile: bool = False) -> FrameEncoder:
    return FrameEncoder(model, CPU, (SIDE, SIDE), precision=precision, compile=compile, frames=FRAMES)


def identity(frames: np.ndarray) -> Sequence[ViewTransform]:
    return [ViewTransform()] * len(frames)


def plainly(model: Autoencoder, frames: np.ndarray) -> Tensor:
    with torch.no_grad():
        return model.encode(image_to_unit(torch.from_numpy(frames)))


def deviation(ours: Tensor, theirs: Tensor) -> float:
    """Rms deviation in units of the channels' standard deviation."""
    assert ours.shape == theirs.shape
    return ((ours - theirs) / theirs.std((0, 2, 3), keepdim=True)).square().mean().sqrt().item()


@pytest.mark.parametrize(
    ("precision", "low", "high"), [("fp32", 0, FP32_ERROR), ("tf32", 0, FP32_ERROR), ("bf16", 1e-4, BF16_ERROR)]
)
def test_faster_kernels_change_only_roundings(model, frames, precision, low, high):
    encoder = encoder_of(model, precision)
    encoded = encoder.encode(frames, identity(frames))
    assert encoded.latents.dtype == torch.float32
    assert low <= deviation(encoded.latents, plainly(model, frames)) < high
    assert torch.equal(encoded.codes, model.quantizer.nearest(encoded.latents))
    if can_pack(torch.float32) and precision == "fp32":
        kinds = {type(module) for module in encoder.network.encoder.modules()}
        assert PackedConv2d in kinds
        assert nn.Conv2d not in kinds


def test_the_autoencoder_itself_does_not_change(model, frames):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    encoder = encoder_of(model, "bf16")
    encoder.encode(frames, identity(frames))
    assert encoder.autoencoder is model
    assert not any(isinstance(module, PackedConv2d) for module in model.modules())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # Codebook and decoder are shared.
    assert encoder.network.decoder is model.decoder
    assert encoder.network.quantizer is model.quantizer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_frame_has_the_same_bits_in_any_batch(model, frames, precision):
    encoder = encoder_of(model, precision)
    views = [view_transform(view, "a video") for view in ("identity", "hflip", "jitter-1", "jitter-2")]
    together = encoder.encode(frames, views)
    again = encoder_of(model, precision).encode(frames, views)
    for order in ([0], [1], [2], [3], [3, 2, 1, 0], [2, 2, 1], [0, 3]):
        other = encoder.encode(frames[order], [views[row] for row in order])
        for name in ("images", "latents", "codes"):
            assert torch.equal(getattr(other, name)[: len(order)], getattr(together, name)[order])
            assert torch.equal(getattr(again, name), getattr(together, name))


def test_threads_that_call_first_together_get_the_same(model, frames):
    expected = encoder_of(model).encode(frames, identity(frames)).latents
    encoder = encoder_of(model)
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(encoder.encode, frames, identity(frames)) for _ in range(8)]
        assert all(torch.equal(future.result().latents, expected) for future in futures)


def test_without_onednn_the_autoencoder_itself_is_used(model, frames, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    encoder = encoder_of(model)
    assert encoder.network is model
    assert deviation(encoder.encode(frames, identity(frames)).latents, plainly(model, frames)) < FP32_ERROR


@pytest.mark.parametrize("kind", [lambda c: ResnetBlock(16, 16, c), lambda c: ResnetBlock(16, 32, c),
                                  lambda c: AttnBlock(16, c)], ids=["block", "wider block", "attention"])  # fmt: skip
def test_memory_is_reused_only_without_gradients(kind):
    torch.manual_seed(0)
    layer = kind(CONFIGS["vqgan"])
    x = torch.randn(2, 16, 8, 8)
    before, expected = x.clone(), layer(x)
    expected.sum().backward()
    with torch.no_grad():  # other kernels of attention may serve here
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=expected.abs().max().item() * 2.0**-18)
    assert torch.equal(x, before)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_compiled_encoder_changes_only_roundings(frames):
    torch.manual_seed(0)
    few_layers = {"channel_multipliers": (1,), "attention_resolutions": ()}  # each takes a second to compile
    model = build_autoencoder(CONFIGS["vqgan"].model_copy(update=few_layers)).eval().requires_grad_(False)
    expected = plainly(model, frames)
    encoder = encoder_of(model, compile=True)
    first = encoder.encode(frames, identity(frames)).latents
    assert encoder.network.encoder._compiled_call_impl is not None
    assert model.encoder._compiled_call_impl is None
    assert deviation(first, expected) < FP32_ERROR
    assert torch.equal(encoder.encode(frames[::-1].copy(), identity(frames)).latents.flip(0), first)


def test_wide_networks_and_large_frames_make_small_batches():
    def batch(channels: int, *frame_size: int) -> FrameEncoder:
        config = CONFIGS["vqgan"].model_copy(update={"channels": channels})
        with torch.device("meta"):
            model = build_autoencoder(config).eval()
        return FrameEncoder(model, CPU, frame_size)

    sizes = ((16, 32, 32), (64, 32, 32), (64, 64, 64), (64, 32, 128), (64, 256, 256))
    assert [batch(*size).frames for size in sizes] == [64, 32, 8, 8, 1]
    assert batch(64, 32, 32).memory == batch(64, 32, 128).memory == 6 * 2**23  # six feature maps of 8 MiB


def kernel_settings() -> tuple[str, bool, bool, bool]:
    """Settings of all threads."""
    cudnn = torch.backends.cudnn
    return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark


@pytest.mark.parametrize("around", ["high", "highest"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_tf32_is_enabled_only_on_request_and_for_convolutions(precision, around):
    def fail_inside() -> None:
        with exact_kernels(precision):
            assert kernel_settings() == ("highest", precision == "tf32", True, False)
            raise KeyError

    default = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(around)
    before = kernel_settings()
    try:
        with exact_kernels(precision):
            pass
        assert kernel_settings() == before
        with pytest.raises(KeyError):
            fail_inside()
        assert kernel_settings() == before
    finally:
        torch.set_float32_matmul_precision(default)
