"""Checks of a complete store against its configuration."""

from pathlib import Path
from typing import Any

import latent_cache
from latent_cache import StoreMetadata
from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.loading import weights_digest
from pipelines.runtime.runs import software_versions
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.frame_encoder import Precision
from stage1_autoencoder.videos.preprocessing import preprocessing_description
from stage1_autoencoder.videos.source import VideoSource, VideoTable
from stage1_autoencoder.views import views_description


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


def stored_precision(metadata: StoreMetadata) -> Precision:
    """In which precision the latents of a store were computed; fp32 leaves no mark."""
    return metadata.autoencoder.get("precision", "fp32")
