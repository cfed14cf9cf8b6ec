"""Official files to networks: for a predictor, or with the configuration's sizes as parts of a run."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from pipelines.config import RiverConfig, load_config, model_sizes
from pipelines.errors import UserError
from pipelines.loading import PredictorParts, weights_digest
from pipelines.official.official_networks import (
    OFFICIAL_HEADS,
    load_autoencoder,
    load_refiner,
    load_vector_field,
)
from pipelines.official.weight_files import OfficialFormatError, read_official
from pipelines.runtime.context import image_memory_format
from pipelines.runtime.files import file_sha256
from pipelines.runtime.progress import say
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.config import RefinerModelConfig, VQGANConfig, VQVAEConfig
from stage1_autoencoder.rcan import RCAN
from stage2_flow.config import SamplingConfig, VectorFieldConfig
from stage2_flow.standardization import Standardization
from stage2_flow.vector_field import VectorField

# The files don't tell; KTH's rate, and about CLEVRER's. CLEVRER's model, which has the custom VQ-VAE, sees every fifth
# frame.
FRAMES_PER_SECOND = 25.0
CLEVRER_FRAME_STEP = 5

ModelConfig = VQGANConfig | VQVAEConfig | VectorFieldConfig | RefinerModelConfig


@dataclass(frozen=True)
class OfficialFiles:
    """The files that the user named."""

    model: Path | None = None
    autoencoder: Path | None = None
    refiner: Path | None = None

    def check(self, dashes: str = "--") -> None:
        """Refuse paths that are no files.

        Args:
            dashes: before an option's name in messages; empty in Python.
        Raises:
            UserError: names the option and the path.
        """
        for option, path in vars(self).items():
            if path is not None and not path.is_file():
                problem = "is a folder: name the file in it" if path.is_dir() else "no such file"
                raise UserError(f"{dashes}{option} {path}: {problem}")


@dataclass(frozen=True)
class OfficialNetworks:
    """The networks in the files, with the sizes of the files; None if there is no file of one.

    Attributes:
        autoencoder_path: the file that holds the autoencoder.
        iterations: of the main model's training; None if its file does not tell.
    """

    autoencoder: Autoencoder | None = None
    autoencoder_path: Path | None = None
    field: VectorField | None = None
    iterations: int | None = None
    refiner: RCAN | None = None


def read_networks(files: OfficialFiles, heads: int = OFFICIAL_HEADS) -> OfficialNetworks:
    """Read the networks of all files. An autoencoder inside the main model wins over one of its own file.

    Args:
        heads: attention heads of the vector field, which the shapes don't tell.
    Raises:
        OfficialFormatError: a file that the official code does not write; heads that don't divide the width.
    """
    autoencoder, path, field, iterations = None, files.autoencoder, None, None
    if files.model is not None:
        content = read_official(files.model)
        field, iterations = load_vector_field(files.model, content, heads=heads), content.iterations
        if content.autoencoder:
            if path is not None:
                say(f"{files.model} holds its autoencoder; {path} is ignored")
            autoencoder, path = load_autoencoder(files.model, content), files.model
    if autoencoder is None and path is not None:
        autoencoder = load_autoencoder(path)
    refiner = None if files.refiner is None else load_refiner(files.refiner)
    return OfficialNetworks(autoencoder, path, field, iterations, refiner)


def check_channels(
    field: VectorField, model: str | Path, autoencoder: Autoencoder, autoencoder_path: str | Path
) -> None:
    """Refuse a vector field and an autoencoder whose latents have different channels.

    Raises:
        UserError: names both files and numbers.
    """
    if field.latent_channels != autoencoder.config.latent_channels:
        raise UserError(
            f"{model} predicts latents of {field.latent_channels} channels, but the autoencoder of "
            f"{autoencoder_path} makes {autoencoder.config.latent_channels}: they were not trained together; "
            "name the autoencoder that came with the model"
        )


def load_official(files: OfficialFiles, device: torch.device, *, heads: int = OFFICIAL_HEADS) -> PredictorParts:
    """Load a released model for prediction, without a run.

    Args:
        files: the main model; the autoencoder if the model holds none; optionally a refiner.
        heads: attention heads, which the shapes don't tell.
    Returns:
        With raw latents, the paper's sampling, and 25 frames per second (5 with the custom VQ-VAE).
    Raises:
        OfficialFormatError: a file that the official code does not write; a model without its autoencoder; heads that
            don't divide the width.
        UserError: no such file; files that don't belong together.
    """
    files.check("")
    networks = read_networks(files, heads)
    autoencoder, field, refiner = networks.autoencoder, networks.field, networks.refiner
    if autoencoder is None:
        raise OfficialFormatError(
            f"{files.model} works on latents of an autoencoder, which it does not hold: pass the one that came with "
            "it, autoencoder='vqvae.ckpt' (CLEVRER's: 'vqvae.pth')"
        )
    check_channels(field, files.model, autoencoder, networks.autoencoder_path)
    layout = image_memory_format(device)
    step = CLEVRER_FRAME_STEP if isinstance(autoencoder.config, VQVAEConfig) else 1
    return PredictorParts(
        autoencoder=autoencoder.to(device, memory_format=layout).requires_grad_(False),
        vector_field=field.to(device).requires_grad_(False),
        standardization=Standardization.identity(field.latent_channels).to(device),
        sampling=SamplingConfig(preset="official"),
        fps=FRAMES_PER_SECOND / step,
        device=device,
        refiner=None if refiner is None else refiner.to(device, memory_format=layout).requires_grad_(False),
        no_refiner=f"{files.model} was loaded without a refiner: pass refiner='refiner.pth'",
    )


@dataclass(frozen=True)
class Part:
    """One network of a run.

    Attributes:
        name: `autoencoder`, `flow` or `refiner`: its folder in the run.
        source: the file that holds the weights.
        network: with the configuration's sizes and these weights.
        step: iterations of its training; if the file does not tell, the configuration's, or 0.
        state: content of `state.json`.
    """

    name: str
    source: Path
    network: nn.Module
    step: int
    state: dict[str, Any]


def parts_of_run(
    config: RiverConfig, files: OfficialFiles, networks: OfficialNetworks, autoencoder_digest: str
) -> Iterator[Part]:
    """Turn official networks into parts of a run. Their sizes must fit, see `check_sizes`.

    Args:
        autoencoder_digest: of the autoencoder whose latents flow and refiner work on.
    """
    if networks.autoencoder is not None:
        # A main model's iterations are the flow's, and an autoencoder's file may count other things.
        yield _part(
            config,
            "autoencoder",
            networks.autoencoder_path,
            networks.autoencoder,
            None,
            identity={
                "autoencoder": {"model": model_sizes(config.autoencoder.model)},
                "dataset": {"image_size": config.dataset.image_size},
            },
        )
    if networks.field is not None:
        channels = networks.field.latent_channels
        _, *grid = config.autoencoder.model.latent_shape(config.dataset.frame_size)
        yield _part(
            config,
            "flow",
            files.model,
            networks.field,
            networks.iterations,
            identity={"flow": {"model": model_sizes(config.flow.model)}},
            latent_shape=[channels, *grid],
            # Official weights work on raw latents.
            standardization={"mean": [0.0] * channels, "std": [1.0] * channels},
            fps=(config.dataset.fps or FRAMES_PER_SECOND) / config.dataset.frame_step,
            store={"path": None, "fingerprint": None, "autoencoder": autoencoder_digest},
        )
    if networks.refiner is not None:
        yield _part(
            config,
            "refiner",
            files.refiner,
            networks.refiner,
            None,
            identity={"refiner": {"model": model_sizes(config.refiner.model)}},
            autoencoder=autoencoder_digest,
            store={"fingerprint": None},
            perceptual=None,
        )


def _part(
    config: RiverConfig, name: str, source: Path, network: nn.Module, iterations: int | None, **state: Any
) -> Part:
    section = getattr(config, name)
    imported = {
        "file": source.name,
        "sha256": file_sha256(source),
        "iterations": iterations,
        "weights": weights_digest(network),
    }
    step = (section.training.steps or 0) if iterations is None else iterations
    return Part(
        name, source, network, step, {"imported": imported, "model": section.model.model_dump(mode="json")} | state
    )


def check_sizes(files: OfficialFiles, networks: OfficialNetworks, config: RiverConfig, presets: Sequence[Path]) -> None:
    """Refuse files whose sizes differ from the configuration's.

    Args:
        presets: folders whose YAML files are searched for one that fits.
    Raises:
        UserError: the differences, and the preset that fits or the options that make the configuration fit.
    """
    found = {
        "autoencoder": (networks.autoencoder_path, networks.autoencoder),
        "flow": (files.model, networks.field),
        "refiner": (files.refiner, networks.refiner),
    }
    found = {section: (path.name, network.config) for section, (path, network) in found.items() if network is not None}
    misfits = dict(_misfits(found, config))
    if not misfits:
        return

    def fits(preset: Path) -> bool:
        try:
            return not any(_misfits(found, load_config(preset)))
        except UserError:
            return False

    fitting = [str(path) for folder in dict.fromkeys(presets) for path in sorted(folder.glob("*.yaml")) if fits(path)]
    if fitting:
        way_out = f"these have these sizes: --config {' or --config '.join(fitting)}"
    else:
        way_out = "write these sizes into a configuration, or add to this and all later commands\n  " + " ".join(
            f"--set {shlex.quote(option)}" for option in misfits.values()
        )
    names = " and ".join(dict.fromkeys(name for name, _ in found.values()))
    raise UserError("\n".join([f"{names} does not fit the configuration:", *misfits, way_out]))


def _misfits(found: Mapping[str, tuple[str, ModelConfig]], config: RiverConfig) -> Iterator[tuple[str, str]]:
    """Each difference in sizes: a line for people, and the `key=value` that makes the configuration fit."""
    for section, (file, sizes) in found.items():
        key, expected = f"{section}.model", getattr(config, section).model
        if _layout(sizes) != _layout(expected):
            whole = yaml.safe_dump(model_sizes(sizes), default_flow_style=True, sort_keys=False, width=10**6).strip()
            yield f"  {key}: {_layout(sizes)} in {file}, {_layout(expected)} in the configuration", f"{key}={whole}"
            continue
        ours = _comparable(expected)
        for name, value in _comparable(sizes).items():
            if value != ours[name]:
                text = f"  {key}.{name}: {value} in {file}, {ours[name]} in the configuration"
                yield text, f"{key}.{name}={value}".replace(" ", "")


def _comparable(model: ModelConfig) -> dict[str, Any]:
    """Sizes with one spelling each; attention is compared by `_layout`."""
    sizes = model_sizes(model)
    if isinstance(model, VQGANConfig):
        sizes["decoder_blocks"] = model.blocks + 1 if model.decoder_blocks is None else model.decoder_blocks
        del sizes["attention_resolutions"], sizes["resolution"]
    return sizes


def _layout(model: ModelConfig) -> str:
    """What an autoencoder is besides numbers, in words."""
    if isinstance(model, VQVAEConfig):
        return model.architecture
    if not isinstance(model, VQGANConfig):
        return ""
    levels = range(len(model.channel_multipliers))
    attention = [level for level in levels if model.resolution // 2**level in model.attention_resolutions]
    return f"{model.architecture} with attention at levels {attention}"
