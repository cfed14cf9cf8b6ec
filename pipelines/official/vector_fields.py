"""Official vector fields."""

from pathlib import Path

import torch

from pipelines.official.files import (
    OfficialFormatError,
    check_state,
    count_blocks,
    fp32,
    read_official,
    require,
)
from stage2_flow.config import VectorFieldConfig
from stage2_flow.vector_field import VectorField


def load_vector_field(path: str | Path, *, heads: int = 8) -> VectorField:
    """Build the vector field of a main model file, in evaluation mode on the CPU.

    Args:
        path: a main model `.pth`.
        heads: attention heads: the one size that the tensors' shapes don't tell. All released models have 8.
    Raises:
        FileNotFoundError, OfficialFormatError: see `read_official`; missing, unexpected or misshapen tensors.
        ValueError: heads that don't divide the width.
    """
    state = read_official(path).vector_field
    if not state:
        raise OfficialFormatError(f"{path} holds no vector field: pass the main model (model.pth), not the autoencoder")
    require(path, state, ("project_in.1.weight", "project_out.4.weight"), ndims=(2, 4))
    width, channels_in = state["project_in.1.weight"].shape
    latent_channels = state["project_out.4.weight"].shape[0]
    if channels_in not in (2 * latent_channels, 3 * latent_channels):
        raise OfficialFormatError(
            f"{path}: project_in.1.weight takes {channels_in} channels, which is neither 3 (with a reference) nor 2 "
            f"(without) times the {latent_channels} latent channels of project_out.4.weight"
        )
    config = VectorFieldConfig(
        width=width,
        depth=count_blocks(state, "in_blocks"),
        mid_depth=count_blocks(state, "mid_blocks"),
        heads=heads,
        head="bn" if "project_out.3.running_mean" in state else "ln",
        reference=channels_in == 3 * latent_channels,
    )
    # The field owns no tensor outside its state dict, so nothing is left on the meta device.
    with torch.device("meta"):
        field = VectorField(config, latent_channels)
    check_state(path, field.state_dict(), state)
    field.load_state_dict({name: fp32(tensor) for name, tensor in state.items()}, strict=True, assign=True)
    return field.eval()
