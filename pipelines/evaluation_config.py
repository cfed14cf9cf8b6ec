"""Settings of `evaluate`: which clips are predicted, and what of them is measured."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from stage1_autoencoder.videos.config import Split


class EvaluationConfig(BaseModel):
    """The protocol: which clips, how much of each is given, how much is predicted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    batch_size: PositiveInt = 32
    seed: NonNegativeInt = 0
