"""Read official RIVER checkpoints. The one place that opens a pickle, and it runs none of its code."""

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
from torch import Tensor

from pipelines.errors import UserError
from stage1_autoencoder.config import AutoencoderModelConfig
from stage1_autoencoder.vqgan import VQGAN, from_official_keys
from stage2_flow.config import VectorFieldConfig
from stage2_flow.vector_field import VectorField

VECTOR_FIELD_PREFIX = "vector_field_regressor."
AUTOENCODER_PREFIXES = ("ae.backbone.", "ae.")  # the custom VQ-VAE, a Taming one; the longer is tried first
# What torch and gzip raise for a damaged file depends on the place of the damage.
DAMAGE = (RuntimeError, EOFError, OSError, zlib.error, ValueError, LookupError, TypeError, AttributeError)
CUSTOM_VQVAE_PREFIX = "encoder.residuals."
# The side that levels with attention are counted from. Any power of two that all levels halve does: shapes don't tell.
NOMINAL_RESOLUTION = 256
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
    content = load_pickle(path)
    holder = next((key for key in ("model", "state_dict") if isinstance(content, Mapping) and key in content), None)
    if holder is None:
        found = _listed(content) if isinstance(content, Mapping) else type(content).__name__
        raise OfficialFormatError(
            f"{path} holds neither 'model' (RIVER) nor 'state_dict' (Taming), but {found}: "
            "pass a released model.pth, vqvae.pth or vqvae.ckpt"
        )
    tensors = _tensors(path, holder, content[holder])
    iterations = content.get("global_step")
    return OfficialCheckpoint(*_split(path, tensors), iterations=iterations if isinstance(iterations, int) else None)


def autoencoder_state(path: str | Path) -> dict[str, Tensor]:
    """The autoencoder's state dict of any official file, keys as in the Taming or custom VQ-VAE code.

    Raises:
        FileNotFoundError, OfficialFormatError: see `read_official`; a file without an autoencoder.
    """
    state = read_official(path).autoencoder
    if not state:
        raise OfficialFormatError(f"{path} holds no autoencoder: pass the vqvae.ckpt or vqvae.pth that it came with")
    return state


def load_autoencoder(path: str | Path) -> VQGAN:
    """Build the Taming VQGAN of any official file, in evaluation mode on the CPU. Its sizes are read off the shapes.

    Args:
        path: an autoencoder's `.ckpt`, or a main model `.pth` that holds one.
    Raises:
        FileNotFoundError, OfficialFormatError: see `autoencoder_state`; missing, unexpected or misshapen tensors; a
            custom VQ-VAE.
    """
    state = from_official_keys(autoencoder_state(path))
    if any(name.startswith(CUSTOM_VQVAE_PREFIX) for name in state):
        raise OfficialFormatError(
            f"{path} holds a custom VQ-VAE ({CUSTOM_VQVAE_PREFIX}*, as for CLEVRER): this family is not supported yet; "
            "pass a Taming VQGAN (vqvae.ckpt of the BAIR or KTH models)"
        )
    convolutions = ("encoder.conv_in.weight", "encoder.conv_out.weight")
    _require(path, state, (*convolutions, "quantizer.embedding.weight"), ndims=(4, 4, 2))
    channels, latent_channels = (state[name].shape[0] for name in convolutions)
    levels = range(_blocks(state, "encoder.down"))
    widths = [f"encoder.down.{level}.block.0.conv1.weight" for level in levels]
    _require(path, state, widths, ndims=[4] * len(widths))
    try:
        config = AutoencoderModelConfig(
            channels=channels,
            channel_multipliers=tuple(_multiple(path, name, state[name].shape[0], channels) for name in widths),
            blocks=_blocks(state, "encoder.down.0.block"),
            decoder_blocks=_blocks(state, "decoder.up.0.block"),
            attention_resolutions=tuple(
                NOMINAL_RESOLUTION // 2**level for level in levels if f"encoder.down.{level}.attn.0.q.weight" in state
            ),
            resolution=NOMINAL_RESOLUTION,
            latent_channels=latent_channels,
            codes=state["quantizer.embedding.weight"].shape[0],
            norm_groups=32,
        )
        # The autoencoder owns no tensor outside its state dict, so nothing is left on the meta device.
        with torch.device("meta"):
            autoencoder = VQGAN(config)
    except ValueError as error:
        raise OfficialFormatError(f"{path} does not fit the official network: {error}") from None
    check_state(path, autoencoder.state_dict(), state)
    autoencoder.load_state_dict({name: _fp32(tensor) for name, tensor in state.items()}, strict=True, assign=True)
    return autoencoder.eval()


def load_vector_field(path: str | Path, *, heads: int = 8) -> VectorField:
    """Build the vector field of a main model file, in evaluation mode on the CPU.

    Args:
        path: a main model `.pth`.
        heads: attention heads: the one size that the tensors' shapes don't tell. All released models have 8.
    Raises:
        FileNotFoundError, OfficialFormatError: see `read_official`; missing, unexpected or misshapen tensors.
        ValueError: heads that don't divide the width.
    """
    state = read_official(path).vector_field
    if not state:
        raise OfficialFormatError(f"{path} holds no vector field: pass the main model (model.pth), not the autoencoder")
    _require(path, state, ("project_in.1.weight", "project_out.4.weight"), ndims=(2, 4))
    width, channels_in = state["project_in.1.weight"].shape
    latent_channels = state["project_out.4.weight"].shape[0]
    if channels_in not in (2 * latent_channels, 3 * latent_channels):
        raise OfficialFormatError(
            f"{path}: project_in.1.weight takes {channels_in} channels, which is neither 3 (with a reference) nor 2 "
            f"(without) times the {latent_channels} latent channels of project_out.4.weight"
        )
    config = VectorFieldConfig(
        width=width,
        depth=_blocks(state, "in_blocks"),
        mid_depth=_blocks(state, "mid_blocks"),
        heads=heads,
        head="bn" if "project_out.3.running_mean" in state else "ln",
        reference=channels_in == 3 * latent_channels,
    )
    # The field owns no tensor outside its state dict, so nothing is left on the meta device.
    with torch.device("meta"):
        field = VectorField(config, latent_channels)
    check_state(path, field.state_dict(), state)
    field.load_state_dict({name: _fp32(tensor) for name, tensor in state.items()}, strict=True, assign=True)
    return field.eval()


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
        described = "; ".join(f"{trouble}: {_listed(names)}" for trouble, names in troubles.items() if names)
        raise OfficialFormatError(f"{path} does not fit the official network; {described}")


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
        raise OfficialFormatError(f"{path} has keys of neither autoencoder nor vector field: {_listed(unknown)}")
    return autoencoder, vector_field


def _multiple(path: str | Path, name: str, width: int, channels: int) -> int:
    """A level's width as a multiple of the channels at full resolution."""
    if not channels or width % channels:
        raise OfficialFormatError(f"{path}: {name} has {width} channels, no multiple of the {channels} of conv_in")
    return width // channels


def _blocks(state: Mapping[str, Tensor], name: str) -> int:
    """One more than the highest block index; a gap shows as missing keys later."""
    indices = [int(found.group(1)) for key in state if (found := re.match(rf"{re.escape(name)}\.(\d+)\.", key))]
    return max(indices, default=-1) + 1


def _require(path: str | Path, state: Mapping[str, Tensor], names: Iterable[str], ndims: Iterable[int]) -> None:
    """The tensors that sizes are read from are there, with the right number of dimensions."""
    for name, ndim in zip(names, ndims, strict=True):
        if name not in state:
            raise OfficialFormatError(f"{path} does not fit the official network; missing: {name}")
        if state[name].ndim != ndim:
            raise OfficialFormatError(f"{path}: {name} has shape {list(state[name].shape)}, not {ndim} dimensions")


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _listed(names: Iterable[Any], most: int = 5) -> str:
    """The first few names, and how many more."""
    names = [str(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
