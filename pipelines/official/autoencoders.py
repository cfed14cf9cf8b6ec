"""Official autoencoders of both families."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipelines.official.files import (
    OfficialFormatError,
    autoencoder_state,
    check_state,
    count_blocks,
    fp32,
    require,
)
from stage1_autoencoder import vqgan, vqvae
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.config import VQGANConfig, VQVAEConfig
from stage1_autoencoder.families import build_autoencoder

CUSTOM_VQVAE_PREFIX = "encoder.residuals."
# The side that levels with attention are counted from. Any power of two that all levels halve does: shapes don't tell.
NOMINAL_RESOLUTION = 256


def load_autoencoder(path: str | Path) -> Autoencoder:
    """Build the autoencoder of any official file, in evaluation mode on the CPU. Its sizes are read off the shapes.

    Args:
        path: a Taming autoencoder's `.ckpt`, a custom VQ-VAE's `.pth`, or a main model `.pth` that holds one of them.
    Raises:
        FileNotFoundError, OfficialFormatError: see `autoencoder_state`; missing, unexpected or misshapen tensors.
    """
    state = autoencoder_state(path)
    custom = any(name.startswith(CUSTOM_VQVAE_PREFIX) for name in state)
    state = vqvae.from_official_keys(state) if custom else vqgan.from_official_keys(state)
    config = _vqvae_sizes(path, state) if custom else _vqgan_sizes(path, state)
    # The autoencoder owns no tensor outside its state dict, so nothing is left on the meta device.
    with torch.device("meta"):
        autoencoder = build_autoencoder(config)
    check_state(path, autoencoder.state_dict(), state)
    autoencoder.load_state_dict({name: fp32(tensor) for name, tensor in state.items()}, strict=True, assign=True)
    return autoencoder.eval()


def _vqgan_sizes(path: str | Path, state: Mapping[str, Tensor]) -> VQGANConfig:
    convolutions = ("encoder.conv_in.weight", "encoder.conv_out.weight")
    require(path, state, (*convolutions, "quantizer.embedding.weight"), ndims=(4, 4, 2))
    channels, latent_channels = (state[name].shape[0] for name in convolutions)
    levels = range(count_blocks(state, "encoder.down"))
    widths = [f"encoder.down.{level}.block.0.conv1.weight" for level in levels]
    require(path, state, widths, ndims=[4] * len(widths))
    try:
        return VQGANConfig(
            channels=channels,
            channel_multipliers=tuple(_multiple(path, name, state[name].shape[0], channels) for name in widths),
            blocks=count_blocks(state, "encoder.down.0.block"),
            decoder_blocks=count_blocks(state, "decoder.up.0.block"),
            attention_resolutions=tuple(
                NOMINAL_RESOLUTION // 2**level for level in levels if f"encoder.down.{level}.attn.0.q.weight" in state
            ),
            resolution=NOMINAL_RESOLUTION,
            latent_channels=latent_channels,
            codes=state["quantizer.embedding.weight"].shape[0],
            norm_groups=32,
        )
    except ValueError as error:
        raise OfficialFormatError(f"{path} does not fit the official network: {error}") from None


def _vqvae_sizes(path: str | Path, state: Mapping[str, Tensor]) -> VQVAEConfig:
    names = ("encoder.conv_in.weight", "encoder.out_conv.weight", "quantizer.embedding.weight")
    require(path, state, names, ndims=(4, 4, 2))
    channels, latent_channels, codes = (state[name].shape[0] for name in names)
    try:
        return VQVAEConfig(
            channels=channels,
            levels=count_blocks(state, "encoder.residuals"),
            latent_channels=latent_channels,
            codes=codes,
            norm_groups=32,
        )
    except ValueError as error:
        raise OfficialFormatError(f"{path} does not fit the official network: {error}") from None


def _multiple(path: str | Path, name: str, width: int, channels: int) -> int:
    """A level's width as a multiple of the channels at full resolution."""
    if not channels or width % channels:
        raise OfficialFormatError(f"{path}: {name} has {width} channels, no multiple of the {channels} of conv_in")
    return width // channels
