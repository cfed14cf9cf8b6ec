"""Official autoencoders of both families."""

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from pipelines.official.weight_files import (
    OfficialCheckpoint,
    OfficialFormatError,
    autoencoder_state,
    count_blocks,
    fill,
    require,
    unfit,
)
from stage1_autoencoder import vqgan, vqvae
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.config import VQGANConfig, VQVAEConfig
from stage1_autoencoder.families import build_autoencoder

CUSTOM_VQVAE_PREFIXES = ("encoder.residuals.", "vector_quantizer.")
# The side that levels with attention are counted from. Any power of two that all levels halve does: shapes don't tell.
NOMINAL_RESOLUTION = 256


def load_autoencoder(path: str | Path, official: OfficialCheckpoint | None = None) -> Autoencoder:
    """Build the autoencoder of any official file, in evaluation mode on the CPU. Its sizes are read off the shapes.

    Args:
        path: a Taming autoencoder's `.ckpt`, a custom VQ-VAE's `.pth`, or a main model `.pth` that holds one of them.
        official: the file's content, where it was read already.
    Raises:
        FileNotFoundError, OfficialFormatError: see `autoencoder_state`; missing, unexpected or misshapen tensors.
    """
    state = autoencoder_state(path, official)
    custom = any(name.startswith(CUSTOM_VQVAE_PREFIXES) for name in state)
    state = vqvae.from_official_keys(state) if custom else vqgan.from_official_keys(state)
    try:
        config = _vqvae_sizes(path, state) if custom else _vqgan_sizes(path, state)
    except ValidationError as error:
        raise unfit(path, error) from None
    with torch.device("meta"):
        autoencoder = build_autoencoder(config)
    fill(path, autoencoder, state)
    return autoencoder


def _vqgan_sizes(path: str | Path, state: Mapping[str, Tensor]) -> VQGANConfig:
    convolutions = ("encoder.conv_in.weight", "encoder.conv_out.weight")
    require(path, state, (*convolutions, "quantizer.embedding.weight"), ndims=(4, 4, 2))
    channels, latent_channels = (state[name].shape[0] for name in convolutions)
    levels = range(count_blocks(state, "encoder.down"))
    widths = [f"encoder.down.{level}.block.0.conv1.weight" for level in levels]
    require(path, state, widths, ndims=[4] * len(widths))
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


def _vqvae_sizes(path: str | Path, state: Mapping[str, Tensor]) -> VQVAEConfig:
    names = ("encoder.conv_in.weight", "encoder.out_conv.weight", "quantizer.embedding.weight")
    require(path, state, names, ndims=(4, 4, 2))
    channels, latent_channels, codes = (state[name].shape[0] for name in names)
    levels = count_blocks(state, "encoder.residuals")
    config = VQVAEConfig(channels=channels, levels=levels, latent_channels=latent_channels, codes=codes, norm_groups=32)
    # Each level doubles the channels: one too many by its number alone could ask for any amount of memory.
    deepest = state["encoder.out_conv.weight"].shape[1]
    if channels * 2**levels != deepest:
        raise OfficialFormatError(
            f"{path} does not fit the official network; encoder.out_conv.weight takes {deepest} channels, not the "
            f"{channels} of encoder.conv_in.weight doubled {levels} times, once for each of encoder.residuals"
        )
    return config


def _multiple(path: str | Path, name: str, width: int, channels: int) -> int:
    """A level's width as a multiple of the channels at full resolution."""
    if not channels or width % channels:
        raise OfficialFormatError(f"{path}: {name} has {width} channels, no multiple of the {channels} of conv_in")
    return width // channels
