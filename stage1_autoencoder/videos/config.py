"""Settings of the data set: the source of its videos, the size of frames, and the splits."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from stage1_autoencoder.setting_types import FilePath, Seed, Size, Width

Split = Literal["train", "val", "test"]
Fit = Literal["crop", "pad", "stretch"]
HeightWidth = Annotated[list[Width], Field(min_length=2, max_length=2)]
# Videos of one split of `shapes`, whose trajectories are all in memory.
MOST_SHAPES_VIDEOS = 1_000_000


class ShapesConfig(BaseModel):
    """The procedural `shapes` videos: colored shapes that bounce off the walls and each other."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    frames: Size = Field(20, description="frames per video")
    min_objects: PositiveInt = Field(2, description="smallest number of shapes in a video")
    max_objects: PositiveInt = Field(3, description="largest number of shapes in a video")
    radius: PositiveFloat = Field(
        8.0, description="radius of a disc and of collisions, in pixels at 64x64; other shapes have about the same area"
    )
    min_speed: float = Field(2.0, ge=0, description="smallest initial speed, in pixels per frame at 64x64")
    max_speed: float = Field(3.0, ge=0, description="largest initial speed, in pixels per frame at 64x64")

    @model_validator(mode="after")
    def _ordered(self) -> "ShapesConfig":
        if self.min_objects > self.max_objects:
            raise ValueError(f"min_objects {self.min_objects} is more than max_objects {self.max_objects}")
        if self.min_speed > self.max_speed:
            raise ValueError(f"min_speed {self.min_speed} is more than max_speed {self.max_speed}")
        return self


class DatasetConfig(BaseModel):
    """The videos, the size of their frames, and the split into training, validation and test videos."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        max_length=200,
        description="names latents/<name>.zarr and runs/<name>",
        json_schema_extra={"changes_results": False},
    )
    source: Literal["shapes", "videos", "kth", "bair", "clevrer", "hdf5", "lerobot"] = Field(
        description="shapes: procedural; videos: a folder of video files or frame folders; kth, bair, clevrer: the "
        "unpacked archives of these data sets; hdf5: shards of the official code; lerobot: robot episodes as LeRobot "
        "stores them, with actions"
    )
    root: FilePath | None = Field(
        None,
        description="folder of the raw videos; '{data}' is replaced by paths.data; default {data}/<name>",
        json_schema_extra={"changes_results": False},
    )
    image_size: Width | HeightWidth = Field(64, description="side of square frames in pixels, or [height, width]")
    fit: Fit = Field(
        "crop",
        description="of videos of another shape than image_size: crop: the largest centered part of that shape; pad: "
        "the whole picture between black bars; stretch: the whole picture, distorted",
    )
    fps: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="videos, kth, clevrer, lerobot: resample videos by time to this many frames per second, so that "
        "videos of different rates move equally fast; default: the frames as they are",
    )
    frame_step: PositiveInt = Field(1, description="use every frame_step-th frame (of the resampled ones, with fps)")
    splits: dict[Split, int | float | str] = Field(
        default_factory=dict,
        description="shapes: number of videos per split; videos, hdf5, lerobot: fractions for val and test, where root "
        "has no train/val/test folders; kth: persons per split, e.g. '1-19'; clevrer: numbers of videos per split, "
        "e.g. '0-9999'; bair: val, the fraction of training videos that is held out",
    )
    split_seed: Seed = Field(0, description="seed of the split by fractions")
    camera: str | None = Field(
        None, description="lerobot: the camera, such as observation.images.top; null: the only one"
    )
    sequences: bool = Field(False, description="kth: cut videos into the frame ranges of 00sequences.txt")
    shapes: ShapesConfig = Field(default_factory=ShapesConfig, description="settings of source: shapes")

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of the frames, in pixels."""
        height, width = [self.image_size] * 2 if isinstance(self.image_size, int) else self.image_size
        return height, width

    @property
    def sampling_text(self) -> str:
        """Which frames of the videos are used."""
        resampled = "" if self.fps is None else f"dataset.fps {self.fps:g}, "
        return f"{resampled}dataset.frame_step {self.frame_step}"

    @property
    def is_divided(self) -> bool:
        """Whether fractions may divide the videos among the splits, rather than the data set itself."""
        return self.source in ("videos", "hdf5", "bair", "lerobot")

    @field_validator("image_size")
    @classmethod
    def _square_is_one_number(cls, size: int | list[int]) -> int | list[int]:
        return size[0] if isinstance(size, list) and size[0] == size[1] else size

    @model_validator(mode="after")
    def _has_rates(self) -> "DatasetConfig":
        if self.fps is not None and self.source not in ("videos", "kth", "clevrer", "lerobot"):
            raise ValueError(f"fps: {self.fps:g}, but videos of source: {self.source} have one rate: use frame_step")
        return self

    @model_validator(mode="after")
    def _splits_fit_source(self) -> "DatasetConfig":
        for split, value in self.splits.items():
            match self.source:
                case "shapes" if not isinstance(value, int) or not 1 <= value <= MOST_SHAPES_VIDEOS:
                    raise ValueError(
                        f"splits.{split}: {value!r} is not a number of videos from 1 to {MOST_SHAPES_VIDEOS} "
                        "(source: shapes)"
                    )
                case "videos" | "hdf5" | "bair" | "lerobot" if not isinstance(value, int | float) or not 0 <= value < 1:
                    raise ValueError(f"splits.{split}: {value!r} is not a fraction in [0, 1) (source: {self.source})")
                case "bair" if split != "val":
                    raise ValueError(f"splits.{split}: BAIR has train and test folders; only val can be set")
                case "kth" if not isinstance(value, str | int):
                    raise ValueError(
                        f"splits.{split}: {value!r} is not a range of persons such as '1-19' (source: kth)"
                    )
                case "clevrer" if not isinstance(value, str | int):
                    raise ValueError(
                        f"splits.{split}: {value!r} is not a range of videos such as '0-9999' (source: clevrer)"
                    )
        if (
            self.source in ("videos", "hdf5", "lerobot")
            and sum(float(v) for k, v in self.splits.items() if k != "train") >= 1
        ):
            raise ValueError(f"splits {self.splits} leave nothing to train on")
        return self
