"""`encode`: all splits through the autoencoder into the store of latents."""

from pathlib import Path

import torch

from latent_cache import IncompleteStoreError
from latent_cache.schema import PROGRESS_FOLDER
from pipelines.config import RiverConfig
from pipelines.data.datasets import open_videos
from pipelines.encoding.store_checks import (
    check_layout,
    check_sources,
    check_store,
    store_is_complete,
    store_metadata,
)
from pipelines.encoding.store_encoder import StoreEncoder
from pipelines.errors import UserError
from pipelines.loading import find_autoencoder, load_trained_autoencoder, weights_digest
from pipelines.runtime.context import RunContext
from pipelines.runtime.progress import say, warn
from pipelines.runtime.runs import write_run_files
from pipelines.training.autoencoder_stage import train_autoencoder
from stage1_autoencoder.videos import dataset_root

# fp16 storage may move so many latents to another code before it is worth a warning.
MOST_CODES_CHANGED = 1e-3


def encode(config: RiverConfig, run_context: RunContext) -> Path:
    """Encode every split, or recognise that this was done; trains the autoencoder first when there is none.

    Returns:
        The store's path.
    Raises:
        UserError: a complete store of another autoencoder, other preprocessing or other videos, without --overwrite.
        StoreError: an incomplete store of another origin; a store that another process writes; a full disk.
        StoppedBySignal: after SIGINT or SIGTERM; finished chunks are kept.
    """
    checkpoint = train_autoencoder(config, run_context.for_prerequisites())
    autoencoder = load_trained_autoencoder(checkpoint, run_context.device)
    path = config.store_path
    if not run_context.overwrite and store_is_complete(path):
        check_store(config, weights_digest(autoencoder))
        check_layout(config)
        here = config.dataset.source == "shapes" or dataset_root(config.dataset, config.data_root).exists()
        if here or run_context.mirror is not None:
            check_sources(config, open_videos(config, run_context))
        say(f"store: done, {path}" + ("" if here else " (its videos are not here to compare)"))
        return path

    splits = open_videos(config, run_context)
    write_run_files(config, run_context.device)
    metadata = store_metadata(config, autoencoder, splits)
    encoder = StoreEncoder(config, run_context, checkpoint, autoencoder, splits, metadata)
    for report in encoder.run(overwrite=run_context.overwrite):
        say(report.line())
        if report.codes_changed > MOST_CODES_CHANGED:
            warn(
                f"store: {report.split}: {config.cache.dtype} storage moved {report.codes_changed:.2%} of the latents "
                "to another code: set cache.dtype to float32 and encode again with --overwrite, or train an "
                "autoencoder with smaller latents"
            )
    say(f"store: complete, {path}")
    return path


def ensure_store(config: RiverConfig, run_context: RunContext) -> Path:
    """The complete store of this configuration; encodes (and trains the autoencoder) when it is missing or half done.

    Raises:
        IncompleteStoreError: it is not complete, and nothing tells that an encoding of it was interrupted here.
        UserError: it was made otherwise than this configuration would; it is missing, and this is one of several
            processes.
    """
    path = config.store_path
    if not store_is_complete(path) and (path / "zarr.json").exists() and not (path / PROGRESS_FOLDER).exists():
        raise IncompleteStoreError(
            f"{path}: the store is not complete, and not one whose encoding was interrupted here: copied before it was "
            "done, or altered. Copy it again, or write it anew with `make encode`; nothing is trained on a part of it"
        )
    if store_is_complete(path):
        checkpoint = find_autoencoder(config.run_path)
        if checkpoint is not None:  # a store alone is enough to train on
            check_store(config, weights_digest(load_trained_autoencoder(checkpoint, torch.device("cpu"))))
        return config.store_path
    if run_context.processes.count > 1:
        raise UserError(f"{path}: no complete store; `encode` makes it, in one process, before this")
    return encode(config, run_context.for_prerequisites())
