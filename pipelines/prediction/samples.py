"""The clips that `sample` predicted, as `samples/samples.json` of a run lists them."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Samples(BaseModel):
    """`samples.json`: each clip's pictures are beside it, as `file_name(clip)` with `.gif` and `.mp4`.

    Attributes:
        clips: names.
        context, horizon: given and predicted frames of each clip.
        sampling: the settings as dumped from the configuration.
        samples: predictions per clip.
        refine: whether predicted frames are refined.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    clips: list[str] = Field(min_length=1)
    context: int = Field(ge=1)
    horizon: int = Field(ge=1)
    sampling: dict[str, Any]
    samples: int
    refine: bool
