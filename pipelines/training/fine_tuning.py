"""`train-flow --fine-tune`: a new training of the flow that starts from the weights of the existing one."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import latent_cache
from latent_cache import LatentCache
from pipelines.config import RiverConfig, differences, model_sizes
from pipelines.errors import UserError
from pipelines.loading import standardization_in, weights_digest
from pipelines.runtime.checkpoints import Checkpoint, CheckpointFolder, Tensors
from pipelines.runtime.context import RunContext
from pipelines.runtime.progress import say, warn
from pipelines.runtime.run_folder import (
    chosen_checkpoint,
    has_only_weights,
    is_fine_tuned,
    move_to_backup,
    only_training_of,
)
from stage2_flow.config import VectorFieldConfig
from stage2_flow.standardization import Standardization
from stage2_flow.vector_field import VectorField

# (configuration, store, standardization) -> what a checkpoint of a training on it records.
FlowState = Callable[[RiverConfig, LatentCache, Standardization], dict[str, Any]]


def fine_tune(config: RiverConfig, run_context: RunContext, flow_state: FlowState) -> RunContext:
    """Begin to fine-tune the existing flow, unless that was begun already.

    Returns:
        The run context to train with from here: from step 0, or from where an earlier fine-tuning stopped.
    Raises:
        UserError: nothing to start from; a training that is not finished; weights that can't be trained further on
            this store with this configuration; `--resume` beside it. Nothing was changed.
        StoreError: no complete store.
    """
    processes = run_context.processes
    start = check_fine_tuning(config, run_context)
    processes.wait()  # all have seen the existing flow before the first one moves it
    if start is not None:
        cache = latent_cache.open(config.store_path, "train")
        _check_start(start, config, cache)
        with processes.first_before_others():
            if processes.is_first:
                _begin(config, start, cache, flow_state)
    return replace(run_context, restart=False, fine_tune=False)


def finish_beginning(folder: Path) -> None:
    """Clean up after a process that was killed while it began to fine-tune.

    Args:
        folder: the flow's.
    Raises:
        UserError: another process is beginning one at this moment.
    """
    beginning = _beginning(folder)
    if not beginning.is_dir():
        return
    with only_training_of(beginning):
        if (folder / "checkpoints").exists():  # killed before the previous flow was moved, which is still in place
            shutil.rmtree(beginning)
            return
        shutil.rmtree(folder, ignore_errors=True)
        beginning.rename(folder)
    say(f"flow: fine-tuning was interrupted while it began; it is complete now, in {folder}")


def check_fine_tuning(config: RiverConfig, run_context: RunContext) -> Checkpoint | None:
    """Find the checkpoint to start from: the run's best one; None to resume an earlier fine-tuning.

    Raises:
        UserError: there is none; it belongs to a training that is not finished; `--resume` beside it.
    """
    if run_context.resume != "auto":
        raise UserError(
            f"--resume {run_context.resume} continues a training and --fine-tune begins one: use one of them"
        )
    folder = config.run_path / "flow"
    newest = CheckpointFolder(folder / "checkpoints").latest()
    if newest is None:
        raise UserError(
            f"--fine-tune needs weights to start from, and {folder}/checkpoints has none: import official ones with "
            "`import-official`, or train from random weights with `train-flow`"
        )
    if not run_context.restart and not _is_start(newest):
        if is_fine_tuned(newest):
            return None
        steps = None if has_only_weights(newest) else newest.state["settings"]["flow"]["training"]["steps"]
        if steps is not None and newest.step < steps:
            raise UserError(
                f"{newest.path} is at step {newest.step} of {steps} of an ordinary training: finish it with "
                "`train-flow`, or start from its current weights with `train-flow --fine-tune --restart` (the existing "
                "training is moved to a backup)"
            )
    return chosen_checkpoint(folder)


def _check_start(start: Checkpoint, config: RiverConfig, cache: LatentCache) -> None:
    """Refuse weights that can't be trained further on this store with this configuration.

    Raises:
        UserError: other sizes; latents of another autoencoder; standardized instead of raw latents, or vice versa.
    """
    ours, theirs = ({"flow": {"model": model_sizes(sizes)}} for sizes in (config.flow.model, _sizes(start)))
    changed = differences(ours, theirs)
    if changed:
        raise UserError(
            f"{start.path} differs in size from the configuration:\n  " + "\n  ".join(changed)
            + "\nfine-tune with the sizes of the checkpoint, or train from random weights with `train-flow --restart` "
            "(the existing flow is moved to a backup)"
        )  # fmt: skip
    knows, stored = start.state["store"]["autoencoder"], cache.metadata.autoencoder["sha256"]
    if knows != stored:
        raise UserError(
            f"{cache.url} was encoded by autoencoder {stored[:12]}..., and {start.path} was trained on "
            f"latents of {knows[:12]}...: restore that autoencoder in {config.training_folder('autoencoder')} (for "
            "imported weights: `import-official`) and `encode --overwrite`, or train from random weights on this "
            "store with `train-flow --restart`"
        )
    standardized = not takes_raw_latents(start)
    if config.flow.training.standardize != standardized:
        known, right = ("standardized", "true") if standardized else ("raw", "false")
        raise UserError(
            f"flow.training.standardize: {str(not standardized).lower()}, but {start.path} was trained on {known} "
            f"latents: set flow.training.standardize={right}"
        )
    before, now = start.state["latent_shape"][1:], cache.latent_shape[1:]
    if any(side > learned for side, learned in zip(now, before, strict=True)):
        warn(
            f"flow: {start.path} was trained on latents of {before[0]}x{before[1]}, and {cache.url} has {now[0]}x"
            f"{now[1]}: position codes beyond the former size are random"
        )


def _begin(config: RiverConfig, start: Checkpoint, cache: LatentCache, flow_state: FlowState) -> None:
    """Replace the existing flow by a checkpoint of step 0 with its weights; the existing flow is moved to a backup.

    A plain `train-flow` resumes from there. Killed at any moment, either the previous flow or the new one is in place,
    or `finish_beginning` puts the new one there.
    """
    weights = start.tensors("ema" if start.has("ema") else "model")
    # No moments: the optimizer starts from scratch, as does the warm-up.
    files: dict[str, Tensors] = {"model": weights, "optimizer": {}}
    if config.flow.training.ema_decay is not None:
        files["ema"] = weights
    # The statistics that the weights were trained with, not those of this store.
    state = flow_state(config, cache, standardization_in(start))
    if _is_start(start):
        state["fine_tuned_from"] = start.state["fine_tuned_from"]
    else:
        kept = {key: start.state[key] for key in ("store", "imported", "fine_tuned_from") if key in start.state}
        state["fine_tuned_from"] = {"step": start.step, "weights": _digest(start, weights), **kept}
    folder = config.run_path / "flow"
    beginning = _beginning(folder)
    with only_training_of(beginning):
        CheckpointFolder(beginning / "checkpoints").save(0, files, state)
        backup = move_to_backup(folder, "flow", "--fine-tune; the previous flow")
        beginning.rename(folder)
    if _is_start(start):
        shutil.rmtree(backup)  # its weights are kept in an earlier backup


def _is_start(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is step 0 of a fine-tuning."""
    return is_fine_tuned(checkpoint) and checkpoint.step == 0


def _beginning(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.beginning")


def _sizes(checkpoint: Checkpoint) -> VectorFieldConfig:
    try:
        return VectorFieldConfig.model_validate(checkpoint.state["model"])
    except ValueError as error:
        raise UserError(f"{checkpoint.path}: invalid sizes in state.json: {error}") from None


def _digest(start: Checkpoint, weights: Tensors) -> str:
    """The sha256 that `import-official` computes for the same weights."""
    with torch.device("meta"):
        field = VectorField(_sizes(start), start.state["latent_shape"][0])
    try:
        field.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(f"{start.path}: weights don't fit the sizes in state.json: {error}") from None
    return weights_digest(field)


def takes_raw_latents(start: Checkpoint) -> bool:
    """Whether a flow was trained on raw latents."""
    standardization = standardization_in(start)
    return bool((standardization.mean == 0).all() and (standardization.std == 1).all())
