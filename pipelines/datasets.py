"""What `make data` does for each kind of data set: fetch, verify, unpack, index, and tell what is there."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from pipelines.archives import read_marker, sha1_of, unpack_zip
from pipelines.fetch import FetchError, fetch, is_url
from pipelines.survey import describe
from stage1_autoencoder.videos import VideoError, VideoSource, dataset_root, open_splits
from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.kth import SEQUENCES_FILE, read_sequences

KTH_URL = "http://www.csc.kth.se/cvap/actions"

# As other projects recorded them.
KTH_SHA1 = {
    "boxing": "adb36ed9c29c846d44d2ba15f348bd115c951bbd",
    "handclapping": "d3b81261aa822ef63d0d1523f945bfaff27814d2",
    "handwaving": "0792f7cd69f7f895a205c08ac212ddaa7177e370",
    "jogging": "21943bdbcef9dad106db0d74661e49eaeaa15a25",
    "running": "da83bb313edfd4455fffdda6263696fa10d43c6f",
    "walking": "a3e81537271a0ab4576591774baa38c2d97b7e3a",
}

_WAY_OUT = "get the archives by other means and name their folder: make data DATASET=kth MIRROR=<folder with the zips>"

Say = Callable[[str], None]


def prepare(dataset: DatasetConfig, data_root: str | Path, mirror: str | None, say: Say) -> dict[Split, VideoSource]:
    """Make the raw videos of a data set ready: fetched and unpacked where we know how to, and indexed.

    What is there already is recognised and left as it is.

    Args:
        data_root: `paths.data` of the config.
        mirror: folder or http(s) URL that holds the archives (kth); None for the project's own site.
        say: takes the lines of the report.
    Returns:
        the source of each split that has videos.
    Raises:
        VideoError: something is missing, cannot be fetched, or is damaged.
    """
    root = dataset_root(dataset, data_root)
    if dataset.source == "kth":
        try:
            _prepare_kth(root, mirror, dataset.sequences, say)
        except OSError as error:
            raise VideoError(f"{error.filename or root}: {error.strerror or error}") from error
    elif mirror:
        say(f"MIRROR is not used: source {dataset.source!r} has nothing to fetch")
    sources = open_splits(dataset, data_root)
    for line in describe(sources):
        say(line)
    return sources


def _prepare_kth(root: Path, mirror: str | None, sequences: bool, say: Say) -> None:
    if mirror and not is_url(mirror) and not Path(mirror).expanduser().is_dir():
        raise VideoError(
            f"MIRROR={mirror}: no such folder, and no http(s) URL; it must hold {SEQUENCES_FILE} and six zips"
        )
    todo = [action for action in KTH_SHA1 if not _is_unpacked(root / action, mirror, say)]
    if mirror and not is_url(mirror):
        missing = [f"{action}.zip" for action in todo if not (Path(mirror).expanduser() / f"{action}.zip").is_file()]
        if missing:
            raise VideoError(f"MIRROR={mirror}: lacks {', '.join(missing)}; put them there, or name another folder")
    root.mkdir(parents=True, exist_ok=True)
    _get_sequences(root, mirror, sequences, say)
    for action in todo:
        _unpack_action(root, action, mirror, say)


def _is_unpacked(folder: Path, mirror: str | None, say: Say) -> bool:
    """Tell whether an action needs no archive any more, and say why."""
    if marker := read_marker(folder):
        note = ""
        archive = Path(mirror or "").expanduser() / f"{folder.name}.zip"
        if mirror and not is_url(mirror) and archive.is_file() and archive.stat().st_size != marker["bytes"]:
            note = f", from another archive than {archive}; to use that one, remove {folder}"
        say(f"{folder.name}: already unpacked, {len(marker['files'])} files{note}")
        return True
    # Without our mark, a folder is the user's own, or files are missing. An archive tells; if none was named, trust it.
    videos = len(list(folder.glob("**/*.avi")))
    if videos and mirror is None:
        say(f"{folder.name}: {videos} videos that were not unpacked by us, taken as they are ({folder})")
        return True
    return False


def _get_sequences(root: Path, mirror: str | None, needed: bool, say: Say) -> None:
    """Put the file of frame ranges in its place. Without `needed`, a mirror may lack it."""
    target = root / SEQUENCES_FILE
    if target.is_file():
        read_sequences(target)
        return
    aside = root / f".{SEQUENCES_FILE}"
    try:
        if mirror and not is_url(mirror):
            shutil.copyfile(Path(mirror).expanduser() / SEQUENCES_FILE, aside)
        else:
            fetch(f"{(mirror or KTH_URL).rstrip('/')}/{SEQUENCES_FILE}", aside, way_out=_WAY_OUT)
        read_sequences(aside)
    except (FileNotFoundError, FetchError, VideoError) as error:
        aside.unlink(missing_ok=True)
        if mirror is None or needed:
            raise
        say(f"warning: no {SEQUENCES_FILE} ({error}); it is needed only with dataset.sequences")
        return
    os.replace(aside, target)


def _unpack_action(root: Path, action: str, mirror: str | None, say: Say) -> None:
    name = f"{action}.zip"
    local = mirror is not None and not is_url(mirror)
    archive = Path(mirror).expanduser() / name if local else root / f".{name}"
    if not local:
        url = f"{(mirror or KTH_URL).rstrip('/')}/{name}"
        if not archive.is_file():  # it is when the last run was stopped while unpacking
            say(f"{action}: fetching {url}")
            fetch(url, archive, way_out=_WAY_OUT)
    sha1 = sha1_of(archive)
    try:
        if sha1 != KTH_SHA1[action]:
            if mirror is None:
                raise VideoError(
                    f"{url}: sha1 {sha1} is not the known {KTH_SHA1[action]}: the file has changed or was damaged on "
                    f"its way; run again, or {_WAY_OUT}"
                )
            say(f"warning: {archive if local else url}: sha1 {sha1} is not that of the KTH archive, {KTH_SHA1[action]}")
        files = unpack_zip(archive, root / action, sha1=sha1)
    except VideoError:
        if not local:
            archive.unlink()  # damaged: to be fetched again
        raise
    if not local:
        archive.unlink()  # of no more use
    say(f"{action}: unpacked {files} files")
