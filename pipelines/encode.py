"""`encode`: all splits through the autoencoder into the store of latents."""

from pathlib import Path
from typing import Any

import torch

import latent_cache
from latent_cache import IncompleteStoreError, StoreMetadata
from latent_cache.schema import PROGRESS_FOLDER
from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.frame_encoder import stored_precision
from pipelines.prepare import open_videos
from pipelines.runtime.progress import say, warn
from pipelines.runtime.runs import software_versions, write_run_files
from pipelines.runtime.session import Session
from pipelines.store_encoder import StoreEncoder
from pipelines.train_autoencoder import (
    find_autoencoder,
    load_trained_autoencoder,
    train_autoencoder,
    weights_digest,
)
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.videos import dataset_root
from stage1_autoencoder.videos.base import VideoSource
from stage1_autoencoder.videos.preprocessing import preprocessing_description
from stage1_autoencoder.videos.table import VideoTable
from stage1_autoencoder.views import views_description

# fp16 storage may move so many latents to another code before it is worth a warning.
MOST_CODES_CHANGED = 1e-3


def encode(config: RiverConfig, session: Session) -> Path:
    """Encode every split, or recognise that this was done; trains the autoencoder first when there is none.

    Returns:
        The store's path.
    Raises:
        UserError: a complete store of another autoencoder, other preprocessing or other videos, without --overwrite.
        StoreError: an incomplete store of another origin; a store that another process writes; a full disk.
        StoppedBySignal: after SIGINT or SIGTERM; finished chunks are kept.
    """
    checkpoint = train_autoencoder(config, session.for_prerequisites())
    autoencoder = load_trained_autoencoder(checkpoint, session.device)
    path = config.store_path
    if not session.overwrite and store_is_complete(path):
        check_store(config, weights_digest(autoencoder))
        check_layout(config)
        here = config.dataset.source == "shapes" or dataset_root(config.dataset, config.data_root).exists()
        if here or session.mirror is not None:
            check_sources(config, open_videos(config, session))
        say(f"store: done, {path}" + ("" if here else " (its videos are not here to compare)"))
        return path

    splits = open_videos(config, session)
    write_run_files(config, session.device)
    metadata = store_metadata(config, autoencoder, splits)
    encoder = StoreEncoder(config, session, checkpoint, autoencoder, splits, metadata)
    for report in encoder.run(overwrite=session.overwrite):
        say(report.line())
        if report.codes_changed > MOST_CODES_CHANGED:
            warn(
                f"store: {report.split}: {config.cache.dtype} storage moved {report.codes_changed:.2%} of the latents "
                "to another code: set cache.dtype to float32 and encode again with --overwrite, or train an "
                "autoencoder with smaller latents"
            )
    say(f"store: complete, {path}")
    return path


def store_is_complete(path: Path) -> bool:
    """Whether there is a whole store at a path; an incomplete or missing one is not."""
    return path.exists() and latent_cache.is_complete(path)


def store_metadata(config: RiverConfig, autoencoder: Autoencoder, splits: dict[str, VideoSource]) -> StoreMetadata:
    """What the store says about itself."""
    fps = next(iter(splits.values())).videos[0].fps
    return StoreMetadata(
        dataset=config.dataset.name,
        fps=fps,
        preprocessing=store_preprocessing(config),
        autoencoder={
            "architecture": autoencoder.config.architecture,
            "sha256": weights_digest(autoencoder),
            "downsampling": autoencoder.downsampling,
            "latent_channels": autoencoder.config.latent_channels,
            "codes": autoencoder.config.codes,
        }
        | how_computed(config),
        software=software_versions(),
    )


def how_computed(config: RiverConfig) -> dict[str, Any]:
    """What the latents' last digits depend on besides the weights; nothing where all is as by default."""
    cache = config.cache
    return ({} if cache.precision == "fp32" else {"precision": cache.precision}) | (
        {"compiled": True} if cache.compile else {}
    )


def store_preprocessing(config: RiverConfig) -> dict[str, Any]:
    """All that is done to the videos' frames before the autoencoder sees them."""
    views = list(config.cache.views)
    return preprocessing_description(config.dataset) | {"views": views} | views_description(views)


def check_layout(config: RiverConfig) -> None:
    """Refuse a complete store that is laid out otherwise than the configuration wants.

    Raises:
        UserError: another dtype or precision, with or without codes, other chunks (where they are asked for); both
            sides are shown.
    """
    cache, store = config.cache, latent_cache.open(config.store_path)
    changed = [
        f"cache.{key}: {there} in the store, {wanted} in the configuration"
        for key, there, wanted in (
            ("dtype", store.latents.dtype.name, cache.dtype),
            ("codes", store.codes is not None, cache.codes),
            ("precision", stored_precision(store.metadata), cache.precision),
            ("chunk_frames", store.latents.chunks[0], cache.chunk_frames or store.latents.chunks[0]),
        )
        if there != wanted
    ]
    if changed:
        raise UserError(
            f"{config.store_path} is laid out otherwise:\n  " + "\n  ".join(changed)
            + "\nencode again with `encode --overwrite`, or go back to the old values"
        )  # fmt: skip


def check_sources(config: RiverConfig, splits: dict[str, VideoSource]) -> None:
    """Refuse a complete store whose videos are not those that are there now.

    Raises:
        UserError: videos were added, removed or replaced since they were encoded; names them.
    """
    path = config.store_path
    changes = []
    stored_splits = latent_cache.splits(path)
    skipped = latent_cache.open_notes(path).get("skipped", {})
    for split in {**dict.fromkeys(stored_splits), **splits}:
        videos = VideoTable.of(splits[split].videos if split in splits else [])
        now = dict(zip(videos.ids, videos.fingerprints, strict=True))
        before = dict(skipped.get(split, {}))  # could not be decoded, and were as they are now
        if split in stored_splits:
            cache = latent_cache.open(path, split)
            before |= dict(zip(cache.video_ids, cache.fingerprints, strict=True))
        for what, ids in (
            ("added", now.keys() - before.keys()),
            ("removed", before.keys() - now.keys()),
            ("replaced", {video for video in now.keys() & before.keys() if now[video] != before[video]}),
        ):
            if ids:
                names = ", ".join(sorted(ids)[:5]) + (", ..." if len(ids) > 5 else "")
                changes.append(f"{split}: {len(ids)} {what}: {names}")
    if changes:
        raise UserError(
            f"{path} is complete, but its videos have changed since:\n  " + "\n  ".join(changes)
            + "\nencode them with `encode --overwrite`, or bring the old videos back"
        )  # fmt: skip


def check_store(config: RiverConfig, autoencoder_digest: str) -> None:
    """Refuse a store that was made otherwise than this configuration would.

    Raises:
        UserError: another autoencoder, or other preprocessing; both sides are shown.
    """
    metadata = latent_cache.open_metadata(config.store_path)
    stored = metadata.autoencoder["sha256"]
    if stored != autoencoder_digest:
        raise UserError(
            f"{config.store_path} was encoded by autoencoder {stored[:12]}..., but {config.run_path}/autoencoder holds "
            f"{autoencoder_digest[:12]}...: encode again with `encode --overwrite`, or bring the autoencoder back"
        )
    wanted = store_preprocessing(config)
    changed = [
        f"{key}: {metadata.preprocessing.get(key)!r} in the store, {value!r} in the configuration"
        for key, value in wanted.items()
        if metadata.preprocessing.get(key) != value
    ]
    if changed:
        raise UserError(
            f"{config.store_path} was made with other preprocessing:\n  " + "\n  ".join(changed)
            + "\nencode again with `encode --overwrite`, or go back to the old values"
        )  # fmt: skip


def ensure_store(config: RiverConfig, session: Session) -> Path:
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
    if session.processes.count > 1:
        raise UserError(f"{path}: no complete store; `encode` makes it, in one process, before this")
    return encode(config, session.for_prerequisites())
