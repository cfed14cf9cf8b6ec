"""Protocols of the literature: one YAML file each, which a person can add, and the settings that a protocol decides."""

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from pipelines.config.presets import preset_folders
from pipelines.config.yaml_files import merge, read_yaml
from pipelines.errors import UserError
from stage1_autoencoder.setting_types import Seed, Size
from stage1_autoencoder.videos.config import DatasetConfig, Split

Window = Literal["first", "random", "moving", "srvp", "mcvd", "extdm", "stdiff"]
Pitfall = Literal["psnr_of_mean_mse", "ssim_8bit", "fvd_pooled", "fvd_first_sample"]
# Numbers as published code computes them, where that is not what is usually meant.
PITFALLS: dict[Pitfall, str] = {
    "psnr_of_mean_mse": "PSNR of the squared error averaged over all predicted frames of a sample, as MCVD's code; "
    "lower than the mean of the frames' PSNR",
    "ssim_8bit": "SSIM of gray frames of 8 bits, as MCVD's code: predictions are truncated to 8 bits, gray is Pillow's "
    "`L` (0.299 R + 0.587 G + 0.114 B)",
    "fvd_pooled": "FVD with the samples of all clips as one set: K n predicted against n real clips",
    "fvd_first_sample": "FVD of the first sample of each clip: n predicted against n real clips",
}
# As `evaluation.videos`: all clips that there are.
ALL_CLIPS = 65536
# Settings that are part of a protocol only where its file has them.
_OPTIONAL = {"seed", "pitfalls"}


class ProtocolSettings(BaseModel):
    """The keys of `evaluation:` that a protocol decides."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: Split = Field("test", description="split that `evaluate` measures and `sample` shows; `study` takes val")
    context: Size = Field(10, description="frames given")
    horizon: Size = Field(30, description="frames predicted")
    videos: Size = Field(256, description="number of clips; some kinds of window give several of a video")
    samples: Size = Field(1, description="predictions per clip, each with its own sampling seed")
    window: Window = Field(
        "first",
        description="where a clip starts: at frame 0, at a random frame, or where the given frames move most; srvp, "
        "mcvd, extdm, stdiff: as these papers' code chooses videos and starts, see docs/comparing.md",
    )
    seed: Seed = Field(0, description="of random windows and of the bootstrap")
    fvd_context: bool = Field(
        True,
        description="whether clips of the Fréchet video distance begin with the given frames: yes in SRVP, SLAMP, MCVD "
        "and RaMViD, no in FitVid",
    )
    fvd_frames: PositiveInt | None = Field(
        16,
        ge=10,
        description="frames per input of the I3D: clips are cut into consecutive segments of this length, the last one "
        "aligned with the end of the clip; null: the whole clip",
    )
    pitfalls: tuple[Pitfall, ...] = Field(
        (),
        description="numbers as published code computes them, beside the usual ones: psnr_of_mean_mse, ssim_8bit, "
        "fvd_pooled, fvd_first_sample, see docs/comparing.md",
    )


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PublishedRow(_Part):
    """Numbers of a paper, as published.

    Attributes:
        source: where they were read.
    """

    method: str
    fvd: str | int | float | None = None
    psnr: str | int | float | None = None
    ssim: str | int | float | None = None
    lpips: str | int | float | None = None
    source: str


class PublishedProtocol(_Part):
    """How one paper or its code evaluates: `configs/protocols/<name>.yaml`.

    Attributes:
        name: of the file.
        title: one line.
        paper: in a word or two, for the list of protocols.
        source: where the facts are from.
        dataset: keys of `dataset:` that belong to the protocol.
        test_videos: number of videos of the split; None: any.
        evaluation: what it sets.
        not_stated: keys of `evaluation` and `aggregation` that the sources do not state: the values are this project's.
        aggregation: how the samples of a clip become one number.
        fvd_sets: predicted : real clips of a distance.
        fvd_network: which I3D, in a word or two.
        numbers: metric of the paper -> the metric of `evaluation.json` to compare with it; ` best` after its name: its
            `best_of`.
        rows: published numbers that these may be compared with.
        pitfalls: what misleads.
        differs: what this project does otherwise than the published code.
    """

    name: str
    title: str
    paper: str
    source: str
    dataset: dict[str, Any]
    test_videos: PositiveInt | None = None
    evaluation: ProtocolSettings
    not_stated: tuple[str, ...] = ()
    aggregation: Literal["best", "mean"]
    fvd_sets: str
    fvd_network: str
    numbers: dict[str, str] = {}
    rows: tuple[PublishedRow, ...] = ()
    pitfalls: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        known = {*ProtocolSettings.model_fields}
        if lacking := sorted(known - _OPTIONAL - self.evaluation.model_fields_set):
            raise ValueError(f"evaluation: a protocol decides all of its settings, missing: {', '.join(lacking)}")
        if not isinstance(self.dataset.get("splits", {}), dict):
            raise ValueError("dataset: splits has a value per split, such as {test: 21-25}")
        for key, keys, allowed in (
            ("dataset", self.dataset, DatasetConfig.model_fields),
            ("not_stated", self.not_stated, {*known, "aggregation"}),
        ):
            if unknown := sorted({*keys} - {*allowed}):
                raise ValueError(f"{key}: {', '.join(unknown)} is not one of {', '.join(sorted(allowed))}")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """Key of `evaluation` -> the value that the protocol sets."""
        return self.evaluation.model_dump(exclude_unset=True)


def protocol_files() -> dict[str, Path]:
    """Name -> file of all protocols, in the folders `protocols` beside the presets; sorted by name."""
    files = [file for folder in preset_folders() for file in (folder / "protocols").glob("*.yaml")]
    return dict(sorted({file.stem: file for file in reversed(files)}.items()))


def is_protocol_path(name: str) -> bool:
    """Whether a protocol is named by the path of its file."""
    return name.endswith(".yaml") or os.sep in name


def find_protocol(name: str) -> PublishedProtocol:
    """A protocol by its name, or by the path of its file, over its `base`.

    Raises:
        UserError: no such protocol, or a file that is not one; the message has the file and the key.
    """
    path = Path(os.path.expanduser(name)) if is_protocol_path(name) else protocol_files().get(name)
    if path is None or not path.is_file():
        raise UserError(f"{name}: no such protocol; known are {', '.join(protocol_files())} (`river protocols`)")
    try:
        return PublishedProtocol.model_validate(_read(path, seen=()) | {"name": path.stem})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        reason = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {key + ': ' if key else ''}{reason}") from None


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The values of a file over those of its `base`, the name of another protocol."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected the keys of a protocol, such as `title:`")
    base = values.pop("base", None)
    if base is None:
        return values
    file = protocol_files().get(base) if isinstance(base, str) else None
    if file is None or file in (path, *seen):
        raise UserError(f"{path}: base: {base!r} is not the name of another protocol: {', '.join(protocol_files())}")
    return merge(_read(file, (*seen, path)), values)
