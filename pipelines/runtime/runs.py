"""The folder of a run: its resolved configuration, the environment it ran in, and resuming without contradiction."""

import fcntl
import importlib.metadata
import itertools
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from pipelines.config import RiverConfig, dump_config
from pipelines.errors import UserError
from pipelines.runtime.checkpoints import Checkpoint, CheckpointFolder
from pipelines.runtime.files import write_json
from pipelines.runtime.progress import say


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
    """Versions of what the numbers depend on."""
    packages = ("torch", "zarr", "numcodecs", "numpy", "av")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def write_run_files(config: RiverConfig, device: torch.device) -> None:
    """Write `config.yaml` and `environment.json` of the run."""
    config.run_path.mkdir(parents=True, exist_ok=True)
    (config.run_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    environment = Environment(
        software=software_versions(),
        platform=platform.platform(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        threads=torch.get_num_threads(),
    )
    write_json(config.run_path / "environment.json", environment)


@contextmanager
def only_training_of(folder: Path) -> Iterator[None]:
    """Hold a run's folder for one training: a second one would mix its checkpoints and log with ours.

    The kernel lets go of the lock when the process dies, however it dies.

    Raises:
        UserError: another process trains there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder}: process {file.read().strip() or '?'} is training here; wait for it, stop it, or give "
                "this run another name with --set dataset.name=..."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def is_imported(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's weights came out of a file. Its identity is then what these depend on, and no more."""
    return "imported" in checkpoint.state


def is_fine_tuned(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's training began with the weights of another one."""
    return "fine_tuned_from" in checkpoint.state


def chosen_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint of a training's folder that is to be used: the best where one was measured, else the newest."""
    checkpoints = CheckpointFolder(folder / "checkpoints")
    return checkpoints.best() or checkpoints.latest()


def describe_progress(checkpoint: Checkpoint) -> str:
    """How far a checkpoint is, for people: `3000 steps`, and where it was imported or fine-tuned from."""
    if is_imported(checkpoint):
        return f"imported from {checkpoint.state['imported']['file']}"
    if is_fine_tuned(checkpoint):
        start = checkpoint.state["fine_tuned_from"]
        origin = start["imported"]["file"] if "imported" in start else f"step {start['step']} of the flow before"
        return f"{checkpoint.step} steps of fine-tuning from {origin}"
    return f"{checkpoint.step} steps"


def set_aside(folder: Path, what: str, why: str = "--restart; the training before") -> Path:
    """Move a training's folder out of the way; nothing of it is lost.

    Args:
        why: begins the sentence that tells where it is kept.
    Returns:
        Where it is kept.
    Raises:
        UserError: another process trains there.
    """
    aside = first = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    for number in itertools.count(2):
        if not aside.exists():
            break
        aside = first.with_name(f"{first.name}-{number}")  # a second one in this second
    with only_training_of(folder):
        folder.rename(aside)
    say(f"{what}: {why} is kept in {aside}")
    return aside
