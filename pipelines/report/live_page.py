"""The page that shows trainings while they run: what the run's folder has now, drawn again whenever it changes."""

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tornado.web import HTTPError

from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.report.page import read_template, render_section, template_environment
from pipelines.report.run_files import TRAININGS, Run
from pipelines.report.trainings import TITLES, training_charts
from pipelines.report.warnings import training_warnings
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.local_server import Guarded, Texts, serve_pages, serve_until_signal
from pipelines.runtime.logs import GrowingLog, Log, validation_pictures
from pipelines.runtime.progress import duration
from pipelines.runtime.run_folder import read_run_config, recorded_steps

# Seconds, and lines, without a new line after which a training may have stopped.
LATE, LATE_LINES = 300.0, 3
# Lines of the log whose rates say how long the rest takes.
NEWEST_RATES = 5
KINDS = {".png": "image/png", ".gif": "image/gif"}


class Watcher:
    """The trainings of a run, which other processes may be writing.

    Attributes:
        pictures: those that the page shows, by their address.
    """

    def __init__(self, config: RiverConfig) -> None:
        self.config = config
        self.pictures: dict[str, Path] = {}
        self._logs = {name: GrowingLog(config.training_folder(name) / "log.jsonl") for name in TRAININGS}
        self._seen: list[tuple[str, int, int]] | None = None
        self._text = ""

    def text(self) -> str:
        """The page's content as HTML; drawn again if a log or a checkpoint is new."""
        seen = [(str(path), status.st_mtime_ns, status.st_size) for path, status in self._files()]
        if seen != self._seen:
            self._text, self._seen = render_section(Run(self.config), "live", self._content), seen
        return self._text

    def _files(self) -> list[tuple[Path, Any]]:
        """What is there of the logs and the folders of checkpoints; a picture comes with a line of its log."""
        found = []
        for path in (path for log in self._logs.values() for path in (log.path, log.path.with_name("checkpoints"))):
            with suppress(FileNotFoundError):
                found.append((path, path.stat()))
        return found

    def _content(self, run: Run) -> dict[str, Any]:
        run.logs = {name: log.read() for name, log in self._logs.items()}
        self.pictures = {}
        shown = [self._training(name, log) for name, log in run.logs.items() if log is not None]
        return {
            "trainings": sorted(shown, key=lambda training: training["written"], reverse=True),
            "warnings": [*training_warnings(run)],
        }

    def _training(self, name: str, log: Log) -> dict[str, Any]:
        folder, total = self.config.training_folder(name), _total_steps(self.config, name)
        rates = [rate for rate, _ in log.finite("steps_per_second")[-NEWEST_RATES:]]
        rate = float(np.median(rates)) if rates else None
        left = None if total is None or not rate else max(0.0, total - log.step) / rate
        line_steps = np.diff([0.0, *log.records][-2:]).sum()
        # Later ones are of a training that was resumed before them.
        validated = max((step for step in validation_pictures(folder) if step <= log.step), default=None)
        return {
            "name": name,
            "title": TITLES[name],
            "step": log.step,
            "total": total,
            "done": total is not None and log.step >= total,
            "written": (folder / "log.jsonl").stat().st_mtime,
            "late": max(LATE, LATE_LINES * line_steps / rate) if rate else LATE,
            "values": [(words, *log.finite(key)[-1]) for key, words in VALUES.items() if log.finite(key)],
            "rate": rate,
            "left": None if left is None else duration(left),
            "problems": log.problems,
            "validated": validated,
            "picture": None if validated is None else self._address(name, validation_pictures(folder)[validated]),
            "charts": training_charts(log, name),
        }

    def _address(self, name: str, picture: Path) -> str:
        """The address of a picture, of its animation if it has one; another one if it is written again."""
        picture = plays if (plays := picture.with_suffix(".gif")).exists() else picture
        address = f"{name}/{picture.stat().st_mtime_ns}-{picture.name}"
        self.pictures[address] = picture
        return f"pictures/{address}"


# Key in the log -> words.
VALUES = {"loss": "Loss", "validation_loss": "Validation loss", "validation_psnr": "Validation PSNR [dB]"}


def _total_steps(config: RiverConfig, name: str) -> int | None:
    """The number of steps of a training: of the newest command, or else of the checkpoints; None: not known yet."""
    folder = config.training_folder(name)
    try:
        steps = getattr(read_run_config(folder.parent / "config.yaml"), name).training.steps
    except (OSError, UserError):
        steps = None
    newest = CheckpointFolder(folder / "checkpoints").latest(warns=False)
    return steps or (None if newest is None else recorded_steps(newest, name))


class OfWatcher(Guarded):
    """A handler that uses the watcher."""

    def initialize(self, watcher: Watcher) -> None:
        self.watcher = watcher


class Live(OfWatcher):
    def get(self) -> None:
        try:
            text = self.watcher.text()
        except OSError as error:  # a folder that is being moved
            raise HTTPError(503, reason="Some files cannot be read now") from error
        self.finish(text)


class Picture(OfWatcher):
    def get(self, address: str) -> None:
        try:
            path = self.watcher.pictures[address]
            content = path.read_bytes()
        except (KeyError, OSError):
            raise HTTPError(404, reason="There is no such picture now") from None
        self.set_header("Content-Type", KINDS[path.suffix])
        self.finish(content)


async def serve_watcher(
    config: RiverConfig, host: str, port: int, ready: Callable[[str], object], stop: asyncio.Event
) -> None:
    """Serve the page of a run until `stop` is set. Other arguments and errors as of `serve_pages`."""
    page = template_environment().get_template("watch.html").render(name=Run(config).name)
    style = "".join(map(read_template, ("house.css", "page.css", "watch.css")))
    script = "".join(map(read_template, ("page.js", "watch.js")))
    texts = {"": ("text/html", page), "watch.css": ("text/css", style), "watch.js": ("text/javascript", script)}
    watcher = {"watcher": Watcher(config)}
    handlers: list[tuple[str, type, dict[str, Any]]] = [
        (f"/({'|'.join(map(re.escape, texts))})", Texts, {"texts": texts}),
        ("/live", Live, watcher),
        ("/pictures/(.+)", Picture, watcher),
    ]
    await serve_pages(handlers, host, port, ready, stop)


def watch(config: RiverConfig, host: str, port: int, opens_browser: bool) -> NoReturn:
    """Serve the page of a run's trainings until a signal ends it; they need not have begun.

    Args:
        host, port: see `serve_pages`.
        opens_browser: open the page in this machine's browser, if there is a display.
    Raises:
        UserError: as `serve_pages`.
        StoppedBySignal: the way it ends.
    """
    serve_until_signal(
        lambda ready, stop: serve_watcher(config, host, port, ready, stop),
        f"watch: {config.run_path}",
        host,
        opens_browser,
    )
