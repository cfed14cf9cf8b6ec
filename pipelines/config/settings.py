"""The schema of the configuration: its sections and keys, with a line of help each."""

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from pipelines.config.literature import ProtocolSettings, find_protocol, is_protocol_path
from pipelines.errors import UserError
from stage1_autoencoder.config import (
    AutoencoderModelConfig,
    AutoencoderTrainingConfig,
    DecoderModelConfig,
    DecoderTrainingConfig,
    RefinerModelConfig,
    RefinerTrainingConfig,
    VQGANConfig,
)
from stage1_autoencoder.setting_types import FilePath, Seed, Size
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.views import parse_view
from stage2_flow.config import DistillationConfig, FlowTrainingConfig, SamplingConfig, VectorFieldConfig
from stage2_flow.sampling_plan import SamplingPlan

_UNITS = {
    "": 1,
    "B": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


def parse_size(text: str) -> int:
    """`"4 GiB"`, `"512MB"` or `"1000"` in bytes.

    Raises:
        UserError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise UserError(f"{text!r} is not a size of memory: expected for example 4 GiB or 512 MB")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if not 1 <= size < 2**63:
        raise UserError(f"{text!r} is not a size of memory: expected 1 byte or more, and less than 8388608 TiB")
    return int(size)


# Pixels per side of SSIM's window: smaller images have no SSIM.
SSIM_WINDOW = 11
# Of the field. Training takes 16 bytes per weight: itself, its gradient, and two moments of AdamW.
MOST_WEIGHTS = 2**40 // 16


class EvaluationConfig(ProtocolSettings):
    """The protocol: which clips, how many frames are given, how many are predicted.

    With `protocol`, keys that are not set take the protocol's values instead of the defaults.
    """

    protocol: str | None = Field(
        None,
        description="a protocol of the literature, by its name (`river protocols`) or by the path of its file, which "
        "sets the keys above; keys set explicitly win, and the result reports them",
    )
    batch_size: Size = Field(32, description="clips per batch; changes only memory and speed")
    video_network: FilePath | None = Field(
        None,
        description="path of the I3D, i3d_torchscript.pt, for the Fréchet video distance; null: the copy in torch's "
        "download folder (--download downloads it)",
    )
    resamples: NonNegativeInt = Field(
        1000,
        le=100_000,
        description="bootstrap resamples over recordings for 95 % intervals; 0: no intervals. At most 200 are used for "
        "the Fréchet distances of videos and of latents",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_protocol(cls, values: Any) -> Any:
        name = values.get("protocol") if isinstance(values, dict) else None
        if not isinstance(name, str):
            return values
        try:
            protocol = find_protocol(name)
        except UserError as error:
            raise ValueError(f"protocol: {error}") from None
        if is_protocol_path(name):  # a run's config.yaml is read in any folder
            values = values | {"protocol": os.path.abspath(os.path.expanduser(name))}
        return protocol.settings | values


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


# Folders of a run. Its files, and backups of its folders, have a dot in their names, which names of runs have not.
_RUN_FOLDERS = ("autoencoder", "decoder", "flow", "refiner", "samples", "predictions", "evaluation_records")


class PathsConfig(_Section):
    """Root folders; the data set's name is appended to each. The defaults are in the working folder."""

    data: FilePath = Field("data", description="raw videos: <data>/<name>")
    latents: FilePath = Field("latents", description="stores: <latents>/<name>.zarr")
    runs: FilePath = Field("runs", description="checkpoints, logs, samples: <runs>/<name>")


class AutoencoderConfig(_Section):
    model: AutoencoderModelConfig = Field(default_factory=VQGANConfig)
    training: AutoencoderTrainingConfig = Field(default_factory=AutoencoderTrainingConfig)


class CacheConfig(_Section):
    """The store of latents."""

    residency: Literal["auto", "device", "host", "stream"] = Field(
        "auto",
        description="where stage 2 keeps the latents: all on the training device, all in host memory, or, with stream, "
        "a part at a time within memory_budget; auto: the first of these that fits into free memory",
    )
    dtype: Literal["float16", "float32"] = "float16"
    chunk_frames: PositiveInt | None = Field(None, le=2**24, description="frames per chunk; null: about 8 MiB")
    views: tuple[str, ...] = Field(
        ("identity",),
        description="augmented versions of the training videos to store: identity, hflip, jitter-1, jitter-2, ... "
        "(color, constant over a video); the other splits have identity only",
    )
    codes: bool = Field(True, description="store the nearest codes beside the latents")
    preview: NonNegativeInt = Field(
        0,
        description="shorter side in pixels of small frames that are stored beside the latents, so that a store can be "
        "looked at without an autoencoder; 0: none",
    )
    precision: Literal["fp32", "tf32", "bf16"] = Field(
        "fp32",
        description="of the encoder: on a GPU tf32 (convolutions) adds an error about as large as that of fp16 "
        "storage, bf16 one ten times as large",
    )
    compile: bool = Field(False, description="torch.compile the encoder, which takes about a minute")
    batch_frames: Size = Field(
        1,
        description="minimum number of frames encoded at once, rounded up to whole batches of the network; changes "
        "memory and speed, not the store",
    )
    memory_budget: str = Field(
        "4 GiB", description="memory for the frames and latents of `encode`, and for latents with residency: stream"
    )

    @field_validator("views")
    @classmethod
    def _views_are_known(cls, views: tuple[str, ...]) -> tuple[str, ...]:
        for view in views:
            parse_view(view)
        if not views or len(set(views)) < len(views):
            raise ValueError("expected at least one view, and none twice")
        return views

    @property
    def memory_budget_bytes(self) -> int:
        return parse_size(self.memory_budget)


class FlowConfig(_Section):
    model: VectorFieldConfig = Field(default_factory=VectorFieldConfig)
    training: FlowTrainingConfig = Field(default_factory=FlowTrainingConfig)


class RefinerConfig(_Section):
    """The optional refinement network."""

    model: RefinerModelConfig = Field(default_factory=RefinerModelConfig)
    training: RefinerTrainingConfig = Field(default_factory=RefinerTrainingConfig)


class DecoderConfig(_Section):
    """The optional fast decoder, for `sampling.decoder: fast`."""

    model: DecoderModelConfig = Field(default_factory=DecoderModelConfig)
    training: DecoderTrainingConfig = Field(default_factory=DecoderTrainingConfig)


class LoggingConfig(_Section):
    every: PositiveInt = Field(50, description="steps between lines of log.jsonl")
    wandb: Literal["off", "offline", "online"] = Field("off", description="only online uses the network")
    wandb_project: str = "river"
    tensorboard: bool = Field(False, description="write event files too, for `tensorboard --logdir runs`")

    @field_validator("wandb", mode="before")
    @classmethod
    def _accept_yaml_booleans(cls, value: Any) -> Any:
        # Readers of YAML 1.1 write a bare `off` as false.
        return {True: "offline", False: "off"}[value] if isinstance(value, bool) else value


class RiverConfig(_Section):
    """Everything a run depends on."""

    seed: Seed = 0
    run: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$",
        max_length=100,
        description="name of a further run on the same store and autoencoder: its flow, refiner, samples and results "
        "are in <runs>/<dataset>/<run>; --run NAME sets it",
    )
    paths: PathsConfig = Field(default_factory=PathsConfig)
    dataset: DatasetConfig
    autoencoder: AutoencoderConfig = Field(default_factory=AutoencoderConfig)
    cache: CacheConfig = Field(default_factory=CacheConfig)
    flow: FlowConfig = Field(default_factory=FlowConfig)
    distillation: DistillationConfig = Field(default_factory=DistillationConfig)
    refiner: RefinerConfig = Field(default_factory=RefinerConfig)
    decoder: DecoderConfig = Field(default_factory=DecoderConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)

    @field_validator("run")
    @classmethod
    def _is_no_folder_of_a_run(cls, name: str | None) -> str | None:
        if name is not None and name.lower() in _RUN_FOLDERS:  # lower: some file systems ignore case
            raise ValueError(f"a run has folders of its own called {', '.join(_RUN_FOLDERS)}")
        return name

    @model_validator(mode="after")
    def _sizes_fit(self) -> "RiverConfig":
        self._check_frame_size()
        for key, size in (
            ("autoencoder.training.pool_memory", self.autoencoder.training.pool_memory),
            ("cache.memory_budget", self.cache.memory_budget),
        ):
            try:
                parse_size(size)
            except UserError as error:
                raise ValueError(f"{key}: {error}") from None
        field = self.flow.model
        if field.weights > MOST_WEIGHTS:
            raise ValueError(
                f"flow.model.width: {field.width} gives the field {field.weights / 1e9:.0f} billion weights, and "
                f"{MOST_WEIGHTS / 1e9:.0f} billion take 1 TiB in training: use a smaller width or depth"
            )
        SamplingPlan.from_config(self.sampling)  # refuses options that exclude each other
        return self

    def _check_frame_size(self) -> None:
        """Refuse frames that do not fit the networks and metrics of stage 1."""
        size, model, training = self.dataset.image_size, self.autoencoder.model, self.autoencoder.training
        sides, factor = self.dataset.frame_size, model.downsampling
        if any(side % factor for side in sides):
            rounded = ([side // factor * factor for side in sides], [-(-side // factor) * factor for side in sides])
            nearest = " or ".join(str(one if isinstance(size, list) else one[0]) for one in rounded if min(one))
            raise ValueError(
                f"dataset.image_size: {size} is not a multiple of {factor}, the down-sampling factor of "
                f"autoencoder.model.{model.what_downsamples}: use {nearest}"
            )
        if training.adversarial.weight and min(sides) < training.adversarial.smallest_side:
            raise ValueError(
                f"autoencoder.training.adversarial.layers: {training.adversarial.layers} layers need images of at "
                f"least {training.adversarial.smallest_side} pixels per side, and dataset.image_size is {size}: "
                "use fewer layers"
            )
        if training.best_by == "ssim" and min(sides) < SSIM_WINDOW:
            raise ValueError(
                f"autoencoder.training.best_by: ssim needs images of at least {SSIM_WINDOW} pixels per side, and "
                f"dataset.image_size is {size}: use psnr"
            )

    @property
    def data_root(self) -> Path:
        return Path(self.paths.data)

    @property
    def store_path(self) -> Path:
        return Path(self.paths.latents) / f"{self.dataset.name}.zarr"

    @property
    def run_path(self) -> Path:
        """`<runs>/<dataset>`; of a named run `<runs>/<dataset>/<run>`."""
        return Path(self.paths.runs) / self.dataset.name / (self.run or "")

    @property
    def shared(self) -> "RiverConfig":
        """This configuration for the default run, whose folder has what all runs share: autoencoder, fast decoder."""
        return self.model_copy(update={"run": None})

    def training_folder(self, name: str) -> Path:
        """The folder of a training: `autoencoder`, `decoder`, `flow` or `refiner`."""
        return (self.shared if name in ("autoencoder", "decoder") else self).run_path / name
