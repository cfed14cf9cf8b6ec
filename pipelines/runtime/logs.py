"""The log of a training: one JSON object per line, and wandb and TensorBoard if configured."""

import json
import math
import os
import re
import textwrap
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.config import RiverConfig, dump_config
from pipelines.errors import UserError
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
    problems: list[str] = []
    _collect(path, text, 0, records, problems)
    return Log(dict(sorted(records.items())), problems)


def _collect(path: Path, text: str, before: int, records: dict[float, dict[str, Any]], problems: list[str]) -> int:
    """Add the lines of a text, before which a log has `before` ones, to its records and problems; their number."""
    number = before
    for number, (_, read) in enumerate(_read_lines(text), start=before + 1):
        if isinstance(read, LogLine):
            records.setdefault(read.step, {}).update(read.model_extra or {})
        else:
            problems.append(f"{path}, line {number}: ignored: {read}")
    return number - before


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


class GrowingLog:
    """A log that a training may be writing: each reading takes only what was added since the one before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin(None)

    def _begin(self, file: int | None) -> None:
        self._file, self._bytes, self._lines = file, 0, 0
        self._records: dict[float, dict[str, Any]] = {}
        self._problems: list[str] = []

    def read(self) -> Log | None:
        """The log up to its last whole line; None if it does not exist."""
        try:
            with self.path.open("rb") as stream:
                status = os.fstat(stream.fileno())
                if status.st_ino != self._file or status.st_size < self._bytes:  # a resume replaces the file
                    self._begin(status.st_ino)
                stream.seek(self._bytes)
                added = stream.read()
        except FileNotFoundError:
            self._begin(None)
            return None
        except OSError as error:
            return Log({}, [f"{self.path}: cannot be read: {error}"])
        whole = added[: added.rfind(b"\n") + 1]
        self._bytes += len(whole)
        self._lines += _collect(self.path, whole.decode(errors="replace"), self._lines, self._records, self._problems)
        return Log(dict(sorted(self._records.items())), [*self._problems])


def validation_pictures(folder: Path) -> dict[int, Path]:
    """The pictures that a training's validations left, by step, ascending.

    Args:
        folder: of the training, which has them as `samples/step_00005000.png` or `reconstructions/step_...`.
    """
    pictures = {int(path.stem.removeprefix("step_")): path for path in folder.glob("*/step_*[0-9].png")}
    return dict(sorted(pictures.items()))


class Sink(Protocol):
    """Where the quantities and pictures of a training go."""

    def write(self, step: int, values: dict[str, Any], picture: Path | None) -> None:
        """Take what was logged after `step` steps, and the picture of a validation, if there was one."""

    def close(self) -> None:
        """Write what is left."""


class TrainingLog:
    """A training's log: `log.jsonl`, and wandb and TensorBoard if configured.

    On resume, what was logged of steps that will be trained again is dropped first.

    Attributes:
        state: JSON for the checkpoints: the training's run of wandb, if it has one.
    """

    def __init__(
        self, folder: Path, config: RiverConfig, name: str, resumed_step: int, state: dict[str, Any] | None = None
    ) -> None:
        """Open the log of a training.

        Args:
            state: of the checkpoint that it resumes from.
        Raises:
            UserError: wandb or TensorBoard can't be used.
        """
        self.folder, self.path = folder, folder / "log.jsonl"
        self.state = {"wandb_run": state["wandb_run"]} if state and "wandb_run" in state else {}
        folder.mkdir(parents=True, exist_ok=True)
        self._sinks: list[Sink] = []
        if config.logging.tensorboard:
            self._sinks.append(_TensorBoard(config, folder, resumed_step))
        if config.logging.wandb != "off":
            self.state.setdefault("wandb_run", uuid.uuid4().hex)
            self._sinks.append(_Wandb(config, folder, name, self.state["wandb_run"]))
        self._sinks.insert(0, _JsonLines(self.path, resumed_step))  # opened last: what is refused changes no file

    def write(self, record: dict[str, Any]) -> None:
        """Log the quantities of a step, `record["step"]`, and the picture of its validation, if there is one."""
        values = {name: value for name, value in record.items() if name != "step"}
        picture = validation_pictures(self.folder).get(record["step"])
        for sink in self._sinks:
            sink.write(record["step"], values, picture)

    def flush(self) -> None:
        """Wait until all lines and the file's name are on disk: a checkpoint must not outlive the lines before it."""
        flush(self.path)
        flush(self.path.parent)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


class _JsonLines:
    """Appends to `log.jsonl`; on resume, lines of steps that will be trained again are dropped first."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._path = path
        self._keep_until(resumed_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, Any], picture: Path | None) -> None:
        """Write one line; non-finite numbers become strings, so that every line is valid JSON."""
        clean = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in values.items()}
        try:
            self._file.write(_with_checksum(json.dumps({"step": step} | clean)) + "\n")
            self._file.flush()
        except OSError as error:  # which does not say of which file
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def close(self) -> None:
        with suppress(OSError):  # a line that did not fit on the disk, which was reported
            self._file.close()

    def _keep_until(self, step: int) -> None:
        if not self._path.exists():
            return
        text = self._path.read_text(encoding="utf-8", errors="replace")
        lines = list(_read_lines(text))
        kept = [line for line, read in lines if isinstance(read, LogLine) and read.step <= step]
        # A crash cuts the last line short, and only that.
        damaged = [read for _, read in lines[: None if text.endswith("\n") else -1] if isinstance(read, str)]
        if damaged:
            warn(f"{self._path}: {len(damaged)} damaged line(s) are removed")
        write_text(self._path, "".join(_with_checksum(line) + "\n" for line in kept))


class _Wandb:
    """A run of wandb: named after the run and the training, in a group per data set."""

    def __init__(self, config: RiverConfig, folder: Path, name: str, run_id: str) -> None:
        import wandb

        self._wandb, logging = wandb, config.logging
        say(f"wandb: {logging.wandb}, project {logging.wandb_project}, run {run_id}, files in {folder}/wandb")
        try:
            self._run = wandb.init(
                project=logging.wandb_project,
                name="-".join(filter(None, (config.dataset.name, config.run, name))),
                group=config.dataset.name,
                job_type=name,
                id=run_id,
                resume="allow",
                dir=str(folder),
                mode=logging.wandb,
                config=config.model_dump(mode="json"),
            )
        except wandb.Error as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"logging.wandb: {logging.wandb}: {reason}; offline needs no account (`wandb sync` uploads it later)"
            ) from None

    def write(self, step: int, values: dict[str, Any], picture: Path | None) -> None:
        shown = {} if picture is None else {picture.parent.name: self._wandb.Image(str(picture))}
        self._run.log(values | shown, step=step)

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    """Event files in `tensorboard`, a folder of the training."""

    def __init__(self, config: RiverConfig, folder: Path, resumed_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "logging.tensorboard: true needs a package: pip install tensorboard (or "
                "'river-two-stage[tensorboard]'), or set it to false"
            ) from None
        say(f"tensorboard: files in {folder}/tensorboard; `tensorboard --logdir {config.paths.runs}` shows all runs")
        # What is logged of later steps is hidden: they are trained again.
        self._writer = SummaryWriter(folder / "tensorboard", purge_step=resumed_step + 1)
        self._writer.add_text("config", textwrap.indent(dump_config(config), "    "), resumed_step)  # as code

    def write(self, step: int, values: dict[str, Any], picture: Path | None) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)
        if picture is not None:
            with Image.open(picture) as image:
                self._writer.add_image(picture.parent.name, np.asarray(image), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


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
