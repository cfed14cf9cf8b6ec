"""The files that a report is made of: what must stand in them, and what older versions leave out."""

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def finite(value: Any) -> float | None:
    """A number; None where it is none, or not finite (the log has those as text)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


class Content(BaseModel):
    """A file, or a part of one."""

    # Later versions may write more, which is no damage.
    model_config = ConfigDict(frozen=True, extra="ignore")


# A number that was not finite when it was written is a gap.
Number = Annotated[float | None, BeforeValidator(lambda value: finite(value) if isinstance(value, float) else value)]
Interval = tuple[Number, Number]


class BestOf(Content):
    """The best of several samples, by the metric itself."""

    samples: int
    value: Number
    per_frame: list[Number]
    interval: Interval | None = None


class Distances(Content):
    """Fréchet distances by subject."""

    prediction: Number = None
    copy_last: Number = None
    reconstruction: Number = None
    interval: dict[str, Interval] = Field(default_factory=dict)


class MetricValues(Distances):
    """One metric by subject; a distance between sets of videos has no curve over frames."""

    prediction: Number
    per_frame: dict[str, list[Number]] = Field(default_factory=dict)
    per_frame_interval: dict[str, list[Interval]] = Field(default_factory=dict)
    best_of: BestOf | None = None
    autoencoded: Distances | None = None


class Evaluation(Content):
    """`evaluation.json`."""

    protocol: dict[str, Any]
    metrics: dict[str, MetricValues]


class Point(Content):
    """One way to sample, and what it came to."""

    solver: str
    nfe: int = Field(gt=0)
    steps: int | None = None
    warm_start: float = 0.0
    condition: str = "per-evaluation"
    preset: str = "default"
    seed: int = 0
    psnr: Number = None
    ssim: Number = None
    lpips: Number = None
    frechet: Number = None
    sharpness: Number = None
    psnr_interval: Interval | None = None
    ssim_interval: Interval | None = None
    lpips_interval: Interval | None = None
    frechet_interval: Interval | None = None
    sharpness_interval: Interval | None = None
    milliseconds_per_frame: Number = None


class Quality(Content):
    """`quality.json`."""

    protocol: dict[str, Any]
    points: list[Point] = Field(min_length=1)
    reference: int = Field(0, ge=0)
    cheapest: int | None = None


class Measured(Content):
    """One line of `benchmark.json`."""

    name: str
    value: Number
    unit: str
    reference: str = ""
    ratio: Number = None
    at_least: Number = None
    at_most: Number = None
    reached: bool | None = None


class Benchmark(Content):
    """`benchmark.json`."""

    date: str = ""
    hardware: str = ""
    software: dict[str, Any] = Field(default_factory=dict)
    measurements: list[Measured]


class Samples(Content):
    """`samples/samples.json`."""

    clips: list[str]
    context: int = Field(ge=0)
    horizon: int = Field(ge=0)
    sampling: dict[str, Any] = Field(default_factory=dict)
    samples: int = 1
    refine: bool = False


class Environment(Content):
    """`environment.json`."""

    software: dict[str, Any] = Field(default_factory=dict)
    platform: str = ""
    device: str = ""
    threads: int | None = None
