"""What a command would find and do: the text of `--dry-run`."""

import torch

import latent_cache
from latent_cache import StoreError
from pipelines.config import RiverConfig
from pipelines.runtime.checkpoints import Checkpoint, CheckpointFolder
from pipelines.runtime.runs import describe_progress, is_imported
from pipelines.train_flow import find_flow
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.rcan import RCAN
from stage2_flow.vector_field import VectorField


def describe_plan(config: RiverConfig) -> str:
    """Sizes of the networks, and how far each stage is."""
    with torch.device("meta"):
        autoencoder = build_autoencoder(config.autoencoder.model)
        field = VectorField(config.flow.model, config.autoencoder.model.latent_channels)
        refiner = RCAN(config.refiner.model)
    side = config.dataset.image_size // autoencoder.downsampling
    try:
        if not config.store_path.exists():
            store = "missing: encode makes it"
        else:
            store = (
                "complete" if latent_cache.is_complete(config.store_path) else "half done: encode goes on from there"
            )
    except StoreError as error:
        store = f"in the way: {error}"
    # How far a training is, not which of its checkpoints is the best.
    trained, refined = (
        CheckpointFolder(config.run_path / name / "checkpoints").latest() for name in ("autoencoder", "refiner")
    )
    return "\n".join(
        [
            f"autoencoder  {autoencoder.parameter_count / 1e6:.1f} M parameters, frames {config.dataset.image_size}x"
            f"{config.dataset.image_size} -> latents {config.autoencoder.model.latent_channels}x{side}x{side}; "
            + _progress(trained, config.autoencoder.training.steps),
            f"store        {config.store_path}: {store}",
            f"flow         {field.parameter_count / 1e6:.1f} M parameters, {side * side + 1} tokens; "
            + _progress(find_flow(config.run_path), config.flow.training.steps),
            f"refiner      {refiner.parameter_count / 1e6:.2f} M parameters, optional; "
            + _progress(refined, config.refiner.training.steps),
        ]
    )


def _progress(checkpoint: Checkpoint | None, steps: int) -> str:
    if checkpoint is not None and is_imported(checkpoint):
        return describe_progress(checkpoint)
    done = 0 if checkpoint is None else checkpoint.step
    return f"{done} of {steps} steps done"
