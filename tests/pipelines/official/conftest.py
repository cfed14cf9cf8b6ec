"""Official files of small random networks."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines.config import RiverConfig, parse_config
from stage1_autoencoder.config import RefinerModelConfig, VQGANConfig, VQVAEConfig
from stage1_autoencoder.rcan import RCAN
from stage1_autoencoder.vqgan import VQGAN
from stage1_autoencoder.vqvae import VQVAE
from stage2_flow.config import VectorFieldConfig
from stage2_flow.vector_field import VectorField

SIZES = {
    "vqvae": VQVAEConfig(channels=32, levels=1, codes=16),
    "vqgan": VQGANConfig(
        channels=32, channel_multipliers=(1, 2), blocks=1, attention_resolutions=(8,), resolution=16, codes=16
    ),
    "field": VectorFieldConfig(width=32, depth=1, mid_depth=1),
    "refiner": RefinerModelConfig(groups=1, blocks=1, features=8, reduction=4),
}
CLASSES = {"vqvae": VQVAE, "vqgan": VQGAN, "refiner": RCAN}
Change = Callable[[dict[str, Tensor]], object]


class OfficialFolder:
    """Writes networks to files as the official code does.

    Attributes:
        autoencoder, field, refiner: random networks, the autoencoder a custom VQ-VAE.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.autoencoder: VQGAN | VQVAE = self.make("vqvae")
        self.field: VectorField = self.make("field")
        self.refiner: RCAN = self.make("refiner")

    @staticmethod
    def make(kind: str, **changes: Any) -> Any:
        """A random network of `SIZES`, some of them changed, in evaluation mode."""
        latent_channels = changes.pop("latent_channels", 4) if kind == "field" else None
        config = SIZES[kind].model_copy(update=changes)
        network = VectorField(config, latent_channels) if kind == "field" else CLASSES[kind](config)
        return randomize(network.eval())

    def model(
        self, name: str = "model.pth", *, inside: bool = True, prefix: str = "module.", change: Change | None = None,
        **more: Any,
    ) -> Path:  # fmt: skip
        """The main model, with the autoencoder inside or not; `change` edits the state dict without its prefix."""
        state = {f"vector_field_regressor.{name}": tensor for name, tensor in self.field.state_dict().items()}
        if inside:
            where = "ae.backbone." if isinstance(self.autoencoder, VQVAE) else "ae."
            state |= {f"{where}{name}": tensor for name, tensor in official_names(self.autoencoder).items()}
        return self._save(name, "model", state, prefix, change, {"global_step": 13, "optimizer": {}} | more)

    def autoencoder_file(self, name: str = "vqvae.pth", *, prefix: str = "", change: Change | None = None) -> Path:
        holder = "model" if isinstance(self.autoencoder, VQVAE) else "state_dict"
        state = official_names(self.autoencoder) | {"loss.discriminator.weight": torch.zeros(3)}
        return self._save(name, holder, state, prefix, change, {"epoch": 3, "global_step": 5})

    def refiner_file(
        self, name: str = "refiner.pth", *, prefix: str = "module.", change: Change | None = None, args: Any = None
    ) -> Path:
        more = {"epoch": 1, "args": argparse.Namespace(l1=False) if args is None else args}
        return self._save(name, "refiner", dict(self.refiner.state_dict()), prefix, change, more)

    def _save(
        self, name: str, holder: str, state: dict[str, Tensor], prefix: str, change: Change | None, more: dict[str, Any]
    ) -> Path:
        if change is not None:
            change(state)
        torch.save({holder: {f"{prefix}{key}": value for key, value in state.items()}} | more, self.path / name)
        return self.path / name

    def config(self, **changes: Any) -> RiverConfig:
        """The configuration that fits the networks; `changes` replaces whole sections."""
        values = {
            "paths": {name: str(self.path / name) for name in ("data", "latents", "runs")},
            "dataset": {"name": "kth", "source": "shapes", "image_size": 16, "frame_step": 5,
                        "splits": {"train": 2, "val": 1, "test": 1}},
            "autoencoder": {"model": self.autoencoder.config.model_dump(), "training": {"steps": 70}},
            "flow": {"model": self.field.config.model_dump(), "training": {"steps": 90}},
            "refiner": {"model": self.refiner.config.model_dump(), "training": {"steps": 50}},
            "sampling": {"preset": "official", "steps": 4},
        }  # fmt: skip
        return parse_config(values | changes, "a test")

    @staticmethod
    def same(ours: nn.Module, theirs: nn.Module) -> bool:
        left, right = ours.state_dict(), theirs.state_dict()
        return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)

    @staticmethod
    def randomize(network: nn.Module) -> None:
        randomize(network)


def randomize(network: nn.Module) -> nn.Module:
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else torch.randn_like(tensor) * 0.2)
    return network


def official_names(autoencoder: VQGAN | VQVAE) -> dict[str, Tensor]:
    codebook = "vector_quantizer." if isinstance(autoencoder, VQVAE) else "quantize."
    return {
        f"{codebook}{name.removeprefix('quantizer.')}" if name.startswith("quantizer.") else name: tensor
        for name, tensor in autoencoder.state_dict().items()
    }


@pytest.fixture
def official(tmp_path: Path) -> OfficialFolder:
    torch.manual_seed(0)
    return OfficialFolder(tmp_path)
