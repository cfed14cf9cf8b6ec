"""What can be removed of a data set's runs and latents: where it is, its size, and what it costs to make again."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import latent_cache
from latent_cache import CorruptStoreError, IncompleteStoreError
from pipelines.config import RiverConfig
from pipelines.data.datasets import videos_status
from pipelines.errors import UserError
from pipelines.evaluation.clip_records import RECORDS_NAME
from pipelines.evaluation.measures.feature_cache import feature_file
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.files import incomplete_folder, leftovers, remove, size_text, stored_bytes
from pipelines.runtime.logs import read_log
from pipelines.runtime.progress import duration, say
from pipelines.runtime.run_folder import only_training_of, run_names
from pipelines.sharing.bundled_models import BUNDLED

Kind = Literal["leftovers", "backups", "run", "latents"]
# As `backup_folder` names them.
_BACKUP = re.compile(r".+\.\d{8}-\d{6}(-\d+)?")
_UNNEEDED = "left by a command that was killed; nothing needs it"


@dataclass(frozen=True)
class Removable:
    """A file or folder that can be removed.

    Attributes:
        cost: what it is, and what it costs to make again, in words.
        size: in bytes.
    """

    path: Path
    cost: str
    size: int


def clean(config: RiverConfig, kind: Kind, *, remove_it: bool) -> None:
    """Print what can be removed, and remove it if asked to.

    Args:
        kind: `leftovers` of all runs of the data set, with what commands compute again by themselves; `backups` of
            trainings that were begun anew; the configuration's `run`, which has a name; the store, `latents`.
    Raises:
        UserError: no such run or store; it is in use.
        StoreError: another process writes the store; the folder is no store.
    """
    found = list(_FINDERS[kind](config))
    for item in found:
        say(f"{size_text(item.size):>12}  {item.path}: {item.cost}")
    place = f"{config.shared.run_path} and {config.store_path.parent}"
    total = f"{size_text(sum(item.size for item in found))} in {len(found)} place(s)"
    if found and remove_it:
        for item in found:
            _remove(item.path, kind)
        say(f"clean: removed {total}")
    else:
        say(f"clean: {total}; --yes removes it" if found else f"clean: nothing to remove in {place}")
    if kind == "leftovers" and (backups := list(_backups(config))):
        size = size_text(sum(item.size for item in backups))
        say(f"clean: kept are also {len(backups)} backup(s) of trainings, {size}; --backups shows them")


def _leftovers(config: RiverConfig) -> Iterator[Removable]:
    runs = config.shared.run_path
    for folder in [runs, *sorted(path for path in runs.rglob("*") if path.is_dir()), config.store_path.parent]:
        yield from (_removable(path, _UNNEEDED) for path in leftovers(folder))
    for path in (runs, config.store_path):
        if (pulled := incomplete_folder(path)).is_dir():
            yield _removable(pulled, "of a pull that was stopped; it would begin again")
    for path in sorted(runs.rglob("checkpoints/.step_*.tmp")):
        if not _is_training(path.parents[1]):
            yield _removable(path, _UNNEEDED)
    for path in sorted(runs.rglob(RECORDS_NAME)):
        yield _removable(path, "clips that a stopped `evaluate` has measured; it would begin again")
    if (features := feature_file(config.store_path)).exists():
        yield _removable(features, "features of real clips; the next `evaluate` computes them again, in minutes")


def _backups(config: RiverConfig) -> Iterator[Removable]:
    for path in sorted(config.shared.run_path.rglob("*")):
        if path.is_dir() and _BACKUP.fullmatch(path.name):
            yield _removable(path, f"a backup; {_training_text(path)}")


def _run(config: RiverConfig) -> Iterator[Removable]:
    known = run_names(config)
    if config.run not in known and not (config.dataset.name in BUNDLED and config.run_path.exists()):
        raise UserError(f"{config.run_path}: no such run; those of this data set are: {', '.join(known) or 'none'}")
    yield _removable(config.run_path, f"the run with all its results; {_training_text(config.run_path)}")


def _latents(config: RiverConfig) -> Iterator[Removable]:
    store = config.store_path
    if not store.is_dir():
        raise UserError(f"{store}: no store in this place")
    try:
        caches = [latent_cache.open(store, split) for split in latent_cache.splits(store)]
        videos = f"{' + '.join(str(len(cache.video_ids)) for cache in caches)} videos"
    except (IncompleteStoreError, CorruptStoreError):
        videos = "the videos"
    raw = videos_status(config)
    is_there = "which are there" if raw.is_done else f"which are not all there ({raw.path}: {raw.detail})"
    yield _removable(store, f"the store; `encode` reads {videos} again, {is_there}")


_FINDERS = {"leftovers": _leftovers, "backups": _backups, "run": _run, "latents": _latents}


def _removable(path: Path, cost: str) -> Removable:
    return Removable(path, cost, stored_bytes(path))


def _training_text(folder: Path) -> str:
    """What was trained in a folder or in those below it, and how long that took."""
    trained = []
    for training in sorted({path.parent.parent for path in folder.rglob("step_*/state.json")}):
        newest = CheckpointFolder(training).latest(warns=False)
        if newest is None:
            continue
        log = read_log(training.parent / "log.jsonl")
        rate = log and log.median("steps_per_second")
        name = "" if training.parent == folder else f"{training.relative_to(folder).parts[0]} "
        trained.append(f"{name}{newest.step} steps" + (f", about {duration(newest.step / rate)}" if rate else ""))
    return f"to train again: {'; '.join(trained)}" if trained else "no whole checkpoint is in it"


def _is_training(folder: Path) -> bool:
    try:
        with only_training_of(folder):
            return False
    except UserError:
        return True


def _remove(path: Path, kind: Kind) -> None:
    if kind == "latents":
        latent_cache.remove_store(path)
        return
    if kind == "run":
        for lock in path.glob("*/.lock"):
            with only_training_of(lock.parent):
                pass
    remove(path)
