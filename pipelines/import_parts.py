"""Official files to networks of a configuration's sizes, each with all that its checkpoint says."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.import_download import download_autoencoder
from pipelines.import_sizes import NO_SIZES, FoundSizes, check_sizes
from pipelines.official.autoencoders import load_autoencoder
from pipelines.official.files import OfficialCheckpoint, fill, read_official
from pipelines.official.refiners import load_refiner
from pipelines.official.vector_fields import OFFICIAL_HEADS, check_trained_together, load_vector_field
from pipelines.runtime.progress import say
from pipelines.runtime.runs import is_imported
from pipelines.train_autoencoder import find_autoencoder, load_trained_autoencoder, weights_digest
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.rcan import RCAN
from stage2_flow.standardization import Standardization
from stage2_flow.vector_field import VectorField

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
