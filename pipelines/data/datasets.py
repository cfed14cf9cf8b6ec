"""The raw videos of a run: got from where they are published, indexed, summarized, opened."""

import contextlib
from dataclasses import replace
from typing import Any

import latent_cache
from latent_cache import StoreError
from pipelines.config import RiverConfig
from pipelines.data.downloads import PUBLISHED, Download
from pipelines.data.video_summary import summarize, write_video_list
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import free_bytes, size_text
from pipelines.runtime.progress import say
from pipelines.runtime.status import Status
from stage1_autoencoder.videos import SPLITS, VideoError, VideoSource, dataset_root, open_splits
from stage1_autoencoder.videos.config import Split

# Data sets of which nobody has published an archive, by name.
_NOT_PUBLISHED = {
    "bair_256": "BAIR at 256x256 is not published as an archive: put frames that you have into "
    "{root}/{{train,val,test}}/<video>/<frame>.png, or set dataset.root to their folder"
}


def prepare_data(config: RiverConfig, run_context: RunContext) -> dict[Split, VideoSource]:
    """Download, verify, unpack and index the raw videos, print a summary, and write the run's `videos.tsv`.

    What is there already is kept, and interrupted downloads are resumed.

    Returns:
        the source of each split that has videos.
    Raises:
        VideoError, UserError: something is missing, cannot be downloaded, or is damaged.
    """
    download = _download(config, run_context.mirror)
    if download is not None:
        download.run()
    elif run_context.mirror:
        say(f"--mirror is ignored: nothing to download for source {config.dataset.source!r}")
    status = videos_status(config)
    if config.dataset.name in _NOT_PUBLISHED and status.state == "missing":
        raise VideoError(f"{status.path}: no videos here. {status.detail}")
    splits = open_raw_splits(config)
    for line in summarize(config, splits):
        say(line)
    if run_context.processes.is_first:
        path = config.shared.run_path / "videos.tsv"
        count = write_video_list(path, splits)
        say(f"data: {count} videos, listed in {path}")
    return _report_skipped(splits, run_context)


def open_videos(config: RiverConfig, run_context: RunContext) -> dict[Split, VideoSource]:
    """Open the splits of the raw videos. With a mirror, what is missing is taken from it first.

    Raises:
        VideoError: no folder, or no videos in it; says how to get them.
    """
    if run_context.mirror:
        return prepare_data(config, run_context)
    return _report_skipped(open_raw_splits(config), run_context)


def open_raw_splits(config: RiverConfig, remember: bool = True) -> dict[Split, VideoSource]:
    """Open the splits of the raw videos that are here, see `open_splits`; videos of the store stay in its splits."""
    return open_splits(config.dataset, config.data_root, remember, stored_splits(config))


def stored_splits(config: RiverConfig) -> dict[str, Split]:
    """Splits of the store's videos by id, if it is complete and fractions divide the videos as they did then.

    Stores that were written before they said how their videos were divided count as divided by this configuration.
    """
    path, note, stored = config.store_path, division_note(config), dict[str, Split]()
    # Whatever is wrong with the store is reported by its own stage.
    with contextlib.suppress(StoreError):
        if note and latent_cache.is_complete(path):
            notes = latent_cache.open_notes(path)
            if notes.get("division", note["division"]) == note["division"]:
                for split in reversed(SPLITS):  # with folders of their own, test videos may be named as training videos
                    if split in latent_cache.splits(path):
                        stored |= dict.fromkeys(latent_cache.open(path, split).video_ids, split)
                    stored |= dict.fromkeys(notes.get("skipped", {}).get(split, {}), split)
    return stored


def division_note(config: RiverConfig) -> dict[str, Any]:
    """What a store's notes say about how its videos were divided; nothing where fractions do not divide them."""
    rule = config.dataset.model_dump(mode="json", include={"splits", "split_seed"})
    return {"division": rule} if config.dataset.is_divided else {}


def videos_status(config: RiverConfig) -> Status:
    """How much of the raw videos is there. Looks at names and sizes of files, at no content and no network."""
    dataset, root = config.dataset, dataset_root(config.dataset, config.data_root)
    if dataset.source == "shapes":
        return Status("done", "drawn on demand", root)
    download = _download(config, None)
    if download is None:
        if root.is_dir() and any(path.name[0] != "." for path in root.iterdir()):
            return Status("done", f"source {dataset.source!r}, nothing to download", root)
        way_out = _NOT_PUBLISHED.get(dataset.name, "put the videos there, or set dataset.root to their folder")
        return Status("missing", way_out.format(root=root), root)
    statuses = [download.status(archive) for archive in download.published.archives]
    done = sum(status.is_done for status in statuses)
    detail = f"{done} of {len(statuses)} archives unpacked"
    if done == len(statuses) and not download.needs_sequences():
        return Status("done", detail, root)
    started = any(status.state != "missing" for status in statuses)
    return Status("partial" if started else "missing", f"{detail}; run `river data --config {dataset.name}`", root)


def preview_data(config: RiverConfig, run_context: RunContext) -> None:
    """Print what `prepare_data` would download, and a summary of the videos that are there. Writes nothing.

    Raises:
        VideoError: the user's own videos are missing or cannot be used.
    """
    dataset, root = config.dataset, dataset_root(config.dataset, config.data_root)
    say(f"data: {dataset.name}, source {dataset.source}, in {root}")
    download = _download(config, run_context.mirror)
    if download is None:
        status = videos_status(config)
        say(f"raw videos   {status.state}: {status.detail}")
    else:
        download.check_mirror()
        say(f"raw videos   {size_text(free_bytes(root))} free in {root}")
        for line in download.plan():
            say(line)
    try:
        sources = open_raw_splits(config, remember=False)
    except VideoError as error:
        if download is None:
            raise
        say(f"not there yet: {error}")
        return
    for line in summarize(config, sources):
        say(line)
    _report_skipped(sources, replace(run_context, strict=False))


def _download(config: RiverConfig, mirror: str | None) -> Download | None:
    """How the archives of the data set are got; None if none are published."""
    if config.dataset.source not in PUBLISHED:
        return None
    return Download(config.dataset, dataset_root(config.dataset, config.data_root), mirror or None)


def _report_skipped(splits: dict[Split, VideoSource], run_context: RunContext) -> dict[Split, VideoSource]:
    for source in splits.values():
        for video in source.skipped:
            run_context.skip(video.id, video.reason)
    return splits
