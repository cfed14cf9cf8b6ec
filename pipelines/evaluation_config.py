"""Settings of `evaluate`: which clips are predicted, and what of them is measured."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from pipelines.protocols import PROTOCOLS, ProtocolName
from stage1_autoencoder.videos.config import Split


class EvaluationConfig(BaseModel):
    """The protocol: which clips, how much of each is given, how much is predicted.

    With `protocol`, keys that are not set take the preset's values in place of the defaults.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: ProtocolName | None = Field(
        None,
        description="a protocol of the literature, which sets the keys below; those that are set as well win, and the "
        "result says that they differ",
    )
    split: Split = "test"
    context: PositiveInt = Field(10, description="frames given")
    horizon: PositiveInt = Field(30, description="frames predicted")
    videos: PositiveInt = Field(
        256, description="clips; with window: random a video gives several where there are not as many videos"
    )
    samples: PositiveInt = Field(1, description="predictions a clip, each with a sampling seed of its own")
    window: Literal["first", "random", "moving"] = Field(
        "first",
        description="where in its video a clip starts: at frame 0, drawn uniformly by the seed, or where the given "
        "frames move most, so that there is something to be seen",
    )
    batch_size: PositiveInt = Field(32, description="clips at once; changes memory and speed alone")
    seed: NonNegativeInt = Field(0, description="of random windows and of the bootstrap")
    video_network: str | None = Field(
        None,
        description="path of the I3D, i3d_torchscript.pt, for the Fréchet video distance; null: the copy in torch's "
        "folder of downloads, which --download fetches",
    )
    fvd_context: bool = Field(
        True,
        description="whether the clips of the Fréchet video distance begin with the given frames: in SRVP, SLAMP, MCVD "
        "and RaMViD they do, in FitVid not",
    )
    fvd_frames: PositiveInt | None = Field(
        16,
        ge=10,
        description="frames that the I3D sees at once: a clip is cut into so long ones that follow one another, the "
        "last of which ends with the clip; null: the whole clip at once",
    )
    resamples: NonNegativeInt = Field(
        1000,
        description="of the bootstrap over videos, for 95 % intervals; 0: none. The Fréchet video distance takes at "
        "most 200",
    )

    @model_validator(mode="before")
    @classmethod
    def _take_the_presets_values(cls, values: Any) -> Any:
        name = values.get("protocol") if isinstance(values, dict) else None
        return PROTOCOLS[name] | values if isinstance(name, str) and name in PROTOCOLS else values
