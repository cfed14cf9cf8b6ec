"""The fast decoder's network: shapes of every family and down-sampling factor, gradients, and its cost."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipelines.config import load_config
from stage1_autoencoder.config import DecoderModelConfig, VQGANConfig, VQVAEConfig
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.fast_decoder import FastDecoder

TINY = {"channels": 8, "norm_groups": 4, "blocks": 1, "decoder_blocks": 1, "attention_resolutions": [], "codes": 8}


def vqgan(*multipliers: int) -> VQGANConfig:
    return VQGANConfig(**TINY, channel_multipliers=multipliers)


@pytest.mark.parametrize(
    "autoencoder",
    [vqgan(1), vqgan(1, 2), vqgan(1, 2, 4), vqgan(1, 2, 4, 8), vqgan(1, 1, 2, 2, 4),
     VQVAEConfig(channels=8, norm_groups=4, levels=3, latent_channels=2)],
    ids=["f1", "f2", "f4", "f8", "f16", "vqvae"],
)  # fmt: skip
@pytest.mark.parametrize("sizes", [{}, {"features": 15, "blocks": 2}], ids=["default", "odd"])
def test_images_have_the_size_of_the_autoencoders_and_all_weights_learn(
    autoencoder: VQGANConfig | VQVAEConfig, sizes: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    network = FastDecoder(DecoderModelConfig(**sizes), autoencoder)
    latents = torch.randn(2, autoencoder.latent_channels, 2, 3)
    images = network(latents)
    assert images.shape == (2, 3, 2 * autoencoder.downsampling, 3 * autoencoder.downsampling)
    assert images.shape == build_autoencoder(autoencoder).decode_quantized(latents).shape
    images.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())
    assert all(parameter.grad.any() for parameter in network.boundary_parameters())
    hidden = {id(parameter) for parameter in network.parameters()} - set(map(id, network.boundary_parameters()))
    assert hidden, "Muon has matrices to update"


@pytest.mark.parametrize("preset", ["shapes", "kth", "bair_256", "clevrer"])
def test_it_takes_at_most_a_fifth_of_the_arithmetic(preset: str) -> None:
    config = load_config(preset)
    model = config.autoencoder.model
    with torch.device("meta"):
        full, fast = build_autoencoder(model), FastDecoder(config.decoder.model, model)
        latents = torch.empty(1, *model.latent_shape(config.dataset.frame_size))

        def flops(decode: Any) -> int:
            with FlopCounterMode(display=False) as counter:
                decode(latents)
            return counter.get_total_flops()

        assert 0 < 5 * flops(fast) <= flops(full.decode_quantized)
