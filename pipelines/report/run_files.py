"""Files of a run as the report reads them: results, logs and checkpoints."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.bench.measurement import Benchmark
from pipelines.config import RiverConfig
from pipelines.encoding.store_checks import store_status
from pipelines.errors import UserError
from pipelines.evaluation.results import Evaluation, Study
from pipelines.prediction.samples import Samples
from pipelines.runtime.checkpoints import Checkpoint
from pipelines.runtime.files import read_json
from pipelines.runtime.runs import Environment, chosen_checkpoint
from pipelines.runtime.status import Status

TRAININGS = ("autoencoder", "flow", "refiner")
# Class -> file and the target that writes it.
FILES: dict[type[BaseModel], tuple[str, str]] = {
    Evaluation: ("evaluation.json", "evaluate"),
    Study: ("quality.json", "study"),
    Benchmark: ("benchmark.json", "bench"),
    Samples: ("samples/samples.json", "sample"),
    Environment: ("environment.json", "train-flow"),
}

Model = TypeVar("Model", bound=BaseModel)


class Missing(Exception):
    """A section has nothing to show yet; the message names the command that makes it."""


class LogLine(BaseModel):
    """One line of `log.jsonl`: a step, and the quantities that were logged at it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    step: float = Field(allow_inf_nan=False)


@dataclass(frozen=True)
class Log:
    """A training's log.

    Attributes:
        records: step -> quantities, ascending.
        problems: a message per line that cannot be read.
    """

    records: dict[float, dict[str, Any]]
    problems: list[str]

    @property
    def step(self) -> float:
        """The last step; 0 where there is none."""
        return max(self.records, default=0)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of one quantity, where it was logged; what is no finite number is NaN."""
        found = {step: values[name] for step, values in self.records.items() if name in values}
        # Numbers that are not finite are logged as text.
        return list(found), [value if isinstance(value, int | float) else math.nan for value in found.values()]

    def finite(self, name: str) -> list[tuple[float, float]]:
        """(value, step) of one quantity, where it is finite."""
        return [(value, step) for step, value in zip(*self.series(name), strict=True) if math.isfinite(value)]

    def median(self, name: str) -> float | None:
        """The median of one quantity's finite values."""
        values = [value for value, _ in self.finite(name)]
        return float(np.median(values)) if values else None


def read_log(path: Path) -> Log | None:
    """Read a log; None where there is none. What cannot be read is named in its `problems`."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        return Log({}, [f"{path}: cannot be read: {error}"])
    records: dict[float, dict[str, Any]] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            read = LogLine.model_validate_json(line)
            records.setdefault(read.step, {}).update(read.model_extra or {})
        except ValidationError as error:
            problems.append(f"{path}, line {number}: ignored: {error.errors()[0]['msg']}")
    return Log(dict(sorted(records.items())), problems)


class Run:
    """The files of a configuration's run. Where one cannot be read, a `UserError` names it and the way out."""

    def __init__(self, config: RiverConfig) -> None:
        self.config, self.path, self.name = config, config.run_path, config.dataset.name

    def read(self, model: type[Model]) -> Model | None:
        """The file of a class; None where it is missing."""
        name, target = FILES[model]
        path = self.path / name
        return read_json(path, model, f"`{self.command(target)}` writes it again") if path.exists() else None

    def read_if_sound(self, model: type[Model]) -> Model | None:
        """The file of a class; None also where it cannot be read, which another section reports."""
        try:
            return self.read(model)
        except UserError:
            return None

    @cached_property
    def store(self) -> Status:
        """How far the store is."""
        return store_status(self.config)

    @cached_property
    def logs(self) -> dict[str, Log | None]:
        """The log of each training; None where there is none."""
        return {training: read_log(self.path / training / "log.jsonl") for training in TRAININGS}

    @cached_property
    def checkpoints(self) -> dict[str, Checkpoint | None]:
        """The checkpoint in use of each training; None where there is none."""
        return {training: chosen_checkpoint(self.path / training) for training in TRAININGS}

    def damaged_checkpoints(self, training: str) -> list[str]:
        """A message per checkpoint whose `state.json` cannot be read."""
        problems = []
        for path in sorted((self.path / training / "checkpoints").glob("step_*/state.json")):
            try:
                json.loads(path.read_bytes())
            except (OSError, ValueError) as error:
                problems.append(f"{path}: {error}; the checkpoint is ignored: remove it")
        return problems

    @cached_property
    def image_size(self) -> int:
        """Side of the frames in the run's own configuration, which the given one need not agree with."""
        try:
            return int(yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))["dataset"]["image_size"])
        except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
            return self.config.dataset.image_size

    def command(self, target: str) -> str:
        """The command that makes a missing part."""
        return f"make {target} DATASET={self.name}"

    def is_empty(self) -> bool:
        """Whether there is nothing to report on."""
        return not any((self.path / name).exists() for name in (*(name for name, _ in FILES.values()), *TRAININGS))
