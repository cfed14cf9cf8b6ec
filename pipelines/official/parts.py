"""Official files to networks of a configuration's sizes, each with all that its checkpoint says."""

import hashlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from pipelines.config import RiverConfig, load_config
from pipelines.errors import UserError
from pipelines.loading import find_autoencoder, load_trained_autoencoder, weights_digest
from pipelines.official.autoencoders import NOMINAL_RESOLUTION, load_autoencoder
from pipelines.official.official_download import download_autoencoder
from pipelines.official.refiners import load_refiner
from pipelines.official.vector_fields import OFFICIAL_HEADS, check_trained_together, load_vector_field
from pipelines.official.weight_files import OfficialCheckpoint, fill, read_official
from pipelines.runtime.progress import say
from pipelines.runtime.runs import is_imported
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.config import RefinerModelConfig, VQGANConfig, VQVAEConfig
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.rcan import RCAN
from stage2_flow.config import VectorFieldConfig
from stage2_flow.standardization import Standardization
from stage2_flow.vector_field import VectorField

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


# Of the videos, where the weights tell nothing: KTH's and about CLEVRER's. Pictures play at this rate.
FRAMES_PER_SECOND = 25.0


@dataclass(frozen=True)
class OfficialFiles:
    """The files that the user named."""

    model: Path | None = None
    autoencoder: Path | None = None
    refiner: Path | None = None

    def check(self, dashes: str = "--") -> None:
        """Refuse what is no file.

        Args:
            dashes: before an option's name in messages: none in Python.
        Raises:
            UserError: names the option.
        """
        for option, path in vars(self).items():
            if path is not None and not path.is_file():
                what = "is a folder: name the file in it" if path.is_dir() else "no such file"
                raise UserError(f"{dashes}{option} {path}: {what}")


@dataclass(frozen=True)
class Part:
    """One network of the run to be.

    Attributes:
        name: `autoencoder`, `flow` or `refiner`: its folder in the run.
        source: the file that the weights are from.
        network: of the configuration's sizes, with these weights.
        step: iterations of training, as far as they are known.
        state: what goes to `state.json`.
    """

    name: str
    source: Path
    network: nn.Module
    step: int
    state: dict[str, Any]


@dataclass(frozen=True)
class _Found:
    """An autoencoder, and where it was found; `content` is None where that is the run."""

    source: Path
    network: Autoencoder
    content: OfficialCheckpoint | None


def read_parts(
    config: RiverConfig,
    files: OfficialFiles,
    *,
    download: bool,
    presets: Sequence[Path],
    heads: int = OFFICIAL_HEADS,
) -> list[Part]:
    """The networks that the files hold.

    Args:
        download: fetch the autoencoder where the model holds none.
        presets: folders of configurations, looked through where this one does not fit.
        heads: attention heads of the vector field, which the shapes don't tell.
    Raises:
        OfficialFormatError: a file that is not what the official code writes.
        UserError: files that don't belong together, or don't fit the configuration.
    """
    model = None if files.model is None else read_official(files.model)
    try:
        field = None if model is None else load_vector_field(files.model, model, heads=heads)
    except ValueError as error:
        raise UserError(f"{error}: name their number with --heads") from None
    refiner = None if files.refiner is None else load_refiner(files.refiner)
    autoencoder = _find_autoencoder(config, files, model, download)
    if field is not None:
        check_trained_together(field, files.model, autoencoder.network, autoencoder.source)
    paths = {"autoencoder": autoencoder.source, "flow": files.model, "refiner": files.refiner}
    found = FoundSizes(
        files={name: path.name for name, path in paths.items() if path is not None},
        autoencoder=autoencoder.network.config if autoencoder.content else None,
        flow=field and field.config,
        refiner=refiner and refiner.config,
    )
    check_sizes(found, config, presets)
    return list(_parts(config, files, autoencoder, model, field, refiner))


def _parts(
    config: RiverConfig,
    files: OfficialFiles,
    autoencoder: _Found,
    model: OfficialCheckpoint | None,
    field: VectorField | None,
    refiner: RCAN | None,
) -> Iterator[Part]:
    digest = weights_digest(autoencoder.network)
    if autoencoder.content is not None:
        yield _autoencoder_part(config, autoencoder)
    if field is not None:
        yield _flow_part(config, files.model, model, field, digest)
    if refiner is not None:
        yield _refiner_part(config, files.refiner, refiner, digest)


def _find_autoencoder(
    config: RiverConfig, files: OfficialFiles, model: OfficialCheckpoint | None, download: bool
) -> _Found:
    """The one inside the model, which wins; else the one that was named, or imported before, or is fetched.

    Raises:
        UserError: there is none.
    """
    if model is not None and model.autoencoder:
        if files.autoencoder is not None:
            say(f"import-official: {files.model} holds its autoencoder; {files.autoencoder} is not looked at")
        return _Found(files.model, load_autoencoder(files.model, model), model)
    path, before = files.autoencoder, find_autoencoder(config.run_path)
    what = files.model or files.refiner
    if path is None and before is not None and is_imported(before):
        return _Found(before.path, load_trained_autoencoder(before, torch.device("cpu")), None)
    if path is None and download:
        path = download_autoencoder(config)
    if path is not None:
        content = read_official(path)
        return _Found(path, load_autoencoder(path, content), content)
    if before is None:
        raise UserError(
            f"{what} works on an autoencoder's latents, which is not inside, and {config.run_path} has none: name the "
            "one that came with it: --autoencoder vqvae.ckpt (CLEVRER's: vqvae.pth)"
        )
    raise UserError(
        f"{what} works on the latents of another autoencoder than {before.path}, which was trained here: name the one "
        "that came with it, --autoencoder vqvae.ckpt, and with it another run (--set dataset.name=...) or --restart"
    )


def _autoencoder_part(config: RiverConfig, found: _Found) -> Part:
    sizes = config.autoencoder.model
    with torch.device("meta"):
        network = build_autoencoder(sizes)
    fill(found.source, network, found.network.state_dict())
    return _part(
        "autoencoder",
        found.source,
        network,
        None,  # a main model's iterations are the flow's, and an autoencoder's file may count other things
        config.autoencoder.training.steps,
        identity={
            "autoencoder": {"model": sizes.model_dump(mode="json", exclude=NO_SIZES)},
            "dataset": {"image_size": config.dataset.image_size},
        },
        model=sizes.model_dump(mode="json"),
    )


def _flow_part(
    config: RiverConfig, source: Path, official: OfficialCheckpoint, loaded: VectorField, autoencoder: str
) -> Part:
    sizes, channels = config.flow.model, loaded.latent_channels
    with torch.device("meta"):
        network = VectorField(sizes, channels)
    fill(source, network, loaded.state_dict())
    side = config.dataset.image_size // config.autoencoder.model.downsampling
    raw = Standardization.identity(channels)  # official weights know raw latents
    return _part(
        "flow",
        source,
        network,
        official.iterations,
        config.flow.training.steps,
        identity={"flow": {"model": sizes.model_dump(mode="json", exclude=NO_SIZES)}},
        model=sizes.model_dump(mode="json"),
        latent_shape=[channels, side, side],
        standardization={"mean": raw.mean.tolist(), "std": raw.std.tolist()},
        fps=FRAMES_PER_SECOND / config.dataset.frame_step,
        store={"path": None, "fingerprint": None, "autoencoder": autoencoder},
    )


def _refiner_part(config: RiverConfig, source: Path, loaded: RCAN, autoencoder: str) -> Part:
    sizes = config.refiner.model.model_dump(mode="json")
    return _part(
        "refiner",
        source,
        loaded,
        None,
        config.refiner.training.steps,
        identity={"refiner": {"model": sizes}, "autoencoder": autoencoder},
        model=sizes,
        autoencoder=autoencoder,
        store={"fingerprint": None},
        perceptual=None,
    )


def _part(name: str, source: Path, network: nn.Module, iterations: int | None, steps: int, **state: Any) -> Part:
    with source.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    imported = {
        "file": source.name,
        "sha256": sha256,
        "iterations": iterations,
        "weights": weights_digest(network),
    }
    # Where the file does not tell, the training has come to its end as well.
    return Part(name, source, network, steps if iterations is None else iterations, {"imported": imported, **state})
