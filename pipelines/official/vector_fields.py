"""Official vector fields."""

from pathlib import Path

import torch
from pydantic import ValidationError

from pipelines.errors import UserError
from pipelines.official.weight_files import (
    OfficialCheckpoint,
    OfficialFormatError,
    count_blocks,
    fill,
    read_official,
    require,
    unfit,
)
from stage1_autoencoder.autoencoder import Autoencoder
from stage2_flow.config import VectorFieldConfig
from stage2_flow.vector_field import VectorField

# All released models have these.
OFFICIAL_HEADS = 8


def load_vector_field(
    path: str | Path, official: OfficialCheckpoint | None = None, *, heads: int = OFFICIAL_HEADS
) -> VectorField:
    """Build the vector field of a main model file, in evaluation mode on the CPU.

    Args:
        path: a main model `.pth`.
        official: the file's content, where it was read already.
        heads: attention heads: the one size that the tensors' shapes don't tell.
    Raises:
        FileNotFoundError, OfficialFormatError: see `read_official`; missing, unexpected or misshapen tensors.
        ValueError: heads that don't divide the width.
    """
    state = (official or read_official(path)).vector_field
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
    if heads < 1 or width % heads:
        raise ValueError(f"{path}: its width {width} must be a multiple of heads {heads}")
    try:
        config = VectorFieldConfig(
            width=width,
            depth=count_blocks(state, "in_blocks"),
            mid_depth=count_blocks(state, "mid_blocks"),
            heads=heads,
            head="bn" if "project_out.3.running_mean" in state else "ln",
            reference=channels_in == 3 * latent_channels,
        )
    except ValidationError as error:
        raise unfit(path, error) from None
    with torch.device("meta"):
        field = VectorField(config, latent_channels)
    fill(path, field, state)
    return field


def check_trained_together(
    field: VectorField, model: str | Path, autoencoder: Autoencoder, autoencoder_path: str | Path
) -> None:
    """Refuse a vector field and an autoencoder whose latents differ; equal ones need not be of one training.

    Args:
        model, autoencoder_path: where the two came from.
    Raises:
        UserError: other numbers of channels.
    """
    if field.latent_channels != autoencoder.config.latent_channels:
        raise UserError(
            f"{model} predicts latents of {field.latent_channels} channels, but the autoencoder of "
            f"{autoencoder_path} makes {autoencoder.config.latent_channels}: they were not trained together; "
            "name the autoencoder that came with the model"
        )
