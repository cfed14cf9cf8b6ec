"""The families of autoencoders, by their configuration."""

from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.config import VQGANConfig, VQVAEConfig
from stage1_autoencoder.vqgan import VQGAN
from stage1_autoencoder.vqvae import VQVAE


def build_autoencoder(config: VQGANConfig | VQVAEConfig) -> Autoencoder:
    """Build an autoencoder of the configured family, with random weights."""
    return VQVAE(config) if isinstance(config, VQVAEConfig) else VQGAN(config)
