"""The store of a configuration: what it must say about itself, how far it is, and whether it is the right one."""

import statistics
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import latent_cache
from latent_cache import StoreError, StoreMetadata
from latent_cache.schema import PROGRESS_FOLDER
from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.loading import autoencoder_digest, find_autoencoder, weights_digest
from pipelines.runtime.run_folder import software_versions
from pipelines.runtime.status import Status
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.frame_encoder import Precision
from stage1_autoencoder.videos.preprocessing import preprocessing_description
from stage1_autoencoder.videos.source import VideoSource, VideoTable
from stage1_autoencoder.views import views_description

MOST_NAMES = 5  # videos named in one line


def store_status(config: RiverConfig) -> Status:
    """How far the store is. Raises nothing: whatever is wrong is told in `detail`, with the path and the way out.

    The store is `conflicting` when other preprocessing or another autoencoder than the one in the run folder made it;
    when it is incomplete and `encode` did not stop here; and when something that is no store has its path. Without an
    autoencoder in the run folder nothing is compared: a store alone is enough to train on.
    """
    path = config.store_path
    try:
        if latent_cache.is_complete(path):
            _check_origin(config)
            return Status("done", "complete", path)
        if not path.exists() or not any(path.iterdir()):
            return Status("missing", "no store", path)
        if not (path / PROGRESS_FOLDER).exists():
            raise UserError(
                f"{path}: the store is not complete, and no interrupted `encode` left it: it was copied "
                "too early or changed. Copy it again, or write all of it with `encode --overwrite`"
            )
        if latent_cache.has_only_begun(path):
            return Status("partial", "no chunk is written yet", path)
        _check_origin(config)
        splits = latent_cache.open_progress(path).values()
        written, chunks = sum(split.written for split in splits), sum(split.chunks for split in splits)
        return Status("partial", f"{written} of {chunks} chunks are written", path)
    except (StoreError, UserError, OSError) as error:
        return Status("conflicting", str(error), path)


def _check_origin(config: RiverConfig) -> None:
    """Refuse a store, complete or not, of another autoencoder than the run's or of other preprocessing."""
    checkpoint = find_autoencoder(config.shared.run_path)
    if checkpoint is None:
        return
    metadata = latent_cache.open_metadata(config.store_path)
    stored = metadata.autoencoder["sha256"]
    here = autoencoder_digest(checkpoint)
    if stored != here:
        raise UserError(
            f"{config.store_path} was encoded by autoencoder {stored[:12]}..., but "
            f"{config.training_folder('autoencoder')} holds {here[:12]}...: encode again with "
            "`encode --overwrite`, or restore the autoencoder"
        )
    there, wanted = metadata.preprocessing, store_preprocessing(config)
    _refuse(
        f"{config.store_path} has other preprocessing",
        [
            f"{key}: {there.get(key)!r} in the store, {wanted.get(key)!r} in the configuration"
            for key in {**there, **wanted}
            if there.get(key) != wanted.get(key)
        ],
    )


def store_metadata(config: RiverConfig, autoencoder: Autoencoder, splits: dict[str, VideoSource]) -> StoreMetadata:
    """Attributes of a store that is about to be written."""
    return StoreMetadata(
        dataset=config.dataset.name,
        fps=statistics.mode(VideoTable.of(next(iter(splits.values())).videos).fps.tolist()),
        preprocessing=store_preprocessing(config),
        autoencoder={
            "architecture": autoencoder.config.architecture,
            "sha256": weights_digest(autoencoder),
            "downsampling": autoencoder.downsampling,
            "latent_channels": autoencoder.config.latent_channels,
            "codes": autoencoder.config.codes,
        }
        # Settings that change the last digits of latents, without those at their defaults.
        | ({} if config.cache.precision == "fp32" else {"precision": config.cache.precision})
        | ({"compiled": True} if config.cache.compile else {}),
        software=software_versions(),
    )


def stored_precision(metadata: StoreMetadata) -> Precision:
    """Precision that the latents of a store were computed in."""
    return metadata.autoencoder.get("precision", "fp32")


def store_preprocessing(config: RiverConfig) -> dict[str, Any]:
    """All that happens to the frames of the videos before the autoencoder sees them."""
    views = list(config.cache.views)
    return preprocessing_description(config.dataset) | {"views": views} | views_description(views)


def preview_size(config: RiverConfig) -> tuple[int, int] | None:
    """Height and width of the small frames in the store, at most those of the frames; None if there are none."""
    if not config.cache.preview:
        return None
    height, width = config.dataset.frame_size
    scale = min(1, config.cache.preview / min(height, width))
    return round(height * scale), round(width * scale)


def check_layout(config: RiverConfig) -> None:
    """Refuse a complete store of another dtype, precision or chunk size, or that differs in having codes or a preview.

    Raises:
        UserError: shows both sides.
    """
    cache, store = config.cache, latent_cache.open(config.store_path)
    small = preview_size(config)
    _refuse(
        f"{config.store_path} has another layout",
        [
            f"cache.{key}: {there} in the store, {wanted} in the configuration"
            for key, there, wanted in (
                ("dtype", store.latents.dtype.name, cache.dtype),
                ("codes", store.codes is not None, cache.codes),
                ("preview", 0 if store.preview is None else min(store.preview.shape[1:3]), min(small) if small else 0),
                ("precision", stored_precision(store.metadata), cache.precision),
                ("chunk_frames", store.latents.chunks[0], cache.chunk_frames or store.latents.chunks[0]),
            )
            if there != wanted
        ],
    )


def _refuse(what: str, changed: Sequence[str]) -> None:
    if changed:
        raise UserError(
            f"{what}:\n  " + "\n  ".join(changed)
            + "\nencode again with `encode --overwrite`, or go back to the old values"
        )  # fmt: skip


def check_sources(config: RiverConfig, splits: dict[str, VideoSource]) -> None:
    """Refuse a complete store whose videos have changed since they were encoded.

    Raises:
        UserError: names videos that were added, removed or replaced.
    """
    if added := added_videos(config, splits):
        _refuse_changes(config.store_path, _changes(added, "added"), "add them with `encode`")


def added_videos(config: RiverConfig, splits: dict[str, VideoSource]) -> dict[str, set[str]]:
    """Ids of the videos that a complete store does not have, by split; splits without any are left out.

    Raises:
        UserError: videos were removed or replaced since they were encoded; names these and the added ones.
    """
    path = config.store_path
    added, changes = dict[str, set[str]](), []
    stored_splits = latent_cache.splits(path)
    skipped = latent_cache.open_notes(path).get("skipped", {})
    for split in {**dict.fromkeys(stored_splits), **splits}:
        videos = VideoTable.of(splits[split].videos if split in splits else [])
        now = dict(zip(videos.ids, videos.fingerprints, strict=True))
        before = dict(skipped.get(split, {}))  # videos that could not be decoded count as encoded
        if split in stored_splits:
            cache = latent_cache.open(path, split)
            before |= dict(zip(cache.video_ids, cache.fingerprints, strict=True))
        if new := now.keys() - before.keys():
            added[split] = set(new)
        changes += _changes({split: before.keys() - now.keys()}, "removed")
        replaced = {video for video in now.keys() & before.keys() if now[video] != before[video]}
        changes += _changes({split: replaced}, "replaced")
    if changes:
        way_out = "encode them with `encode --overwrite`, or restore the old videos"
        _refuse_changes(path, [*_changes(added, "added"), *changes], way_out)
    return added


def _changes(videos: Mapping[str, Set[str]], what: str) -> list[str]:
    """A line for each split: how many of its videos are `what`, and the first ones."""
    lines = []
    for split, ids in videos.items():
        names = ", ".join(sorted(ids)[:MOST_NAMES]) + (", ..." if len(ids) > MOST_NAMES else "")
        lines += [f"{split}: {len(ids)} {what}: {names}"] if ids else []
    return lines


def _refuse_changes(path: Path, changes: Sequence[str], way_out: str) -> None:
    lines = "\n  ".join(changes)
    raise UserError(f"{path} is complete, but its videos have changed since:\n  {lines}\n{way_out}")
