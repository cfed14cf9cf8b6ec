"""Frames to latents: faster kernels, other precisions and compiled networks give what the plain network gives."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import latent_cache
from latent_cache import StoreError, StoreMetadata
from pipelines.config import parse_config
from pipelines.encoding.store_checks import check_layout, how_computed, store_metadata, stored_precision
from pipelines.encoding.store_encoder import StoreEncoder
from pipelines.encoding.verify_frames import (
    BF16_TOLERANCE,
    LATENT_TOLERANCE,
    FrameVerifier,
    draw_frames,
    latent_deviation,
)
from pipelines.errors import UserError
from pipelines.runtime.checkpoints import Checkpoint
from stage1_autoencoder import frame_encoder as frame_encoder_module
from stage1_autoencoder.autoencoder import Autoencoder, image_to_unit
from stage1_autoencoder.config import VQGANConfig, VQVAEConfig
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.frame_encoder import (
    FrameEncoder,
    PackedConv2d,
    can_pack,
    exact_kernels,
    with_packed_convolutions,
)
from stage1_autoencoder.views import ViewTransform
from stage1_autoencoder.vqgan import AttnBlock, ResnetBlock

CPU, SIDE, FRAMES = torch.device("cpu"), 32, 4
CONFIGS = {
    "vqgan": VQGANConfig(
        channels=16, channel_multipliers=(1, 2), blocks=1, attention_resolutions=(16,), resolution=32, codes=32,
        norm_groups=8,
    ),
    "vqvae": VQVAEConfig(channels=16, levels=2, codes=32, norm_groups=8),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _few_frames(request, monkeypatch) -> None:
    if "kit" not in request.fixturenames:
        monkeypatch.setattr(frame_encoder_module, "PASS_PIXELS", {"cpu": FRAMES * SIDE**2})


@pytest.fixture(params=CONFIGS)
def model(request) -> Autoencoder:
    torch.manual_seed(0)
    return build_autoencoder(CONFIGS[request.param]).eval().requires_grad_(False)


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (FRAMES, SIDE, SIDE, 3), np.uint8)


def identity(frames: np.ndarray) -> Sequence[ViewTransform]:
    return [ViewTransform()] * len(frames)


def plainly(model: Autoencoder, frames: np.ndarray) -> Tensor:
    with torch.no_grad():
        return model.encode(image_to_unit(torch.from_numpy(frames)))


def deviation(ours: Tensor, theirs: Tensor) -> float:
    """Rms deviation in units of the channels' standard deviation."""
    assert ours.shape == theirs.shape
    return ((ours - theirs) / theirs.std((0, 2, 3), keepdim=True)).square().mean().sqrt().item()


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_faster_kernels_change_the_last_digits_alone(model, frames, precision):
    expected = plainly(model, frames)
    encoded = FrameEncoder(model, CPU, SIDE, precision=precision).encode(frames, identity(frames))
    assert deviation(encoded.latents, expected) < 1e-5
    assert torch.equal(encoded.codes, model.quantizer.nearest(encoded.latents))


def test_convolutions_are_packed_where_they_can_be(model):
    assert can_pack(torch.float32)
    encoder = FrameEncoder(model, CPU, SIDE)
    left = [module for module in encoder.network.encoder.modules() if isinstance(module, nn.Conv2d)]
    assert not left
    assert any(isinstance(module, PackedConv2d) for module in encoder.network.encoder.modules())


def test_the_autoencoder_itself_stays_what_it_is(model, frames):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    encoder = FrameEncoder(model, CPU, SIDE, precision="bf16")
    encoder.encode(frames, identity(frames))
    assert encoder.autoencoder is model
    assert not any(isinstance(module, PackedConv2d) for module in model.modules())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # One codebook and one decoder: what is done to them is done to both.
    assert encoder.network.decoder is model.decoder
    assert encoder.network.quantizer is model.quantizer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_frame_has_the_same_bits_in_any_company(model, frames, precision):
    encoder = FrameEncoder(model, CPU, SIDE, precision=precision)
    together = encoder.encode(frames, identity(frames)).latents
    backwards = encoder.encode(frames[::-1].copy(), identity(frames)).latents.flip(0)
    alone = torch.cat([encoder.encode(frame[None], [ViewTransform()]).latents[:1] for frame in frames])
    again = FrameEncoder(model, CPU, SIDE, precision=precision).encode(frames, identity(frames)).latents
    for other in (backwards, alone, again):
        assert torch.equal(other, together)


def test_threads_that_come_first_together_get_the_same(model, frames):
    expected = FrameEncoder(model, CPU, SIDE).encode(frames, identity(frames)).latents
    encoder = FrameEncoder(model, CPU, SIDE)
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(encoder.encode, frames, identity(frames)) for _ in range(8)]
        assert all(torch.equal(future.result().latents, expected) for future in futures)


def test_bf16_is_rough_and_comes_out_in_float32(model, frames):
    expected = plainly(model, frames)
    encoded = FrameEncoder(model, CPU, SIDE, precision="bf16").encode(frames, identity(frames))
    assert encoded.latents.dtype == torch.float32
    assert 1e-4 < deviation(encoded.latents, expected) < BF16_TOLERANCE
    assert torch.equal(encoded.codes, model.quantizer.nearest(encoded.latents))


def test_without_onednn_the_autoencoder_computes_as_it_is(model, frames, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    encoder = FrameEncoder(model, CPU, SIDE)
    assert encoder.network is model
    assert deviation(encoder.encode(frames, identity(frames)).latents, plainly(model, frames)) < 1e-5


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.Conv2d(4, 6, 1),
     nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2)],
    ids=str,
)  # fmt: skip
def test_packed_convolutions_of_any_kind(layer):
    x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1))
    packed = with_packed_convolutions(nn.Sequential(layer), torch.float32, [])
    assert isinstance(packed[0], PackedConv2d)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-5)


def test_shared_parts_keep_their_convolutions():
    shared = nn.Sequential(nn.Conv2d(3, 3, 1))
    copied = with_packed_convolutions(nn.Sequential(nn.Conv2d(3, 3, 1), shared), torch.float32, [shared])
    assert copied[1] is shared
    assert [type(copied[0]), type(shared[0])] == [PackedConv2d, nn.Conv2d]


@pytest.mark.parametrize("kind", [lambda c: ResnetBlock(16, 16, c), lambda c: ResnetBlock(16, 32, c),
                                  lambda c: AttnBlock(16, c)], ids=["block", "wider block", "attention"])  # fmt: skip
def test_memory_is_used_again_where_no_gradient_asks_for_it(kind):
    torch.manual_seed(0)
    layer = kind(CONFIGS["vqgan"])
    x = torch.randn(2, 16, 8, 8)
    before, expected = x.clone(), layer(x)
    expected.sum().backward()
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    assert torch.equal(x, before)


def test_other_padding_is_left_alone():
    layer = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    assert type(with_packed_convolutions(nn.Sequential(layer), torch.float32, [])[0]) is nn.Conv2d


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_compiled_encoder_changes_the_last_digits_alone(frames):
    torch.manual_seed(0)
    model = build_autoencoder(CONFIGS["vqgan"]).eval().requires_grad_(False)
    expected = plainly(model, frames)
    encoder = FrameEncoder(model, CPU, SIDE, compile=True)
    first = encoder.encode(frames, identity(frames)).latents
    assert encoder.network.encoder._compiled_call_impl is not None
    assert model.encoder._compiled_call_impl is None
    assert deviation(first, expected) < 1e-5
    assert torch.equal(encoder.encode(frames[::-1].copy(), identity(frames)).latents.flip(0), first)


def test_wide_networks_see_fewer_frames_at_once(model, monkeypatch):
    feature_map = 4 * model.config.full_resolution_channels * SIDE**2
    many = FrameEncoder(model, CPU, SIDE)
    assert many.frames == FRAMES
    monkeypatch.setattr(frame_encoder_module, "PASS_BYTES", 3 * feature_map - 1)
    few = FrameEncoder(model, CPU, SIDE)
    assert few.frames == 2
    assert few.memory * FRAMES == many.memory * 2
    monkeypatch.setattr(frame_encoder_module, "PASS_BYTES", 1)
    assert FrameEncoder(model, CPU, SIDE).frames == 1


def multiplication() -> tuple[str, bool, bool]:
    """Settings of all threads."""
    cudnn = torch.backends.cudnn
    return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.deterministic


@pytest.mark.parametrize("around", ["high", "highest"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_tf32_is_allowed_where_it_is_asked_for(precision, around):
    def fail() -> None:
        raise KeyError("something in the middle")

    default = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(around)
    before = multiplication()
    try:
        with exact_kernels(precision):
            assert multiplication() == (("high", True, True) if precision == "tf32" else ("highest", False, True))
        assert multiplication() == before
        with pytest.raises(KeyError), exact_kernels(precision):
            fail()
        assert multiplication() == before
    finally:
        torch.set_float32_matmul_precision(default)


def encode_as_configured(kit, **cache) -> None:
    config = kit.config(**cache)
    metadata = store_metadata(config, kit.model, kit.splits)
    checkpoint = Checkpoint(kit.folder / "none", {"step": 0})
    StoreEncoder(config, kit.run_context, checkpoint, kit.model, kit.splits, metadata).run(overwrite=False)


def test_what_is_by_default_leaves_no_mark(kit):
    assert how_computed(kit.config()) == {}
    assert how_computed(kit.config(precision="bf16", compile=True)) == {"precision": "bf16", "compiled": True}
    plain = store_metadata(kit.config(), kit.model, kit.splits)
    assert plain.autoencoder.keys() == {"architecture", "sha256", "downsampling", "latent_channels", "codes"}
    assert stored_precision(plain) == "fp32"
    rough = store_metadata(kit.config(precision="tf32"), kit.model, kit.splits)
    assert stored_precision(rough) == "tf32"
    assert StoreMetadata.differences(plain, rough) == ["autoencoder.precision: None here, 'tf32' there"]


def test_an_unknown_precision_is_refused(kit):
    with pytest.raises(UserError, match=r"cache.precision: 'fp16' is not allowed"):
        parse_config(kit.config().model_dump(mode="json") | {"cache": {"precision": "fp16"}}, "a test")


@pytest.mark.parametrize(("there", "here"), [("bf16", "fp32"), ("fp32", "bf16"), ("tf32", "fp32")])
def test_a_complete_store_of_another_precision_is_refused(kit, there, here):
    encode_as_configured(kit, precision=there)
    check_layout(kit.config(precision=there))
    with pytest.raises(UserError, match=f"cache.precision: {there} in the store, {here} in the configuration"):
        check_layout(kit.config(precision=here))


def test_a_half_done_store_of_another_precision_is_refused(kit, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("latent_cache.StoreWriter.finish", lambda *_: (_ for _ in ()).throw(OSError(5, "no more")))
        with pytest.raises(OSError, match="no more"):
            encode_as_configured(kit)
    with pytest.raises(StoreError, match=r"autoencoder.precision"):
        encode_as_configured(kit, precision="bf16")
    encode_as_configured(kit)
    assert latent_cache.is_complete(kit.store)


def test_bits_depend_on_the_precision_and_are_verified_in_it(kit):
    exact, rough = kit.another("exact"), kit.another("rough")
    encode_as_configured(exact)
    encode_as_configured(rough, precision="bf16")
    caches = [latent_cache.open(rough.store, split) for split in ("train", "val")]
    stored = caches[0].load().float()
    apart = deviation(stored, latent_cache.open(exact.store, "train").load().float())
    assert LATENT_TOLERANCE / 10 < apart < BF16_TOLERANCE
    verifier = FrameVerifier(caches, rough.splits, rough.model, CPU)
    checks = list(verifier.check(draw_frames(caches, 20, 0)))
    assert len(checks) == 20
    assert all(check.bit_equal and not check.problem for check in checks)


def test_the_tolerance_is_a_share_of_the_deviation():
    stored, std = np.ones((2, 3, 3), np.float32), np.full(2, 0.5)
    moved = stored + 0.5 * 0.04
    assert latent_deviation(moved, stored, std, BF16_TOLERANCE) == pytest.approx(0.8, rel=1e-3)
    assert latent_deviation(moved, stored, std) == pytest.approx(4, rel=1e-3)
