"""Official files to all that a predictor consists of, without a run in between."""

from pathlib import Path

import torch

from pipelines.errors import UserError
from pipelines.loading import PredictorParts
from pipelines.official.autoencoders import load_autoencoder
from pipelines.official.parts import FRAMES_PER_SECOND, OfficialFiles
from pipelines.official.refiners import load_refiner
from pipelines.official.vector_fields import OFFICIAL_HEADS, check_trained_together, load_vector_field
from pipelines.official.weight_files import OfficialCheckpoint, OfficialFormatError, read_official
from pipelines.runtime.context import image_memory_format
from pipelines.runtime.progress import say
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.config import VQVAEConfig
from stage2_flow.config import SamplingConfig
from stage2_flow.standardization import Standardization

# CLEVRER's model, the one with the custom VQ-VAE, knows every fifth frame.
CLEVRER_FRAME_STEP = 5


def load_official(files: OfficialFiles, device: torch.device, *, heads: int = OFFICIAL_HEADS) -> PredictorParts:
    """Read the files of a released model; sizes are read off the shapes.

    Args:
        files: the main model; the autoencoder where the model holds none; perhaps a refiner.
        heads: attention heads, which the shapes don't tell.
    Returns:
        Raw latents, the paper's sampling, and 25 frames a second (5 with the custom VQ-VAE): files don't tell them.
    Raises:
        OfficialFormatError: a file that is not what the official code writes; a model without its autoencoder.
        UserError: no such file; files that don't belong together; heads that don't divide the width.
    """
    files.check("")
    content = read_official(files.model)
    try:
        field = load_vector_field(files.model, content, heads=heads)
    except ValueError as error:
        raise UserError(f"{error}: pass heads=...") from None
    path, autoencoder = _autoencoder(files, content)
    check_trained_together(field, files.model, autoencoder, path)
    refiner = None if files.refiner is None else load_refiner(files.refiner)
    layout = image_memory_format(device)
    step = CLEVRER_FRAME_STEP if isinstance(autoencoder.config, VQVAEConfig) else 1
    return PredictorParts(
        autoencoder=autoencoder.to(device, memory_format=layout).requires_grad_(False),
        vector_field=field.to(device).requires_grad_(False),
        standardization=Standardization.identity(field.latent_channels).to(device),
        sampling=SamplingConfig(preset="official"),
        fps=FRAMES_PER_SECOND / step,
        device=device,
        refiner=None if refiner is None else refiner.to(device, memory_format=layout).requires_grad_(False),
        no_refiner=f"{files.model} was loaded without a refiner: pass refiner='refiner.pth'",
    )


def _autoencoder(files: OfficialFiles, content: OfficialCheckpoint) -> tuple[Path, Autoencoder]:
    """The one inside the model, which wins; else the one that was named; and where it is from."""
    if content.autoencoder:
        if files.autoencoder is not None:
            say(f"{files.model} holds its autoencoder; {files.autoencoder} is not looked at")
        return files.model, load_autoencoder(files.model, content)
    if files.autoencoder is None:
        raise OfficialFormatError(
            f"{files.model} works on an autoencoder's latents, which is not inside: name the one that came with it, "
            "autoencoder='vqvae.ckpt' (CLEVRER's: 'vqvae.pth')"
        )
    return files.autoencoder, load_autoencoder(files.autoencoder)
