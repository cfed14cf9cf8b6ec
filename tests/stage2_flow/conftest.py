"""Recorded runs of the official code, a small field with its random weights, and how far fp32 may differ from them."""

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


@pytest.fixture(scope="session")
def fp32_rounding(regressor: dict[str, Tensor]) -> float:
    """How far two fp32 evaluations of the official network with the same time code may lie apart.

    Ten times the rounding of the recorded one, which is known: it was recorded in float64, too.
    """
    return 10 * float((regressor["output"] - regressor["output_f64"]).abs().max())  # 1.6e-5


@pytest.fixture(scope="session")
def fp32_output(fp32_rounding: float) -> float:
    """The same where each evaluation computes its own time code.

    Two fp32 angles of 200 rad differ by up to 2 x 200 x 2 eps (`test_time_embedding_has_the_precision_of_fp32_angles`),
    and the output moves by 0.18 of that (largest row sum of the network's float64 Jacobian).
    """
    return fp32_rounding + 0.18 * 2 * 200 * 2 * torch.finfo(torch.float32).eps  # 3.3e-5


@pytest.fixture(scope="session")
def fp32_gradient() -> float:
    """The same for gradients, relative: ten times what the recorded ones are off those of float64 (at most 4.7e-7)."""
    return 5e-6
