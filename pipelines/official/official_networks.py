"""Networks from official weights; their sizes are read off the tensors' shapes."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipelines.loading import not_finite
from pipelines.official.weight_files import OfficialCheckpoint, OfficialFormatError, read_official
from stage1_autoencoder import vqgan, vqvae
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.config import RefinerModelConfig, VQGANConfig, VQVAEConfig
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.rcan import RCAN
from stage1_autoencoder.setting_types import MOST_HALVINGS
from stage1_autoencoder.videos.names import join_names
from stage2_flow.config import VectorFieldConfig
from stage2_flow.vector_field import VectorField

Network = TypeVar("Network", bound=nn.Module)

CUSTOM_VQVAE_PREFIXES = ("encoder.residuals.", "vector_quantizer.")
# The side that levels with attention are counted from. Any power of two that all levels halve does: shapes don't tell.
NOMINAL_RESOLUTION = 256
OFFICIAL_HEADS = 8  # of all released models


def load_autoencoder(path: str | Path, official: OfficialCheckpoint | None = None) -> Autoencoder:
    """Build the autoencoder of an official file, in evaluation mode on the CPU.

    Args:
        path: a Taming autoencoder's `.ckpt`, a custom VQ-VAE's `.pth`, or a main model `.pth` that holds one of them.
        official: the file's content if it was read before.
    Raises:
        FileNotFoundError, OfficialFormatError: see `read_official`; missing, unexpected or misshapen tensors.
    """
    state = (official or read_official(path)).autoencoder
    if not state:
        raise OfficialFormatError(f"{path} holds no autoencoder: pass the vqvae.ckpt or vqvae.pth that it came with")
    with _legal_sizes(path):
        if any(name.startswith(CUSTOM_VQVAE_PREFIXES) for name in state):
            state = vqvae.from_official_keys(state)
            config = _vqvae_sizes(path, state)
        else:
            state = vqgan.from_official_keys(state)
            config = _vqgan_sizes(path, state)
    return _fill(path, lambda: build_autoencoder(config), state)


def load_vector_field(
    path: str | Path, official: OfficialCheckpoint | None = None, *, heads: int = OFFICIAL_HEADS
) -> VectorField:
    """Build the vector field of a main model file, in evaluation mode on the CPU.

    Args:
        path: a main model `.pth`.
        official: the file's content if it was read before.
        heads: attention heads, the one size that the shapes don't tell.
    Raises:
        FileNotFoundError, OfficialFormatError: see `read_official`; missing, unexpected or misshapen tensors; heads
            that don't divide the width.
    """
    state = (official or read_official(path)).vector_field
    if not state:
        raise OfficialFormatError(f"{path} holds no vector field: pass the main model (model.pth), not the autoencoder")
    _require(path, state, {"project_in.1.weight": 2, "project_out.4.weight": 4})
    width, channels_in = state["project_in.1.weight"].shape
    latent_channels = state["project_out.4.weight"].shape[0]
    if channels_in not in (2 * latent_channels, 3 * latent_channels):
        raise OfficialFormatError(
            f"{path}: project_in.1.weight takes {channels_in} channels, expected 3 (with a reference) or 2 (without) "
            f"times the {latent_channels} latent channels of project_out.4.weight"
        )
    if heads < 1 or width % heads:
        raise OfficialFormatError(
            f"{path}: its width {width} must be a multiple of heads {heads}: pass heads= (--heads)"
        )
    with _legal_sizes(path):
        config = VectorFieldConfig(
            width=width,
            depth=_count_blocks(state, "in_blocks"),
            mid_depth=_count_blocks(state, "mid_blocks"),
            heads=heads,
            head="bn" if "project_out.3.running_mean" in state else "ln",
            reference=channels_in == 3 * latent_channels,
        )
    return _fill(path, lambda: VectorField(config, latent_channels), state)


def load_refiner(path: str | Path) -> RCAN:
    """Build the refiner of an official file, in evaluation mode on the CPU.

    Args:
        path: a refiner's `.pth`.
    Raises:
        FileNotFoundError, OfficialFormatError: see `read_official`; missing, unexpected or misshapen tensors.
    """
    state = read_official(path).refiner
    if not state:
        raise OfficialFormatError(f"{path} holds no refiner: pass the .pth of a refiner's training")
    head, squeeze = "head.weight", "body.0.body.0.body.3.conv_du.0.weight"
    _require(path, state, {head: 4, squeeze: 4})
    features, hidden = state[head].shape[0], state[squeeze].shape[0]
    with _legal_sizes(path):
        config = RefinerModelConfig(
            # The last of each is no group and no block but the closing convolution.
            groups=_count_blocks(state, "body") - 1,
            blocks=_count_blocks(state, "body.0.body") - 1,
            features=features,
            reduction=features // max(hidden, 1),
            tanh="tail.0.weight" in state,
        )
    return _fill(path, lambda: RCAN(config), state)


def _fill(path: str | Path, build: Callable[[], Network], found: Mapping[str, Tensor]) -> Network:
    """Build a network, give it the tensors of a file, converted to its types, and set evaluation mode.

    Raises:
        OfficialFormatError: missing, unexpected, misshapen or non-finite tensors, by name.
    """
    with torch.device("meta"):
        network = build()
    expected = network.state_dict()
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "wrong shape": [
            f"{name} {list(found[name].shape)}, expected {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in found and found[name].shape != tensor.shape
        ],
    }
    if any(problems.values()):
        described = "; ".join(f"{problem}: {join_names(names)}" for problem, names in problems.items() if names)
        raise OfficialFormatError(f"{path} does not fit the official network; {described}")
    # The files may be in half precision. All tensors of a network are in its state dict, so nothing is left on meta.
    tensors = {name: tensor.to(expected[name].dtype) for name, tensor in found.items()}
    network.load_state_dict(tensors, strict=True, assign=True)
    if (broken := not_finite(network)) is not None:
        raise OfficialFormatError(f"{path}: {broken} has NaN or inf: the file is damaged, or its training diverged")
    return network.eval()


def _vqgan_sizes(path: str | Path, state: Mapping[str, Tensor]) -> VQGANConfig:
    conv_in, conv_out, codebook = "encoder.conv_in.weight", "encoder.conv_out.weight", "quantizer.embedding.weight"
    _require(path, state, {conv_in: 4, conv_out: 4, codebook: 2})
    channels = state[conv_in].shape[0]
    levels = range(_count_blocks(state, "encoder.down"))
    convolutions = [f"encoder.down.{level}.block.0.conv1.weight" for level in levels]
    _require(path, state, dict.fromkeys(convolutions, 4))
    widths = {name: state[name].shape[0] for name in convolutions}
    for name, width in widths.items():
        if not channels or width % channels:
            raise OfficialFormatError(f"{path}: {name} has {width} channels, no multiple of the {channels} of conv_in")
    return VQGANConfig(
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths.values()),
        blocks=_count_blocks(state, "encoder.down.0.block"),
        decoder_blocks=_count_blocks(state, "decoder.up.0.block"),
        attention_resolutions=tuple(
            NOMINAL_RESOLUTION // 2**level for level in levels if f"encoder.down.{level}.attn.0.q.weight" in state
        ),
        resolution=NOMINAL_RESOLUTION,
        latent_channels=state[conv_out].shape[0],
        codes=state[codebook].shape[0],
        norm_groups=32,
    )


def _vqvae_sizes(path: str | Path, state: Mapping[str, Tensor]) -> VQVAEConfig:
    names = ("encoder.conv_in.weight", "encoder.out_conv.weight", "quantizer.embedding.weight")
    _require(path, state, dict(zip(names, (4, 4, 2), strict=True)))
    channels, latent_channels, codes = (state[name].shape[0] for name in names)
    levels = min(_count_blocks(state, "encoder.residuals"), MOST_HALVINGS)
    config = VQVAEConfig(channels=channels, levels=levels, latent_channels=latent_channels, codes=codes, norm_groups=32)
    deepest = state["encoder.out_conv.weight"].shape[1]
    if channels * 2**levels != deepest:
        raise OfficialFormatError(
            f"{path} does not fit the official network; encoder.out_conv.weight takes {deepest} channels, expected "
            f"the {channels} of encoder.conv_in.weight doubled {levels} times, once per encoder.residuals"
        )
    return config


def _count_blocks(state: Mapping[str, Tensor], name: str) -> int:
    """One more than the highest block index, but at most the number of tensors; `_fill` names what a gap lacks."""
    indices = [int(found.group(1)) for key in state if (found := re.match(rf"{re.escape(name)}\.(\d+)\.", key))]
    return min(max(indices, default=-1) + 1, len(state))


def _require(path: str | Path, state: Mapping[str, Tensor], dimensions: Mapping[str, int]) -> None:
    """Check that the tensors that sizes are read from exist and have the right number of dimensions."""
    for name, ndim in dimensions.items():
        if name not in state:
            raise OfficialFormatError(f"{path} does not fit the official network; missing: {name}")
        if state[name].ndim != ndim:
            raise OfficialFormatError(f"{path}: {name} has shape {list(state[name].shape)}, expected {ndim} dimensions")


@contextmanager
def _legal_sizes(path: str | Path) -> Iterator[None]:
    """Turn the error of a config class into one about the file, whose sizes no network of ours has."""
    try:
        yield
    except ValidationError as error:
        problems = [
            ": ".join([*map(str, problem["loc"]), problem["msg"].removeprefix("Value error, ")])
            for problem in error.errors()
        ]
        raise OfficialFormatError(f"{path} does not fit the official network; {'; '.join(problems)}") from None
