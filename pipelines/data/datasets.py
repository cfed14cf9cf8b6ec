"""What `make data` does for each kind of data set: fetch, verify, unpack, index, and tell what is there."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from pipelines.config import RiverConfig
from pipelines.data.downloads import RECIPES, Archive, Delivery, free_bytes, only_one_here
from pipelines.data.fetch import FetchError, arrived_bytes, fetch
from pipelines.data.survey import describe, remarks, write_video_list
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import size_text
from pipelines.runtime.progress import say
from stage1_autoencoder.videos import VideoError, VideoSource, dataset_root, open_splits
from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.kth import SEQUENCES_FILE, read_sequences

# Data sets of which nobody has published an archive, and why.
_FRAMES_ONLY = {
    "bair_256": "BAIR at 256x256 exists only as folders of frames that other projects made, not as an archive; they "
    "are taken as they lie"
}
_WAYS_OUT = {
    errno.EACCES: "it must be readable, and what is written to must be writable: change that, or set dataset.root to a "
    "folder of your own",
    errno.EPERM: "it may not be changed: set dataset.root to a folder of your own",
    errno.EROFS: "set dataset.root to a folder that can be written to",
    errno.ENOSPC: "make room there; what is done is kept, and the same command goes on",
}

Say = Callable[[str], None]


def prepare(dataset: DatasetConfig, data_root: str | Path, mirror: str | None, say: Say) -> dict[Split, VideoSource]:
    """Make the raw videos of a data set ready: fetched and unpacked where we know how to, and indexed.

    What is there already is recognised and left as it is. What a stopped run has fetched is gone on from.

    Args:
        data_root: `paths.data` of the config.
        mirror: folder or http(s) URL that holds the archives by their names; None for the makers' own sites.
        say: takes the lines of the report.
    Returns:
        the source of each split that has videos.
    Raises:
        VideoError: something is missing, cannot be fetched, or is damaged.
    """
    root = dataset_root(dataset, data_root)
    delivery = _delivery(dataset, root, mirror)
    if delivery is not None:
        try:
            _deliver(dataset, delivery, say)
        except OSError as error:
            way_out = _WAYS_OUT.get(error.errno or 0)
            message = f"{error.filename or root}: {error.strerror or error}"
            raise VideoError(f"{message}; {way_out}" if way_out else message) from error
    else:
        if mirror:
            say(f"MIRROR is not used: source {dataset.source!r} has nothing to fetch")
        if dataset.name in _FRAMES_ONLY and dataset.source == "videos":
            say(f"{dataset.name}: {_FRAMES_ONLY[dataset.name]}, from {root}")
            _check_frames(dataset.name, root)
    sources = open_splits(dataset, data_root)
    for line in describe(sources):
        say(line)
    return sources


def plan(dataset: DatasetConfig, data_root: str | Path, mirror: str | None) -> list[str]:
    """Tell what `prepare` would do, asking no network and writing nothing.

    Args:
        data_root: `paths.data` of the config.
        mirror: as for `prepare`.
    Returns:
        lines of a report.
    Raises:
        VideoError: there is no such mirror.
        OSError: a folder may not be looked into.
    """
    root = dataset_root(dataset, data_root)
    if dataset.source == "shapes":
        return ["raw videos   drawn, nothing to fetch"]
    delivery = _delivery(dataset, root, mirror)
    if delivery is None:
        there = "is there" if root.is_dir() else "there is no such folder yet"
        lines = [f"raw videos   {root}, {there}; source {dataset.source!r} has nothing to fetch"]
        if dataset.name in _FRAMES_ONLY and dataset.source == "videos":
            lines.append(_FRAMES_ONLY[dataset.name])
        return lines
    delivery.check_mirror()
    lines = [f"raw videos   {root}, {size_text(free_bytes(root))} free"]
    if dataset.source == "kth" and not (root / SEQUENCES_FILE).is_file():
        place = delivery.mirror_folder / SEQUENCES_FILE if delivery.is_local else delivery.url(SEQUENCES_FILE)
        lines.append(f"{SEQUENCES_FILE}: would come from {place}")
    for archive in delivery.recipe.archives:
        lines.append(delivery.why_not_needed(archive) or f"{archive.folder}: {_would(delivery, archive)}")
    return lines


def _would(delivery: Delivery, archive: Archive) -> str:
    """What would be done about an archive that is needed."""
    local = delivery.local(archive)
    if delivery.is_local:
        if not local.is_file():
            return f"would be unpacked from {local}, but that is missing"
        return f"would be unpacked from {local} ({size_text(local.stat().st_size)})"
    if local.is_file():
        return f"would be unpacked from {local} ({size_text(local.stat().st_size)}), which is fetched already"
    have = arrived_bytes(local)
    already = f", going on from the {size_text(have)} that are here" if have else ""
    return f"would be fetched from {delivery.url(archive.path)}{already}"


def _delivery(dataset: DatasetConfig, root: Path, mirror: str | None) -> Delivery | None:
    """How the archives of a data set come; None if it has none."""
    recipe = RECIPES.get(dataset.source)
    if recipe is None:
        return None
    names = "the zips" if dataset.source == "kth" else " ".join(archive.name for archive in recipe.archives)
    way_out = (
        "get the archives by other means and name their folder: "
        f"make data DATASET={dataset.name} MIRROR=<folder with {names}>"
    )
    return Delivery(recipe, root, mirror or None, way_out)


def _deliver(dataset: DatasetConfig, delivery: Delivery, say: Say) -> None:
    delivery.check_mirror()
    todo = []
    for archive in delivery.recipe.archives:
        if why := delivery.why_not_needed(archive):
            say(why)
        else:
            todo.append(archive)
    if missing := delivery.missing_in_mirror(todo):
        raise VideoError(
            f"MIRROR={delivery.mirror}: lacks {', '.join(missing)}; put them there, or name another folder"
        )
    wants_sequences = dataset.source == "kth" and not (delivery.root / SEQUENCES_FILE).is_file()
    if dataset.source == "kth" and not wants_sequences:
        read_sequences(delivery.root / SEQUENCES_FILE)
    if not todo and not wants_sequences:
        return  # nothing is written where all is there: the folder may be read-only
    with only_one_here(delivery.root):
        if wants_sequences:
            _get_sequences(delivery, dataset.sequences, say)
        delivery.deliver(todo, say)


def _get_sequences(delivery: Delivery, needed: bool, say: Say) -> None:
    """Put KTH's file of frame ranges in its place. Without `needed`, a mirror may lack it."""
    target = delivery.root / SEQUENCES_FILE
    aside = delivery.root / f".{SEQUENCES_FILE}"
    try:
        if delivery.is_local:
            shutil.copyfile(delivery.mirror_folder / SEQUENCES_FILE, aside)
        else:
            fetch(delivery.url(SEQUENCES_FILE), aside, way_out=delivery.way_out)
        read_sequences(aside)
    except (FileNotFoundError, FetchError, VideoError) as error:
        aside.unlink(missing_ok=True)
        if delivery.mirror is None or needed:
            raise
        say(f"warning: no {SEQUENCES_FILE} ({error}); it is needed only with dataset.sequences")
        return
    os.replace(aside, target)


def _check_frames(name: str, root: Path) -> None:
    """Raises VideoError if there is nothing in the folder of a data set that cannot be fetched."""
    if not root.is_dir() or all(path.name.startswith(".") for path in root.iterdir()):
        there = "it is empty" if root.is_dir() else "there is no such folder"
        raise VideoError(
            f"{root}: {there}, and {name} cannot be fetched: put the frames there, as "
            f"{root}/{{train,val,test}}/<video>/<frame>.png, or set dataset.root to where they lie"
        )


def prepare_data(config: RiverConfig, run_context: RunContext) -> dict[Split, VideoSource]:
    """Bring the raw videos to where the configuration looks for them, say what is there, and leave a list of it.

    Raises:
        VideoError, UserError: archives or videos that are not what they should be.
    """
    splits = prepare(config.dataset, config.data_root, run_context.mirror, say)
    for line in remarks(config, splits):
        say(line)
    if run_context.processes.is_first:
        path = config.run_path / "videos.tsv"
        count = write_video_list(path, splits)
        say(f"data: {count} videos, listed in {path}")
    return _note_skipped(splits, run_context)


def open_videos(config: RiverConfig, run_context: RunContext) -> dict[Split, VideoSource]:
    """The splits of the raw videos; with a mirror they are fetched from it first, where they lack.

    Raises:
        VideoError: no folder, or no videos in it; says how to get them.
    """
    if run_context.mirror is not None:
        return prepare_data(config, run_context)
    return _note_skipped(open_splits(config.dataset, config.data_root), run_context)


def _note_skipped(splits: dict[Split, VideoSource], run_context: RunContext) -> dict[Split, VideoSource]:
    for source in splits.values():
        for video in source.skipped:
            run_context.skip(video.id, video.reason)
    return splits
