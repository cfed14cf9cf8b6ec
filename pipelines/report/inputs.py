"""What a run's files say; what is damaged is named."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from pipelines.config import RiverConfig
from pipelines.report.forms import Benchmark, Content, Environment, Evaluation, Quality, Samples, finite
from pipelines.runtime.checkpoints import Checkpoint
from pipelines.runtime.runs import chosen_checkpoint

TRAININGS = ("autoencoder", "flow", "refiner")


class Problem(Exception):
    """A file of the run cannot be used; the message names the file, where in it, and the way out."""


File = TypeVar("File", bound=Content)


@dataclass(frozen=True)
class Log:
    """A training's `log.jsonl`: its lines in the order of steps, and what is wrong with others."""

    records: list[dict[str, Any]]
    problems: list[str]

    def series(self, name: str) -> tuple[list[float], list[float | None]]:
        """Steps and values of one quantity, where it was logged; what is not finite is None."""
        there = [record for record in self.records if name in record]
        return [record["step"] for record in there], [finite(record[name]) for record in there]

    def last(self, name: str) -> float | None:
        """The last value of one quantity."""
        values = self.series(name)[1]
        return values[-1] if values else None


class Run:
    """The files of a configuration's run: None where one is not there.

    Every property raises `Problem` where its file is damaged.
    """

    def __init__(self, config: RiverConfig) -> None:
        self.config, self.path, self.name = config, config.run_path, config.dataset.name
        self._checkpoints: dict[str, Checkpoint | None] = {}

    @cached_property
    def evaluation(self) -> Evaluation | None:
        return self._read("evaluation.json", Evaluation, "evaluate")

    @cached_property
    def quality(self) -> Quality | None:
        quality = self._read("quality.json", Quality, "study")
        if quality is not None and max(quality.reference, quality.cheapest or 0) >= len(quality.points):
            raise Problem(f"{self.path}/quality.json: it names a point that it does not have; `make study` measures on")
        return quality

    @cached_property
    def benchmark(self) -> Benchmark | None:
        return self._read("benchmark.json", Benchmark, "bench")

    @cached_property
    def samples(self) -> Samples | None:
        return self._read("samples/samples.json", Samples, "sample")

    @cached_property
    def environment(self) -> Environment | None:
        return self._read("environment.json", Environment, "train-flow")

    def log(self, training: str) -> Log | None:
        """The log of `autoencoder`, `flow` or `refiner`."""
        return read_log(self.path / training / "log.jsonl")

    def checkpoint(self, training: str) -> Checkpoint | None:
        """The checkpoint that is used, as its `state.json` describes it."""
        if training not in self._checkpoints:
            self._checkpoints[training] = chosen_checkpoint(self.path / training)
        return self._checkpoints[training]

    def damaged_checkpoints(self, training: str) -> list[str]:
        """What is wrong with checkpoints that are passed over for it."""
        found = []
        for path in sorted((self.path / training / "checkpoints").glob("step_*/state.json")):
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                found.append(
                    f"{path}, line {error.lineno}: {_short(error)}; remove the checkpoint, which is passed over"
                )
            except (OSError, UnicodeDecodeError) as error:
                found.append(f"{path}: cannot be read: {error}")
        return found

    def sound(self, name: str) -> Any:
        """A property, or None where its file is missing or damaged: its own section says which."""
        try:
            return getattr(self, name)
        except Problem:
            return None

    @cached_property
    def image_size(self) -> int:
        """Side of the frames, as the run's own configuration says it."""
        try:
            return int(yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))["dataset"]["image_size"])
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError):
            return self.config.dataset.image_size

    def command(self, target: str) -> str:
        """What makes something that is not there."""
        return f"make {target} DATASET={self.name}"

    def is_empty(self) -> bool:
        """Whether nothing is there that a report could show."""
        files = ("evaluation.json", "quality.json", "benchmark.json", "samples/samples.json")
        return not any((self.path / name).exists() for name in (*files, *TRAININGS))

    def _read(self, name: str, form: type[File], target: str) -> File | None:
        path = self.path / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return form.model_validate(content)
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise Problem(f"{path}: cannot be read: {error}; `make {target}` writes it anew") from None
        except json.JSONDecodeError as error:
            raise Problem(
                f"{path}, line {error.lineno}: no JSON from column {error.colno} on ({error.msg}); `make {target}` "
                "writes it anew"
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "all of it"
            raise Problem(f"{path}: {where}: {first['msg']}; `make {target}` writes it anew") from None


def read_log(path: Path) -> Log | None:
    """Read a log; lines that are damaged are left out and named."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Problem(f"{path}: cannot be read: {error}") from None
    by_step: dict[float, dict[str, Any]] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = finite(record["step"])
            if step is None:
                raise ValueError("step is not a number")
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{path}, line {number}: left out: {_short(error)}")
            continue
        by_step[step] = by_step.get(step, {}) | record | {"step": step}
    return Log([by_step[step] for step in sorted(by_step)], problems)


def _short(error: Exception) -> str:
    match error:
        case json.JSONDecodeError():
            return f"no JSON ({error.msg}, column {error.colno})"
        case KeyError():
            return f"it lacks {error}"
        case TypeError():
            return "it is no object"
    return str(error)
