"""Autoencoders by their sizes."""

from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.config import VQGANConfig, VQVAEConfig
from stage1_autoencoder.vqgan import VQGAN
from stage1_autoencoder.vqvae import VQVAE


def build_autoencoder(config: VQGANConfig | VQVAEConfig) -> Autoencoder:
    """Make an autoencoder of the family that its sizes are of, with fresh weights."""
    return VQVAE(config) if isinstance(config, VQVAEConfig) else VQGAN(config)
