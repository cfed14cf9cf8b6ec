"""Recorded runs of the official code, and a small field that holds its random weights."""

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stage2_flow.config import VectorFieldConfig
from stage2_flow.vector_field import VectorField

FIXTURES = Path(__file__).parents[1] / "fixtures"
PREFIX = "module.vector_field_regressor."


def recorded(name: str) -> dict[str, Tensor]:
    arrays = np.load(FIXTURES / name)
    return {key: torch.from_numpy(arrays[key]) for key in arrays.files if arrays[key].dtype.kind in "fi"}


@pytest.fixture(scope="session")
def regressor() -> dict[str, Tensor]:
    """One forward and backward of the official network."""
    return recorded("regressor_ln.npz")


@pytest.fixture(scope="session")
def regressor_grad_names() -> list[str]:
    return np.load(FIXTURES / "regressor_ln.npz")["grad_names"].tolist()


@pytest.fixture(scope="session")
def train_forward() -> dict[str, Tensor]:
    """One official training forward, with its draws."""
    return recorded("train_forward_ln.npz")


@pytest.fixture(scope="session")
def official_rollout() -> dict[str, Tensor]:
    """An official rollout with its draws: 3 frames given, 2 generated, 10 steps."""
    return recorded("sample_ws0.npz")


@pytest.fixture(scope="session")
def official_state() -> dict[str, Tensor]:
    content = gzip.decompress((FIXTURES / "main_ln_ddp.pth.gz").read_bytes())
    model = torch.load(io.BytesIO(content), weights_only=True)["model"]
    return {key.removeprefix(PREFIX): value for key, value in model.items() if key.startswith(PREFIX)}


@pytest.fixture
def official_field(official_state: dict[str, Tensor]) -> VectorField:
    """The official code's small network, in evaluation mode."""
    field = VectorField(VectorFieldConfig(width=64, depth=2, mid_depth=1), latent_channels=4)
    field.load_state_dict(official_state, strict=True)
    return field.eval()
