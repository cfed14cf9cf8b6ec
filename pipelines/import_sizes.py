"""Holding the sizes of official files to a configuration, and finding the configuration that fits."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.config import RiverConfig, load_config
from pipelines.errors import UserError
from pipelines.official.autoencoders import NOMINAL_RESOLUTION
from stage1_autoencoder.config import VQGANConfig, VQVAEConfig
from stage1_autoencoder.refiner_config import RefinerModelConfig
from stage2_flow.config import VectorFieldConfig

# What is no size of a network: weights fit whatever these say.
NO_SIZES = {"dropout"}


@dataclass(frozen=True)
class FoundSizes:
    """What the shapes in official files tell; None for what no file was given of.

    Attributes:
        files: the name of the file that each part came from, by the part's name.
    """

    files: dict[str, str]
    autoencoder: VQGANConfig | VQVAEConfig | None = None
    flow: VectorFieldConfig | None = None
    refiner: RefinerModelConfig | None = None


@dataclass(frozen=True)
class Misfit:
    """A size that the configuration has otherwise than the file.

    Attributes:
        text: one line for people.
        options: key=value that make it fit.
    """

    text: str
    options: tuple[str, ...]


def check_sizes(found: FoundSizes, config: RiverConfig, presets: Sequence[Path]) -> None:
    """Refuse files that the configuration does not fit.

    Args:
        presets: the folders whose YAML files are looked through for one that fits.
    Raises:
        UserError: says what differs, and which preset fits or which options make the configuration fit.
    """
    misfits = list(_misfits(found, config))
    if not misfits:
        return
    folders = list(dict.fromkeys(presets))
    fitting = [str(path) for folder in folders for path in sorted(folder.glob("*.yaml")) if _fits(found, path)]
    if fitting:
        way_out = f"these are the sizes of {' and of '.join(fitting)}: name it with --config"
    else:
        options = dict.fromkeys(option for misfit in misfits for option in misfit.options)
        way_out = (
            f"no configuration in {' or '.join(map(str, folders))} has these sizes. Write them into one of yours, or "
            "add to this and all later commands\n  " + " ".join(f"--set {shlex.quote(option)}" for option in options)
        )
    files = " and ".join(dict.fromkeys(found.files.values()))
    raise UserError(
        f"{files} does not fit the configuration:\n  " + "\n  ".join(misfit.text for misfit in misfits) + f"\n{way_out}"
    )


def _fits(found: FoundSizes, preset: Path) -> bool:
    try:
        return not any(_misfits(found, load_config(preset)))
    except UserError:
        return False


def _misfits(found: FoundSizes, config: RiverConfig) -> Iterator[Misfit]:
    if found.autoencoder is not None:
        yield from _of_autoencoder(found.files["autoencoder"], found.autoencoder, config.autoencoder.model)
    if found.flow is not None:
        yield from _of_section("flow.model", found.files["flow"], _plain(found.flow), _plain(config.flow.model))
    if found.refiner is not None:
        wanted = _plain(config.refiner.model)
        yield from _of_section("refiner.model", found.files["refiner"], _plain(found.refiner), wanted)


def _of_autoencoder(file: str, found: VQGANConfig | VQVAEConfig, wanted: VQGANConfig | VQVAEConfig) -> Iterator[Misfit]:
    section = "autoencoder.model"
    if found.architecture != wanted.architecture:
        whole = yaml.safe_dump(_plain(found), default_flow_style=True, sort_keys=False, width=10**6).strip()
        text = f"{section}.architecture: {found.architecture} in {file}, {wanted.architecture} in the configuration"
        yield Misfit(text, (f"{section}={whole}",))
        return
    yield from _of_section(section, file, _comparable(found), _comparable(wanted))
    if isinstance(found, VQGANConfig) and isinstance(wanted, VQGANConfig):
        levels = _levels_with_attention(found)
        if levels != _levels_with_attention(wanted):
            # The side at full resolution is a name: any does that can be halved as often as there are levels.
            enough = wanted.resolution >> (len(found.channel_multipliers) - 1)
            resolution = wanted.resolution if enough else NOMINAL_RESOLUTION
            sides = [resolution // 2**level for level in levels]
            options = [f"{section}.attention_resolutions={sides}".replace(" ", "")]
            if resolution != wanted.resolution:
                options.append(f"{section}.resolution={resolution}")
            text = (
                f"{section}.attention_resolutions: attention at levels {list(levels)} in {file}, "
                f"{list(_levels_with_attention(wanted))} in the configuration"
            )
            yield Misfit(text, tuple(options))


def _of_section(section: str, file: str, found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[Misfit]:
    for key, value in found.items():
        if value != wanted[key]:
            option = f"{section}.{key}={value}".replace(" ", "")
            yield Misfit(f"{section}.{key}: {value} in {file}, {wanted[key]} in the configuration", (option,))


def _plain(sizes: VQGANConfig | VQVAEConfig | VectorFieldConfig | RefinerModelConfig) -> dict[str, Any]:
    return sizes.model_dump(mode="json", exclude=NO_SIZES)


def _comparable(sizes: VQGANConfig | VQVAEConfig) -> dict[str, Any]:
    """Plain sizes, each said in one way only; without attention, which is compared by levels."""
    plain = _plain(sizes)
    if isinstance(sizes, VQGANConfig):
        if plain["decoder_blocks"] is None:
            plain["decoder_blocks"] = sizes.blocks + 1
        del plain["attention_resolutions"], plain["resolution"]
    return plain


def _levels_with_attention(sizes: VQGANConfig) -> tuple[int, ...]:
    levels = range(len(sizes.channel_multipliers))
    return tuple(level for level in levels if sizes.resolution // 2**level in sizes.attention_resolutions)
