"""Checkpoints: folders of safetensors and one JSON file, written atomically. No pickle is ever written."""

import functools
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.errors import UserError
from pipelines.runtime.files import backup_folder, file_sha256, flush, sealed, unsealed, usual_permissions, write_text
from pipelines.runtime.progress import warn

Tensors = dict[str, Tensor]


class TensorFile(BaseModel):
    """One safetensors file of a checkpoint, as it was saved.

    Attributes:
        size: in bytes.
    """

    size: NonNegativeInt
    sha256: str


class StateFile(BaseModel):
    """`state.json`: what every checkpoint has. Further fields belong to one kind of training.

    Attributes:
        files: the safetensors files, by name without suffix; earlier versions wrote the names alone.
        best: the measured value, if this was the best checkpoint when it was saved.
    """

    model_config = ConfigDict(frozen=True, extra="allow", ser_json_inf_nan="constants")

    step: NonNegativeInt
    files: dict[str, TensorFile] | list[str]
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
        """The tensors of one file (`model`, `ema`, `optimizer`...), which is compared with its digest.

        Those of fp16, in which released weights may be stored, are returned in fp32.

        Raises:
            UserError: the file is missing, damaged, or not the one that was saved.
        """
        file, recorded = self.path / f"{name}.safetensors", self.state.get("files")
        try:
            if not isinstance(recorded, dict):
                _say_unchecked(self.path)
            elif name not in recorded:
                raise ValueError("not in state.json")
            elif file_sha256(file) != recorded[name]["sha256"]:
                raise ValueError("it differs from its sha256 in state.json")
            tensors = load_file(file, device=str(device))
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{file}: missing or damaged ({error}); remove {self.path} to use the previous checkpoint"
            ) from None
        return {key: value.float() if value.dtype == torch.float16 else value for key, value in tensors.items()}

    def has(self, name: str) -> bool:
        """Whether a file of this name was saved."""
        return name in self.state.get("files", ())


@functools.cache
def _say_unchecked(path: Path) -> None:
    warn(f"{path} was written by an earlier version, without digests: damage in its weights would not be noticed")


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
        final = self.folder / _folder_name(step)
        temporary = self.folder / f".{final.name}.tmp"
        temporary.mkdir()
        written = {}
        for name, tensors in sorted(files.items()):
            file = temporary / f"{name}.safetensors"
            # safetensors refuses shared and strided tensors; copies cost little compared to the disk.
            copied = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
            try:
                with usual_permissions(file):
                    save_file(copied, file)
            except SafetensorError as error:  # a full disk
                shutil.rmtree(temporary, ignore_errors=True)
                raise OSError(f"{file}: {error}") from None
            written[name] = TensorFile(size=file.stat().st_size, sha256=file_sha256(file))
        content = StateFile(step=step, files=written, **state, **({} if best is None else {"best": best}))
        (temporary / "state.json").write_bytes(sealed(content.model_dump_json(exclude_unset=True)))
        for file in temporary.iterdir():
            flush(file)
        flush(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        flush(self.folder)
        self._point("latest", final)
        # Later steps are damaged, or training would have resumed from them.
        kept = [path for path in self._all() if path.name <= final.name][-self.keep :]
        if (the_best := self.best(warns=False)) is not None:
            self._point("best", the_best.path)
            kept.append(the_best.path)
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

    def best(self, warns: bool = True) -> Checkpoint | None:
        """The best whole checkpoint: the newest of those that were the best when they were saved; None: none was.

        Not by the pointer, which a crash may leave behind. Damaged ones are skipped, with a warning if `warns`.
        """
        return next((checkpoint for checkpoint in self._whole(warns) if "best" in checkpoint.state), None)

    def latest(self, warns: bool = True) -> Checkpoint | None:
        """The newest whole checkpoint; None if there is none. Damaged ones are skipped, with a warning if `warns`."""
        return next(self._whole(warns), None)

    def has_any(self) -> bool:
        """Whether there are checkpoints, whole or damaged."""
        return bool(self._all())

    def named(self, name: str) -> Checkpoint:
        """The checkpoint that a user names by its step or its folder.

        Raises:
            UserError: it does not exist, or is damaged.
        """
        path = self.folder / _folder_name(int(name)) if name.isdecimal() else Path(name)
        if not path.is_dir():
            there = ", ".join(str(int(p.name.removeprefix("step_"))) for p in self._all()) or "none"
            raise UserError(f"--resume {name}: {path} does not exist; checkpoints in {self.folder}: {there}")
        try:
            return _read_whole(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--resume {name}: {path} is not a whole checkpoint ({error}); --resume auto uses the newest whole one"
            ) from None

    def move_later_to_backup(self, step: int) -> Path | None:
        """Move checkpoints of later steps to a backup folder; returns it, or None if there are no later ones."""
        later = [path for path in self._all() if int(path.name.removeprefix("step_")) > step]
        if not later:
            return None
        backup = backup_folder(self.folder)
        for path in later:
            path.rename(backup / path.name)
        return backup

    def _whole(self, warns: bool) -> Iterator[Checkpoint]:
        """The whole checkpoints, the newest first."""
        for path in reversed(self._all()):
            try:
                yield _read_whole(path)
            except (OSError, ValueError) as error:
                if warns:
                    warn(f"{path}: not a whole checkpoint ({error}); it is skipped")

    def _point(self, name: str, target: Path) -> None:
        """Name a checkpoint in a file, for people and programs that look into the folder."""
        write_text(self.folder / name, target.name)

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
    """Read and check a checkpoint's state, and the sizes of its files.

    Raises:
        OSError, ValueError: it is not whole.
    """
    try:
        state = StateFile.model_validate_json(unsealed((path / "state.json").read_bytes()))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ValueError(f"state.json: {where + ': ' if where else ''}{problem['msg']}") from None
    except ValueError as error:
        raise ValueError(f"state.json: {error}") from None
    if path.name.startswith("step_") and path.name != _folder_name(state.step):
        raise ValueError(f"state.json is that of step {state.step}")
    for name in state.files:
        size = (path / f"{name}.safetensors").stat().st_size
        if isinstance(state.files, dict) and size != state.files[name].size:
            raise ValueError(f"{name}.safetensors has {size} bytes instead of {state.files[name].size}")
    return Checkpoint(path, _State(state.model_dump(exclude_unset=True), path))


def _folder_name(step: int) -> str:
    return f"step_{step:08d}"


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
