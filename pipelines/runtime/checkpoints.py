"""Checkpoints: folders of safetensors and one JSON file, written atomically. No pickle is ever written."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.errors import UserError
from pipelines.runtime.files import backup_path, flush, usual_permissions, write_text
from pipelines.runtime.progress import warn

Tensors = dict[str, Tensor]


class StateFile(BaseModel):
    """`state.json`: what every checkpoint has. Further fields belong to one kind of training.

    Attributes:
        files: names of the safetensors files, without suffix.
        best: the measured value, if this was the best checkpoint when it was saved.
    """

    model_config = ConfigDict(frozen=True, extra="allow", ser_json_inf_nan="constants")

    step: NonNegativeInt
    files: list[str]
    best: dict[str, float] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        path: its folder, `.../checkpoints/step_00005000`.
        state: content of `state.json`: `step`, the configuration of the training, fingerprints.
    """

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]

    def tensors(self, name: str, device: str | torch.device = "cpu") -> Tensors:
        """The tensors of one file (`model`, `ema`, `optimizer`...).

        Raises:
            UserError: the file is missing or damaged.
        """
        file = self.path / f"{name}.safetensors"
        try:
            return load_file(file, device=str(device))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{file}: missing or damaged ({error}); remove {self.path} to resume from the previous one"
            ) from None

    def has(self, name: str) -> bool:
        return (self.path / f"{name}.safetensors").is_file()


class CheckpointFolder:
    """`<folder>/step_00005000/...` and the pointers `<folder>/latest` and `<folder>/best`."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(
        self,
        step: int,
        files: dict[str, Tensors],
        state: dict[str, Any],
        best: dict[str, float] | None = None,
    ) -> Path:
        """Write to a temporary folder, flush, rename, then move the pointers; after a crash the previous ones hold.

        Args:
            best: the measured value if this is the best checkpoint so far, which is kept until a better one comes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_by_a_crash in self.folder.glob(".step_*.tmp"):
            shutil.rmtree(left_by_a_crash)
        final = self.folder / f"step_{step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        temporary.mkdir()
        for name, tensors in files.items():
            file = temporary / f"{name}.safetensors"
            with usual_permissions(file):
                # safetensors refuses shared and strided tensors; copies cost little compared to the disk.
                save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, file)
        content = StateFile(step=step, files=sorted(files), **state, **({} if best is None else {"best": best}))
        (temporary / "state.json").write_text(content.model_dump_json(indent=1, exclude_unset=True), encoding="utf-8")
        for file in temporary.iterdir():
            flush(file)
        flush(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        flush(self.folder)
        self._point("latest", final)
        if best is not None:
            self._point("best", final)
        # Later steps are damaged, or training would have resumed from them.
        up_to_here = [path for path in self._all() if path.name <= final.name]
        kept = {*up_to_here[-self.keep :], *(path for path in up_to_here if path == self._pointed_at("best"))}
        for old in [path for path in self._all() if path not in kept]:
            shutil.rmtree(old)
        return final

    def is_best(self, name: str, value: float, *, lowest: bool) -> bool:
        """Whether a measured value is better than that of the best checkpoint so far; NaN never is."""
        if math.isnan(value):
            return False
        best = self.best()
        before = None if best is None else best.state.get("best", {}).get(name)
        return before is None or (value < before if lowest else value > before)

    def best(self) -> Checkpoint | None:
        """The best checkpoint; None if none was measured, or if it is damaged, with a warning."""
        path = self._pointed_at("best")
        return None if path is None else self._read(path, "using the newest one")

    def latest(self, warns: bool = True) -> Checkpoint | None:
        """The newest whole checkpoint; None if there is none. Damaged ones are skipped, with a warning if `warns`."""
        for path in reversed(self._all()):
            checkpoint = self._read(path, "using the previous one", warns)
            if checkpoint is not None:
                return checkpoint
        return None

    def named(self, name: str) -> Checkpoint:
        """The checkpoint that a user names by its step or its folder.

        Raises:
            UserError: it does not exist, or is damaged.
        """
        path = self.folder / f"step_{int(name):08d}" if name.isdecimal() else Path(name)
        if not path.is_dir():
            there = ", ".join(str(int(p.name.removeprefix("step_"))) for p in self._all()) or "none"
            raise UserError(f"--resume {name}: {path} does not exist; checkpoints in {self.folder}: {there}")
        try:
            return _read_whole(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--resume {name}: {path} is not a whole checkpoint ({error}); --resume auto uses the newest whole one"
            ) from None

    def move_later_to_backup(self, step: int) -> Path | None:
        """Move checkpoints of later steps to a backup folder; returns it, or None if there are no later ones."""
        later = [path for path in self._all() if int(path.name.removeprefix("step_")) > step]
        if not later:
            return None
        backup = backup_path(self.folder)
        backup.mkdir()
        for path in later:
            path.rename(backup / path.name)
        return backup

    def _read(self, path: Path, otherwise: str, warns: bool = True) -> Checkpoint | None:
        """A whole checkpoint; else None and a warning that says what is used instead."""
        try:
            return _read_whole(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not warns:
                return None
            warn(f"{path}: not a whole checkpoint ({error}); {otherwise}")
            return None

    def _point(self, name: str, target: Path) -> None:
        write_text(self.folder / name, target.name)

    def _pointed_at(self, name: str) -> Path | None:
        """The target of a pointer; None if there is none."""
        try:
            path = self.folder / (self.folder / name).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return path if path.name.startswith("step_") and path.is_dir() else None

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step_*")) if self.folder.is_dir() else []


class _State(dict):
    """Content of `state.json`; a missing key is a user's error, since only an edit removes keys."""

    def __init__(self, content: dict[str, Any], path: Path) -> None:
        super().__init__(content)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise UserError(
            f"{self.path}/state.json has no {key!r}: it was edited or written by another version; remove {self.path} "
            "to resume from the previous checkpoint, or train again with --restart"
        )


def _read_whole(path: Path) -> Checkpoint:
    """Read a checkpoint's state and check the sizes of its files.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is not whole.
    """
    try:
        state = StateFile.model_validate_json((path / "state.json").read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ValueError(f"state.json: {where + ': ' if where else ''}{problem['msg']}") from None
    for name in state.files:
        _check_whole(path / f"{name}.safetensors")
    return Checkpoint(path, _State(state.model_dump(exclude_unset=True), path))


def _check_whole(file: Path) -> None:
    """Compare a safetensors file's size with its header, without reading the tensors.

    Raises:
        OSError, ValueError: it is missing or truncated.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        # 8 bytes, little-endian: the length of a JSON header, which has the offsets of all tensors in the rest.
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            raise ValueError(f"{file.name} is truncated: {size} bytes")
        header = json.loads(stream.read(length))
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if size != 8 + length + end:
        raise ValueError(f"{file.name} has {size} bytes instead of {8 + length + end}")


def pack_optimizers(optimizers: list[torch.optim.Optimizer]) -> Tensors:
    """The tensors of all optimizers' states under flat names: `<optimizer>.<parameter>.<name>`."""
    return {
        f"{i}.{parameter}.{name}": torch.as_tensor(value)
        for i, optimizer in enumerate(optimizers)
        for parameter, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def unpack_optimizers(optimizers: list[torch.optim.Optimizer], tensors: Tensors) -> None:
    """Restore the tensors of `pack_optimizers`; the groups' options come from the current configuration.

    Each takes the memory layout of its parameter, which files don't keep and fused kernels rely on.
    """
    for i, optimizer in enumerate(optimizers):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            number, parameter, name = key.split(".", 2)
            if int(number) == i:
                like = parameters[int(parameter)]
                if value.shape == like.shape:
                    value = torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)
                state.setdefault(int(parameter), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
