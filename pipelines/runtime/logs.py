"""The log of a training: one JSON object per line, and wandb if configured."""

import json
import math
import re
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.config import RiverConfig
from pipelines.runtime.files import flush, write_text
from pipelines.runtime.progress import say, warn

# A line's object, without the bracket that closes it, and the checksum of the whole object.
_CHECKED = re.compile(r'(\{.*), "crc32": "([0-9a-f]{8})"\}')


class LogLine(BaseModel):
    """One line of `log.jsonl`: a step, the quantities that were logged at it, and as `crc32` the line's checksum."""

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
        """The last step; 0 if there are no lines."""
        return max(self.records, default=0)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of one quantity; values that are not finite are NaN."""
        found = {step: values[name] for step, values in self.records.items() if name in values}
        # Numbers that are not finite are logged as text.
        return list(found), [value if isinstance(value, int | float) else math.nan for value in found.values()]

    def finite(self, name: str) -> list[tuple[float, float]]:
        """(value, step) of the finite values of one quantity."""
        return [(value, step) for step, value in zip(*self.series(name), strict=True) if math.isfinite(value)]

    def median(self, name: str) -> float | None:
        """The median of one quantity's finite values."""
        values = [value for value, _ in self.finite(name)]
        return float(np.median(values)) if values else None


def read_log(path: Path) -> Log | None:
    """Read a log; None if it does not exist. Unreadable lines are listed in `problems`."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        return Log({}, [f"{path}: cannot be read: {error}"])
    records: dict[float, dict[str, Any]] = {}
    problems = []
    for number, (_, read) in enumerate(_read_lines(text), start=1):
        if isinstance(read, LogLine):
            records.setdefault(read.step, {}).update(read.model_extra or {})
        else:
            problems.append(f"{path}, line {number}: ignored: {read}")
    return Log(dict(sorted(records.items())), problems)


def _with_checksum(line: str) -> str:
    return f'{line[:-1]}, "crc32": "{zlib.crc32(line.encode()):08x}"}}'


def _read_lines(text: str) -> Iterator[tuple[str, LogLine | str]]:
    """Each line without its checksum, and its content, or why that cannot be read.

    In a log of an earlier version no line has a checksum.
    """
    lines = text.splitlines()
    checked = any(map(_CHECKED.fullmatch, lines))
    for line in lines:
        found = _CHECKED.fullmatch(line)
        content = f"{found[1]}}}" if found else line
        if checked and _with_checksum(content) != line:
            yield line, "damaged: it differs from its checksum"
            continue
        try:
            yield content, LogLine.model_validate_json(content)
        except ValidationError as error:
            yield line, error.errors()[0]["msg"]


class TrainingLog:
    """Appends to `log.jsonl`. On resume, lines of steps that will be trained again are dropped first.

    Attributes:
        state: JSON for the checkpoints: the training's run of wandb, if it has one.
    """

    def __init__(
        self, folder: Path, config: RiverConfig, name: str, resumed_step: int, state: dict[str, Any] | None = None
    ) -> None:
        """Open the log of a training.

        Args:
            state: of the checkpoint that it resumes from.
        """
        self.path = folder / "log.jsonl"
        self.state = {"wandb_run": state["wandb_run"]} if state and "wandb_run" in state else {}
        folder.mkdir(parents=True, exist_ok=True)
        self._keep_until(resumed_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._wandb = None
        if config.logging.wandb != "off":
            self.state.setdefault("wandb_run", uuid.uuid4().hex)
            self._wandb = _start_wandb(config, folder, name, self.state["wandb_run"])

    def write(self, record: dict[str, Any]) -> None:
        """Write one line; non-finite numbers become strings, so that every line is valid JSON."""
        clean = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in record.items()}
        try:
            self._file.write(_with_checksum(json.dumps(clean)) + "\n")
            self._file.flush()
        except OSError as error:  # which does not say of which file
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def flush(self) -> None:
        """Wait until all lines and the file's name are on disk: a checkpoint must not outlive the lines before it."""
        flush(self.path)
        flush(self.path.parent)

    def close(self) -> None:
        with suppress(OSError):  # a line that did not fit on the disk, which was reported
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _keep_until(self, step: int) -> None:
        if not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8", errors="replace")
        lines = list(_read_lines(text))
        kept = [line for line, read in lines if isinstance(read, LogLine) and read.step <= step]
        # A crash cuts the last line short, and only that.
        damaged = [read for _, read in lines[: None if text.endswith("\n") else -1] if isinstance(read, str)]
        if damaged:
            warn(f"{self.path}: {len(damaged)} damaged line(s) are removed")
        write_text(self.path, "".join(_with_checksum(line) + "\n" for line in kept))


def _start_wandb(config: RiverConfig, folder: Path, name: str, run_id: str) -> Any:
    import wandb

    logging = config.logging
    say(f"wandb: {logging.wandb}, project {logging.wandb_project}, run {run_id}, files in {folder}/wandb")
    return wandb.init(
        project=logging.wandb_project,
        name="-".join(filter(None, (config.dataset.name, config.run, name))),
        id=run_id,
        resume="allow",
        dir=str(folder),
        mode=logging.wandb,
        config=config.model_dump(mode="json"),
    )


class StepTimer:
    """Steps per second since the last reading."""

    def __init__(self) -> None:
        self._time, self._steps = time.perf_counter(), 0

    def step(self) -> None:
        self._steps += 1

    def rate(self) -> float:
        now = time.perf_counter()
        rate = self._steps / max(now - self._time, 1e-9)
        self._time, self._steps = now, 0
        return rate

    def rate_after(self, seconds: float) -> float | None:
        """As `rate`, without resetting; None until `seconds` have passed."""
        elapsed = time.perf_counter() - self._time
        return self._steps / elapsed if elapsed >= seconds and self._steps else None
