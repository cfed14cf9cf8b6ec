"""The official Taming autoencoder: recorded outputs, and what is no such file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.official import OfficialFormatError, load_autoencoder
from stage1_autoencoder.config import VQGANConfig
from stage1_autoencoder.vqgan import VQGAN

FIXTURES = Path(__file__).parents[2] / "fixtures"
TAMING, MAIN = FIXTURES / "vqgan_f8s_ch32.ckpt.gz", FIXTURES / "main_ln_ddp.pth.gz"


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    arrays = np.load(FIXTURES / "vqgan_f8s_ch32.npz")
    return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture(scope="module", params=[TAMING, MAIN], ids=["taming", "main model"])
def autoencoder(request) -> VQGAN:
    return load_autoencoder(request.param).requires_grad_(False)


@pytest.fixture(scope="module")
def exact() -> VQGAN:
    return load_autoencoder(TAMING).requires_grad_(False).double()


def off(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def test_sizes_are_read_off_the_shapes(autoencoder):
    config = autoencoder.config
    assert (config.channels, config.channel_multipliers) == (32, (1, 2, 2, 4))
    assert (config.blocks, config.decoder_blocks, config.latent_channels, config.codes) == (2, 3, 4, 256)
    assert [len(level.attn) for level in autoencoder.encoder.down] == [0, 0, 2, 0]
    assert not any(module.training for module in autoencoder.modules())
    assert not any(parameter.is_meta for parameter in autoencoder.parameters())


def test_latents_equal_the_official_ones(autoencoder, recorded):
    assert off(autoencoder.encode(recorded["images"]), recorded["latents"]) < 1e-5


def test_codes_equal_the_official_ones(autoencoder, recorded):
    quantized, codes = autoencoder.quantize(autoencoder.encode(recorded["images"]))
    clear = recorded["index_margin"] >= 1e-6
    assert clear.float().mean() > 0.9
    assert (codes == recorded["indices"].reshape(codes.shape))[clear].all()
    assert off(quantized.movedim(1, -1)[clear], recorded["quantized"].movedim(1, -1)[clear]) < 1e-5


def test_decoded_images_equal_the_official_ones(autoencoder, recorded):
    assert off(autoencoder.decode(recorded["latents"]), recorded["decoded"]) < 1.3e-4


def test_decoding_without_quantizing_equals_the_official_one(autoencoder, recorded):
    assert off(autoencoder.decode_quantized(recorded["latents"]), recorded["decoded_force_not_quantize"]) < 1.3e-4
    # The test could fail: quantizing moves these random latents far.
    assert off(recorded["decoded"], recorded["decoded_force_not_quantize"]) > 0.01


def test_decoding_codes_equals_the_official_one(autoencoder, recorded):
    codes = recorded["indices"].reshape(recorded["latents"][:, 0].shape)
    assert off(autoencoder.decode_codes(codes), recorded["decoded_from_codebook_entries"]) < 1.3e-4
    assert off(autoencoder.embed(codes), recorded["quantized"]) < 1e-6


def test_the_legacy_loss_is_ours_with_beta_on_the_other_term(autoencoder, recorded):
    output = autoencoder(recorded["images"])
    # Taming: mean((sg[e] - z)^2) + 0.25 mean((e - sg[z])^2).
    legacy = output.commitment_loss + 0.25 * output.codebook_loss
    assert legacy.item() == pytest.approx(recorded["vq_loss_legacy"].item(), abs=1e-6)


def test_float64_outputs_equal_the_official_ones(exact, recorded):
    latents = exact.encode(recorded["images"].double())
    assert off(latents, recorded["latents_f64"]) < 1e-11
    assert off(exact.decode(latents), recorded["decoded_f64"]) < 1e-11


SMALL = VQGANConfig(
    channels=32, channel_multipliers=(1, 2), blocks=1, attention_resolutions=(32,), latent_channels=3, codes=16
)


def save(path: Path, config: VQGANConfig = SMALL, change=None) -> VQGAN:
    """Write an autoencoder the way taming does; `change` edits its state dict first."""
    torch.manual_seed(0)
    model = VQGAN(config).eval()
    state = {name.replace("quantizer.", "quantize."): tensor for name, tensor in model.state_dict().items()}
    state["loss.discriminator.weight"] = torch.zeros(3)
    if change is not None:
        change(state)
    torch.save({"state_dict": state, "epoch": 3}, path)
    return model


@pytest.mark.parametrize(
    "changes",
    [{}, {"channel_multipliers": (1,)}, {"attention_resolutions": ()}, {"attention_resolutions": (64, 32)},
     {"blocks": 2, "decoder_blocks": 1}],
    ids=str,
)  # fmt: skip
def test_other_sizes_are_recognised_too(tmp_path, changes):
    saved = save(tmp_path / "vqvae.ckpt", SMALL.model_copy(update=changes))
    loaded = load_autoencoder(tmp_path / "vqvae.ckpt")
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(loaded.encode(images), saved.encode(images))
        assert torch.equal(loaded.decode(loaded.encode(images)), saved.decode(saved.encode(images)))


def test_half_precision_files_become_fp32(tmp_path):
    save(tmp_path / "vqvae.ckpt", change=lambda state: state.update({k: v.half() for k, v in state.items()}))
    assert {parameter.dtype for parameter in load_autoencoder(tmp_path / "vqvae.ckpt").parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("encoder.conv_in.weight"), "missing: encoder.conv_in.weight"),
        (lambda s: s.pop("decoder.up.0.block.0.conv1.bias"), "missing: decoder.up.0.block.0.conv1.bias"),
        (lambda s: s.update({"encoder.extra": torch.zeros(1)}), "unexpected: encoder.extra"),
        (lambda s: s.update({"quant_conv.weight": torch.zeros(6, 6, 1, 1)}), r"quant_conv.weight \[6, 6, 1, 1\]"),
        (lambda s: s.update({"encoder.conv_in.weight": torch.zeros(32)}), "encoder.conv_in.weight has shape"),
        (lambda s: s.update({"encoder.down.1.block.0.conv1.weight": torch.zeros(40, 32, 3, 3)}), "40 channels, no"),
        (lambda s: s.update({"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)}), "groups: 32 does not divide the 8"),
        (lambda s: s.update({"quantize.embedding.weight": torch.zeros(65537, 3)}), "codes"),
    ],
    ids=range(8),
)  # fmt: skip
def test_what_is_no_taming_autoencoder_is_refused(tmp_path, change, message):
    save(tmp_path / "vqvae.ckpt", change=change)
    with pytest.raises(OfficialFormatError, match=message) as error:
        load_autoencoder(tmp_path / "vqvae.ckpt")
    assert "vqvae.ckpt" in str(error.value)


def test_a_file_without_an_autoencoder_is_refused(tmp_path):
    torch.save({"model": {"vector_field_regressor.x": torch.zeros(1)}}, tmp_path / "model.pth")
    with pytest.raises(OfficialFormatError, match="holds no autoencoder"):
        load_autoencoder(tmp_path / "model.pth")
