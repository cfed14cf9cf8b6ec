"""Read the files of the official code. The one place that opens a pickle, and no code in it is run."""

import argparse
import gzip
import io
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.errors import UserError
from stage1_autoencoder.videos.names import join_names

VECTOR_FIELD_PREFIX = "vector_field_regressor."
AUTOENCODER_PREFIXES = ("ae.backbone.", "ae.")  # the custom VQ-VAE, a Taming one; the longer is tried first
LOSS_PREFIX = "loss."  # the discriminator and the perceptual network of an autoencoder's training
# What torch and gzip raise for a damaged file depends on the place of the damage.
DAMAGE = (
    RuntimeError, EOFError, OSError, zlib.error, ValueError, LookupError, TypeError, AttributeError, MemoryError,
    zipfile.BadZipFile,
)  # fmt: skip
HEAD_BYTES = 512
# What a `.gz` may unpack to, in multiples of its size: weights do not compress by half, zeros by a thousand.
MOST_COMPRESSED = 20
MOST_WEIGHT_BYTES = 2**33


class OfficialFormatError(UserError):
    """A file that the official code does not write; the message has the file, what is wrong, and the way out."""


@dataclass(frozen=True)
class OfficialCheckpoint:
    """The weights of one official file, under the names that the networks give them.

    Attributes:
        autoencoder: state dict without what only its training needs; empty if the file has none.
        vector_field, refiner: state dicts; empty if the file has none.
        iterations: updates done; None if the file does not tell.
    """

    autoencoder: dict[str, Tensor] = field(default_factory=dict)
    vector_field: dict[str, Tensor] = field(default_factory=dict)
    refiner: dict[str, Tensor] = field(default_factory=dict)
    iterations: int | None = None


def read_official(path: str | Path) -> OfficialCheckpoint:
    """Read any official file, gzip'd if its name ends with `.gz`.

    Args:
        path: a main model, `{"model": {[module.]ae.*, [module.]vector_field_regressor.*}, ...}`; a Taming autoencoder,
            `{"state_dict": {...}}`; a custom VQ-VAE, `{"model": {[module.]*}}`; or a refiner,
            `{"refiner": {[module.]*}, "args": argparse.Namespace, ...}`.
    Raises:
        FileNotFoundError: no such file.
        OfficialFormatError: a truncated or foreign file, pickled objects other than tensors, or unknown keys.
    """
    content = load_pickle(path, [argparse.Namespace])
    known = ("model", "state_dict", "refiner")
    holder = next((key for key in known if isinstance(content, Mapping) and key in content), None)
    if holder is None:
        found = join_names(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise OfficialFormatError(
            f"{path} holds none of 'model' (RIVER), 'state_dict' (Taming) and 'refiner', but {found}: "
            "pass a released model.pth, vqvae.pth or vqvae.ckpt, or a refiner's .pth"
        )
    state = content[holder]
    if not is_state_dict(state):
        raise OfficialFormatError(f"{path}: '{holder}' is not a dictionary of tensors: pass a released checkpoint")
    # Training on several GPUs writes the prefix.
    tensors = {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
    if holder == "refiner":
        return OfficialCheckpoint(refiner=tensors)
    autoencoder, vector_field = _split(path, tensors)
    iterations = content.get("global_step")
    return OfficialCheckpoint(autoencoder, vector_field, iterations=iterations if isinstance(iterations, int) else None)


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
        raise OfficialFormatError(f"{path} has keys of neither autoencoder nor vector field: {join_names(unknown)}")
    return autoencoder, vector_field


def load_pickle(path: str | Path, safe_globals: Iterable[Any] = ()) -> Any:
    """`torch.load` on the CPU with `weights_only=True`, and errors that tell the way out.

    Args:
        path: a file that `torch.save` wrote, gzip'd if its name ends with `.gz`.
        safe_globals: classes that the file may hold besides tensors and plain containers.
    Raises:
        FileNotFoundError: no such file.
        OfficialFormatError: a truncated or foreign file, one that unpacks to far more than its size, a program
            (TorchScript), or pickled objects that are not allowed.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():  # a pipe would be waited for
        raise OfficialFormatError(f"{path} is not a regular file: copy its content to one")
    with path.open("rb") as file:
        other = foreign_content(file.read(HEAD_BYTES))
    if other is not None:
        raise OfficialFormatError(f"{path} is {other}: download it again")
    try:
        source = _decompressed(path) if path.suffix == ".gz" else path
        _check_records(path, source)
        if isinstance(source, io.BytesIO):
            source.seek(0)
        with torch.serialization.safe_globals(list(safe_globals)):
            return torch.load(source, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError, OfficialFormatError):
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise OfficialFormatError(f"{path} is truncated or no torch.save file: download it again") from error
        raise OfficialFormatError(
            f"{path} holds a pickled {refused.group(1)}, and unpickling it could run any code: refused. If you trust "
            "the file, load it where it was written and save its tensors alone with torch.save"
        ) from error
    except DAMAGE as error:
        raise OfficialFormatError(
            f"{path} is truncated or no torch.save file ({type(error).__name__}): download it again"
        ) from error


def is_state_dict(content: Any) -> bool:
    """Whether this is a dictionary of dense tensors in memory, all together of at most `MOST_WEIGHT_BYTES`.

    A file of some bytes can hold a tensor of any shape that repeats one number, or has none (sparse, meta).
    """
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        return False
    tensors = content.values()
    if any(tensor.layout is not torch.strided or tensor.device.type != "cpu" for tensor in tensors):
        return False
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) <= MOST_WEIGHT_BYTES


def _decompressed(path: Path) -> io.BytesIO:
    most = MOST_COMPRESSED * path.stat().st_size
    with gzip.open(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OfficialFormatError(f"{path} unpacks to over {MOST_COMPRESSED} times its size, as no weights do: refused")
    return io.BytesIO(content)


def _check_records(path: Path, source: Path | io.BytesIO) -> None:
    """Refuse a zip archive that `torch.save` does not write; files of old versions of PyTorch are no archives."""
    if not zipfile.is_zipfile(source):
        return
    with zipfile.ZipFile(source) as archive:
        entries = archive.infolist()
    size = len(source.getbuffer()) if isinstance(source, io.BytesIO) else source.stat().st_size
    if any(entry.filename.rpartition("/")[2] == "constants.pkl" for entry in entries):
        raise OfficialFormatError(f"{path} is a program (TorchScript), not a checkpoint: save its state_dict instead")
    if sum(entry.file_size for entry in entries) > size:  # compressed, or bytes that are used twice
        raise OfficialFormatError(f"{path} unpacks to more than its {size} bytes, as no torch.save file does: refused")


def foreign_content(head: bytes) -> str | None:
    """What a failed download saved under a checkpoint's name; None if this may be a checkpoint.

    Args:
        head: the first bytes of the file.
    """
    head = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if head[:1] == b"<":
        return "a web page instead of a checkpoint"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer instead of a checkpoint (`git lfs pull` downloads the file)"
    return None
