"""Checkpoints: a folder of safetensors and one JSON file, written whole or not at all. No pickle is ever written."""

import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.errors import UserError
from pipelines.runtime.progress import warn

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        path: its folder, `.../checkpoints/step_00005000`.
        state: the JSON that goes with it: `step`, the configuration it was made under, fingerprints.
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
                f"{file}: missing or damaged ({error}); remove {self.path} to go on from the one before"
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
        """Write to a temporary folder, flush, rename, then move the pointers; a crash leaves those before in force.

        Args:
            best: what was measured, where this is the best checkpoint so far; it is kept until a better one comes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_by_a_crash in self.folder.glob(".step_*.tmp"):
            shutil.rmtree(left_by_a_crash)
        final = self.folder / f"step_{step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        temporary.mkdir()
        for name, tensors in files.items():
            # safetensors refuses tensors that share memory or lie strided; copies cost little beside the disk.
            save_file(
                {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()},
                temporary / f"{name}.safetensors",
            )
        content = {"step": step, "files": sorted(files), **state}
        if best is not None:
            content["best"] = best
        (temporary / "state.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(self.folder)
        self._point("latest", final)
        if best is not None:
            self._point("best", final)
        # Later steps were passed over as damaged, or training would have gone on from them.
        up_to_here = [path for path in self._all() if path.name <= final.name]
        kept = {*up_to_here[-self.keep :], *(path for path in up_to_here if path == self._pointed_at("best"))}
        for old in [path for path in self._all() if path not in kept]:
            shutil.rmtree(old)
        return final

    def is_best(self, name: str, value: float, *, lowest: bool) -> bool:
        """Whether a measured number is better than that of the best checkpoint so far; NaN never is."""
        if math.isnan(value):
            return False
        best = self.best()
        before = None if best is None else best.state.get("best", {}).get(name)
        return before is None or (value < before if lowest else value > before)

    def best(self) -> Checkpoint | None:
        """The best checkpoint; None where none was measured, or where it is damaged (which is said)."""
        path = self._pointed_at("best")
        return None if path is None else self._read(path, "the newest one is taken")

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint; None when there is none. A damaged newest one is named and passed over."""
        for path in reversed(self._all()):
            checkpoint = self._read(path, "using the one before")
            if checkpoint is not None:
                return checkpoint
        return None

    def named(self, name: str) -> Checkpoint:
        """The checkpoint that a user names: by its step, or by its folder.

        Raises:
            UserError: there is none; it is damaged.
        """
        path = self.folder / f"step_{int(name):08d}" if name.isdecimal() else Path(name)
        if not path.is_dir():
            there = ", ".join(str(int(p.name.removeprefix("step_"))) for p in self._all()) or "none"
            raise UserError(f"--resume {name}: {path} is not there; checkpoints in {self.folder}: {there}")
        try:
            return _read_whole(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--resume {name}: {path} is not a whole checkpoint ({error}); --resume auto goes on from the newest "
                "that is"
            ) from None

    def set_aside_after(self, step: int) -> Path | None:
        """Move checkpoints of later steps out of the way; gives where to, or None where there are none."""
        later = [path for path in self._all() if int(path.name.removeprefix("step_")) > step]
        if not later:
            return None
        aside = self.folder.with_name(f"{self.folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)
        return aside

    def _read(self, path: Path, otherwise: str) -> Checkpoint | None:
        """A whole checkpoint; of another one it is said what is done instead."""
        try:
            return _read_whole(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            warn(f"{path}: not a whole checkpoint ({error}); {otherwise}")
            return None

    def _point(self, name: str, target: Path) -> None:
        pointer = self.folder / f".{name}.tmp"
        pointer.write_text(target.name, encoding="utf-8")
        _flush(pointer)
        pointer.replace(self.folder / name)

    def _pointed_at(self, name: str) -> Path | None:
        """Where a pointer leads; None where it leads nowhere."""
        try:
            path = self.folder / (self.folder / name).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return path if path.name.startswith("step_") and path.is_dir() else None

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step_*")) if self.folder.is_dir() else []


class _State(dict):
    """The content of `state.json`; asking for what it lacks is the user's to know, since only an edit removes keys."""

    def __init__(self, content: dict[str, Any], path: Path) -> None:
        super().__init__(content)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise UserError(
            f"{self.path}/state.json lacks {key!r}: it was edited or written by another version; remove {self.path} to "
            "go on from the checkpoint before, or train anew with --restart"
        )


def _read_whole(path: Path) -> Checkpoint:
    """Read a checkpoint's state and look at its files.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is not whole.
    """
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    int(state["step"])
    for name in state.get("files", ["model"]):  # the first checkpoints did not list theirs
        _check_whole(path / f"{name}.safetensors")
    return Checkpoint(path, _State(state, path))


def _check_whole(file: Path) -> None:
    """Hold a safetensors file's size to its header, without reading the tensors.

    Raises:
        OSError, ValueError: it is missing or truncated.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        # 8 bytes little-endian: the length of a JSON header, which says where in the rest each tensor lies.
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            raise ValueError(f"{file.name} is truncated: {size} bytes")
        header = json.loads(stream.read(length))
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if size != 8 + length + end:
        raise ValueError(f"{file.name} has {size} bytes in place of {8 + length + end}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pack_optimizers(optimizers: list[torch.optim.Optimizer]) -> Tensors:
    """The tensors of all optimizers' states, flat: `<optimizer>.<parameter>.<name>`."""
    return {
        f"{i}.{parameter}.{name}": torch.as_tensor(value)
        for i, optimizer in enumerate(optimizers)
        for parameter, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def unpack_optimizers(optimizers: list[torch.optim.Optimizer], tensors: Tensors) -> None:
    """Put `pack_optimizers`' tensors back; the groups' options come from the present configuration.

    Each takes the memory layout of its parameter, which files don't keep: fused kernels walk through both alike.
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
