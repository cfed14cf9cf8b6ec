"""Read the files of the official code. The one place that opens a pickle, and it runs none of its code."""

import argparse
import gzip
import io
import pickle
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipelines.errors import UserError

VECTOR_FIELD_PREFIX = "vector_field_regressor."
AUTOENCODER_PREFIXES = ("ae.backbone.", "ae.")  # the custom VQ-VAE, a Taming one; the longer is tried first
# What torch and gzip raise for a damaged file depends on the place of the damage.
DAMAGE = (RuntimeError, EOFError, OSError, zlib.error, ValueError, LookupError, TypeError, AttributeError)
LOSS_PREFIX = "loss."  # the discriminator and the perceptual network of an autoencoder's training


class OfficialFormatError(UserError):
    """A file that is not what the official code writes; says which file, what is wrong, and the way out."""


@dataclass(frozen=True)
class OfficialCheckpoint:
    """The weights of one official file, under the names that the networks give them.

    Attributes:
        autoencoder: its state dict, without what only its training needs; empty where the file has none.
        vector_field: its state dict; empty where the file has none.
        iterations: updates done, where the file says so.
    """

    autoencoder: dict[str, Tensor]
    vector_field: dict[str, Tensor]
    iterations: int | None


def read_official(path: str | Path) -> OfficialCheckpoint:
    """Read a main model `.pth`, a Taming autoencoder `.ckpt` or a custom VQ-VAE `.pth`, gzip'd if named `.gz`.

    Args:
        path: `{"model": {[module.]ae.*, [module.]vector_field_regressor.*}, ...}`, `{"state_dict": {...}}`, or
            `{"model": {[module.]*}}`.
    Raises:
        FileNotFoundError: no such file.
        OfficialFormatError: a truncated or foreign file, pickled objects other than tensors, or unknown keys.
    """
    content = load_pickle(path, [argparse.Namespace])  # so that a refiner's file is told by what it holds
    holder = next((key for key in ("model", "state_dict") if isinstance(content, Mapping) and key in content), None)
    if holder is None:
        found = listed(content) if isinstance(content, Mapping) else type(content).__name__
        raise OfficialFormatError(
            f"{path} holds neither 'model' (RIVER) nor 'state_dict' (Taming), but {found}: "
            "pass a released model.pth, vqvae.pth or vqvae.ckpt"
        )
    tensors = _tensors(path, holder, content[holder])
    iterations = content.get("global_step")
    return OfficialCheckpoint(*_split(path, tensors), iterations=iterations if isinstance(iterations, int) else None)


def autoencoder_state(path: str | Path, official: OfficialCheckpoint | None = None) -> dict[str, Tensor]:
    """The autoencoder's state dict of any official file, keys as in the Taming or custom VQ-VAE code.

    Args:
        official: the file's content, where it was read already.
    Raises:
        FileNotFoundError, OfficialFormatError: see `read_official`; a file without an autoencoder.
    """
    state = (official or read_official(path)).autoencoder
    if not state:
        raise OfficialFormatError(f"{path} holds no autoencoder: pass the vqvae.ckpt or vqvae.pth that it came with")
    return state


def load_pickle(path: str | Path, safe_globals: Iterable[Any] = ()) -> Any:
    """`torch.load` on the CPU with `weights_only=True`, and errors that say what to do.

    Args:
        path: a file that `torch.save` wrote, gzip'd if its name ends with `.gz`.
        safe_globals: classes that the file may hold besides tensors and plain containers.
    Raises:
        FileNotFoundError: no such file.
        OfficialFormatError: a truncated or foreign file, or pickled objects that are not allowed.
    """
    path = Path(path)
    other = foreign_content(path)
    if other is not None:
        raise OfficialFormatError(f"{path} is {other} and no torch.save file: download it again")
    try:
        source = io.BytesIO(gzip.decompress(path.read_bytes())) if path.suffix == ".gz" else path
        with torch.serialization.safe_globals(list(safe_globals)):
            return torch.load(source, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise OfficialFormatError(f"{path} is truncated or no torch.save file: download it again") from error
        raise OfficialFormatError(
            f"{path} holds a pickled {refused.group(1)}, and unpickling it could run any code: refused. If you trust "
            "the file, load it where it was written and save its tensors alone: "
            "torch.save({'state_dict': checkpoint['state_dict']}, 'clean.ckpt')"
        ) from error
    except DAMAGE as error:
        raise OfficialFormatError(
            f"{path} is truncated or no torch.save file ({type(error).__name__}): download it again"
        ) from error


def foreign_content(path: Path) -> str | None:
    """What was saved under a checkpoint's name in its place, as downloads go wrong; None: it may be a checkpoint.

    Raises:
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        head = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n")
    if head[:1] == b"<":
        return "a web page, such as a server sends in place of a file that it keeps back,"
    if head.startswith(b"version https://git-lfs"):
        return "the pointer of git-lfs to a file (`git lfs pull` fetches the file)"
    return None


def check_state(path: str | Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Hold a state dict to a network's.

    Raises:
        OfficialFormatError: missing, unexpected or misshapen tensors, by name.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        f"{name} {list(found[name].shape)} in place of {list(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    troubles = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(troubles.values()):
        described = "; ".join(f"{trouble}: {listed(names)}" for trouble, names in troubles.items() if names)
        raise OfficialFormatError(f"{path} does not fit the official network; {described}")


def fill(path: str | Path, network: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Give a network on the meta device the tensors of a file, of the types that it has, and put it in evaluation mode.

    Raises:
        OfficialFormatError: missing, unexpected or misshapen tensors, by name.
    """
    expected = network.state_dict()
    check_state(path, expected, found)
    # The files may be in half precision. All that a network owns is in its state dict, so nothing is left on meta.
    tensors = {name: tensor.to(expected[name].dtype) for name, tensor in found.items()}
    network.load_state_dict(tensors, strict=True, assign=True)
    network.eval()


def unfit(path: str | Path, error: ValidationError) -> OfficialFormatError:
    """What to raise for sizes that no network of ours has."""
    problems = [
        ": ".join([*map(str, problem["loc"]), problem["msg"].removeprefix("Value error, ")])
        for problem in error.errors()
    ]
    return OfficialFormatError(f"{path} does not fit the official network; {'; '.join(problems)}")


def _tensors(path: str | Path, holder: str, state: Any) -> dict[str, Tensor]:
    """The named tensors under `holder`, without the prefix of distributed training."""
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise OfficialFormatError(f"{path}: '{holder}' is not a dictionary of tensors: pass a released checkpoint")
    # Single-GPU training wrote no prefix.
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def _split(path: str | Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(autoencoder, vector field) of a main model, or (autoencoder, {}) of an autoencoder's own file."""
    is_main = any(name.startswith((VECTOR_FIELD_PREFIX, *AUTOENCODER_PREFIXES)) for name in tensors)
    autoencoder, vector_field, unknown = {}, {}, []
    for name, tensor in tensors.items():
        if name.startswith(VECTOR_FIELD_PREFIX):
            vector_field[name.removeprefix(VECTOR_FIELD_PREFIX)] = tensor
            continue
        prefix = next((prefix for prefix in AUTOENCODER_PREFIXES if name.startswith(prefix)), "")
        if is_main and not prefix:
            unknown.append(name)
        elif not name.startswith(LOSS_PREFIX, len(prefix)):
            autoencoder[name.removeprefix(prefix)] = tensor
    if unknown:
        raise OfficialFormatError(f"{path} has keys of neither autoencoder nor vector field: {listed(unknown)}")
    return autoencoder, vector_field


def count_blocks(state: Mapping[str, Tensor], name: str) -> int:
    """One more than the highest block index, but no more than there are tensors; a gap shows as missing keys later."""
    indices = [int(found.group(1)) for key in state if (found := re.match(rf"{re.escape(name)}\.(\d+)\.", key))]
    return min(max(indices, default=-1) + 1, len(state))


def require(path: str | Path, state: Mapping[str, Tensor], names: Iterable[str], ndims: Iterable[int]) -> None:
    """The tensors that sizes are read from are there, with the right number of dimensions."""
    for name, ndim in zip(names, ndims, strict=True):
        if name not in state:
            raise OfficialFormatError(f"{path} does not fit the official network; missing: {name}")
        if state[name].ndim != ndim:
            raise OfficialFormatError(f"{path}: {name} has shape {list(state[name].shape)}, not {ndim} dimensions")


def fp32(tensor: Tensor) -> Tensor:
    """Half-precision weights as floats; integers as they are."""
    return tensor.float() if tensor.is_floating_point() else tensor


def listed(names: Iterable[Any], most: int = 5) -> str:
    """The first few names, and how many more."""
    names = [str(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
