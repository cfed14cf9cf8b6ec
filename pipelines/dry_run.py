"""What a command would find and do: the text of `--dry-run`."""

import torch

import latent_cache
from latent_cache import StoreError
from pipelines.config import RiverConfig
from pipelines.runtime.checkpoints import Checkpoint, CheckpointFolder
from pipelines.runtime.context import resolve_precision
from pipelines.runtime.runs import describe_progress, is_imported
from pipelines.runtime.throughput import step_flops
from pipelines.training.flow_memory import estimate_memory
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.rcan import RCAN
from stage2_flow.vector_field import VectorField


def describe_plan(config: RiverConfig, device: torch.device) -> str:
    """Sizes of the networks, how far each stage is, and what a step of the flow would take on a device."""
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
    trained, flow, refined = (
        CheckpointFolder(config.run_path / name / "checkpoints").latest() for name in ("autoencoder", "flow", "refiner")
    )
    return "\n".join(
        [
            f"autoencoder  {autoencoder.parameter_count / 1e6:.1f} M parameters, frames {config.dataset.image_size}x"
            f"{config.dataset.image_size} -> latents {config.autoencoder.model.latent_channels}x{side}x{side}; "
            + _progress(trained, config.autoencoder.training.steps),
            f"store        {config.store_path}: {store}",
            f"flow         {field.parameter_count / 1e6:.1f} M parameters, {side * side + 1} tokens; "
            + _progress(flow, config.flow.training.steps),
            *(f"{'':13}{line}" for line in _flow_costs(config, (field.latent_channels, side, side), device)),
            f"refiner      {refiner.parameter_count / 1e6:.2f} M parameters, optional; "
            + _progress(refined, config.refiner.training.steps),
        ]
    )


def _flow_costs(config: RiverConfig, latent_shape: tuple[int, int, int], device: torch.device) -> list[str]:
    """What a training step of the flow computes, and the memory that it takes."""
    training, residency = config.flow.training, config.cache.residency
    beside = device.type == "cuda" and residency in ("host", "stream")
    latents = 0 if beside else _latents_in_memory(config)
    memory = estimate_memory(config.flow.model, training, latent_shape, device=device.type, latents_bytes=latents)
    lines = [
        f"{step_flops(config.flow.model, latent_shape, training.batch_size) / 1e9:.0f} GFLOP a training step of "
        f"{training.batch_size} samples",
        f"memory of a step on {device}, {resolve_precision(training.precision, device)}, not compiled, at its peak "
        f"{memory.describe()}",
    ]
    if beside:
        lines.append(f"latents in the host's memory (cache.residency {residency})")
    elif not latents:
        lines.append("latents come to it; there is no store yet that tells how much they take")
    if residency == "auto":
        lines.append("cache.residency auto: latents lie on the device where they fit into half of what it has free")
    return lines


def _latents_in_memory(config: RiverConfig) -> int:
    """Bytes that training holds of its split's latents; 0 where there are none yet."""
    try:
        if not config.store_path.exists() or not latent_cache.is_complete(config.store_path):
            return 0
        size = latent_cache.open(config.store_path, "train").nbytes
    except StoreError:
        return 0
    return min(size, config.cache.memory_budget_bytes) if config.cache.residency == "stream" else size


def _progress(checkpoint: Checkpoint | None, steps: int) -> str:
    if checkpoint is not None and is_imported(checkpoint):
        return describe_progress(checkpoint)
    done = 0 if checkpoint is None else checkpoint.step
    return f"{done} of {steps} steps done"
