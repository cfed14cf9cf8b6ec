"""The folder of a run: its configuration, its environment, its lock, and where its checkpoints come from."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from pipelines.config import RiverConfig, differences, dump_config, load_config, parse_config, result_settings
from pipelines.config.yaml_files import read_yaml
from pipelines.errors import UserError
from pipelines.runtime.checkpoints import Checkpoint, CheckpointFolder
from pipelines.runtime.files import backup_folder, locked, write_json, write_text
from pipelines.runtime.progress import say, warn
from stage1_autoencoder.videos import dataset_root

# Sections of the configuration that a checkpoint of the training of this name records.
TRAININGS = ("autoencoder", "decoder", "flow", "refiner")
# Values by which a configuration leaves a setting to its training, which records what it chose.
LEFT_OPEN = {"steps": None, "precision": "auto"}

# Begins the last line of `config.yaml`.
DIGEST_LINE = "# sha256 of the lines above: "


class Environment(BaseModel):
    """`environment.json`: what a run was trained with.

    Attributes:
        software: package -> version.
        device: name of the GPU or processor.
        threads: of PyTorch on the CPU.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    software: dict[str, str]
    platform: str
    device: str
    threads: int


def software_versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    packages = ("torch", "zarr", "numcodecs", "numpy", "av")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def write_run_files(config: RiverConfig, device: torch.device) -> None:
    """Write `config.yaml` and `environment.json` of the run."""
    write_run_config(config.run_path / "config.yaml", config)
    environment = Environment(
        software=software_versions(),
        platform=platform.platform(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        threads=torch.get_num_threads(),
    )
    write_json(config.run_path / "environment.json", environment)


def write_run_config(path: Path, config: RiverConfig) -> None:
    """Write a run's `config.yaml`, with a digest of itself."""
    text = dump_config(config)
    write_text(path, f"{text}{DIGEST_LINE}{hashlib.sha256(text.encode()).hexdigest()}\n")


def read_run_config(path: Path) -> RiverConfig:
    """Read a run's `config.yaml`.

    Raises:
        OSError: it is missing, or cannot be read.
        UserError: it is damaged, or was edited.
    """
    above, line, digest = path.read_bytes().rpartition(DIGEST_LINE.encode())
    if line and digest.strip() != hashlib.sha256(above).hexdigest().encode():
        raise UserError(
            f"{path}: damaged or edited: it differs from the sha256 in its last line (if the change is right, remove "
            "that line)"
        )
    return parse_config(read_yaml(path), str(path))


def load_run_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    anew: Collection[str] = (),
    beginning: dict[str, Any] | None = None,
) -> RiverConfig:
    """The configuration of a command: overrides, then what its run was trained with, then the file.

    Args:
        path, overrides: see `load_config`.
        anew: sections that the command begins anew, which are taken from the file again.
        beginning: section -> values that replace those of the file for what is not trained yet.
    Raises:
        UserError: see `load_config`.
    """
    config = load_config(path, overrides, beginning)
    kept = {name: value for name, value in trained_settings(config).items() if name not in anew}
    if not kept:
        return config
    try:
        of_run = load_config(path, overrides, (beginning or {}) | kept)
    except UserError:
        return config  # overrides that contradict the run, which its stages refuse
    before, now = (each.model_dump(mode="json") for each in (config, of_run))
    for name in TRAININGS:
        ours, theirs = before[name]["training"], now[name]["training"]
        ours |= {key: theirs[key] for key, value in LEFT_OPEN.items() if key in ours and ours[key] == value}
    for name in ("flow", "sampling") if "sampling" in kept else ():  # of a student: they follow from its teacher
        before[name] = now[name]
    if changed := differences(now, before):
        say(f"run {config.run_path}: as it was trained, not as in {path}: {'; '.join(changed)} (--set changes it)")
    return of_run


def trained_settings(config: RiverConfig) -> dict[str, Any]:
    """What the stages of a configuration's run were trained with, by section.

    The seed, whole sections of the trainings, the sampler of a student, and of `dataset` and `cache` what results
    depend on; the folder of the videos, too, if it is still there. Imported weights have no settings. Nothing of
    checkpoints that cannot be read, which the stages report; a `config.yaml` that cannot be read is a warning.
    """
    settings: dict[str, Any] = {}
    for name in ("autoencoder", "decoder", "refiner", "flow"):  # a run's seed is that of its flow
        newest = CheckpointFolder(config.training_folder(name) / "checkpoints").latest(warns=False)
        recorded = {} if newest is None else newest.state.get("settings", {})
        if name in recorded:
            settings |= {key: recorded[key] for key in (name, "seed", "distillation") if key in recorded}
        if newest is not None and is_student(newest):
            settings["sampling"] = newest.state["sampler"]
    if not settings:
        return {}
    files = (config.run_path / "config.yaml", config.shared.run_path / "config.yaml")
    file = next((file for file in files if file.exists()), files[0])
    try:
        stored = read_run_config(file)
    except FileNotFoundError:
        return settings
    except (OSError, UserError) as error:
        warn(f"{error}; `dataset` and `cache` are those of the command's configuration")
        return settings
    dataset = stored.dataset
    is_there = dataset.root is not None and dataset_root(dataset, stored.data_root).is_dir()
    return settings | {
        "dataset": result_settings(dataset) | ({"root": dataset.root} if is_there else {}),
        "cache": result_settings(stored.cache),
    }


def describe_run(name: str | None) -> str:
    """A run of a data set by its name, for sentences."""
    return "the default run" if name is None else f"run {name}"


def run_names(config: RiverConfig) -> list[str]:
    """The named runs of a configuration's data set."""
    return sorted(file.parent.name for file in config.shared.run_path.glob("*/config.yaml"))


@contextmanager
def only_training_of(folder: Path) -> Iterator[None]:
    """Lock a training's folder: a second training would mix its checkpoints and log with ours.

    Raises:
        UserError: another process trains in this folder.
    """
    busy = f"{folder}: process {{pid}} is training here; wait for it, stop it, or {another_name(folder)}"
    with locked(folder / ".lock", busy):
        yield


def another_name(folder: Path) -> str:
    """How to train beside the training of a folder, as the end of a sentence."""
    # All runs of a data set share the autoencoder and its fast decoder.
    option = "--set dataset.name=..." if folder.name in ("autoencoder", "decoder") else "--run <name>"
    return f"give the run another name with {option}"


def is_imported(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's weights were imported from a file. Its identity then holds only what these depend on."""
    return "imported" in checkpoint.state


def has_only_weights(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint, as imported and released ones, has no state of the optimizer to resume from."""
    return not checkpoint.has("optimizer")


def is_fine_tuned(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's training started from the weights of another checkpoint."""
    return "fine_tuned_from" in checkpoint.state


def is_student(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's flow was distilled from another one's. Its `sampler` is the one that it learned."""
    return "teacher" in checkpoint.state


def chosen_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint of a training's folder to use: the best if one was measured, else the newest."""
    checkpoints = CheckpointFolder(folder / "checkpoints")
    return checkpoints.best() or checkpoints.latest(warns=False)


def recorded_steps(checkpoint: Checkpoint, training: str) -> int | None:
    """The number of steps of the training that made a checkpoint; None: imported, or not known when it was made."""
    return checkpoint.state.get("settings", {}).get(training, {}).get("training", {}).get("steps")


def describe_progress(checkpoint: Checkpoint) -> str:
    """Progress of a checkpoint for people: `3000 steps`, or where it was imported, fine-tuned or distilled from."""
    if is_imported(checkpoint):
        return f"imported from {checkpoint.state['imported']['file']}"
    if is_student(checkpoint):
        teacher = checkpoint.state["teacher"]
        return f"{checkpoint.step} steps of distillation from step {teacher['step']} of {describe_run(teacher['run'])}"
    if is_fine_tuned(checkpoint):
        start = checkpoint.state["fine_tuned_from"]
        origin = start["imported"]["file"] if "imported" in start else f"step {start['step']} of the previous flow"
        return f"{checkpoint.step} steps of fine-tuning from {origin}"
    return f"{checkpoint.step} steps"


def move_to_backup(folder: Path, what: str, why: str = "--restart; the previous training") -> Path:
    """Rename a training's folder to a backup beside it.

    Args:
        why: begins the printed sentence that names the backup.
    Returns:
        The backup folder.
    Raises:
        UserError: another process trains in this folder.
    """
    with only_training_of(folder):
        backup = backup_folder(folder)
        folder.rename(backup)
    say(f"{what}: {why} is kept in {backup}")
    return backup
