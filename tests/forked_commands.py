"""Commands as processes of their own that start at once: a server imports the program, and forks a child for each.

Faults are injected in the child: it is killed, or the disk fails, at the n-th operation that changes files.
"""

import contextlib
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[1]
MODULES = ("pipelines.__main__", "pipelines.stages", "dask.threaded")


@dataclass(frozen=True)
class Fault:
    """What happens to a command.

    Attributes:
        root: operations on files below this folder count: opened for writing, renamed, removed, made, flushed.
        at: number of the operation at which it happens, from 1; 0: never.
        error: of the operation (an `errno`); 0: the process is killed.
        journal: file of JSON values, one a line: `[inode, size, mtime_ns, names]` of what was flushed (of folders with
            the `[name, inode]` in them), the path at which the fault happened, at the end the number of operations.
    """

    root: str
    at: int = 0
    error: int = 0
    journal: str | None = None


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: the signal that killed it), and what it printed."""

    code: int
    out: str
    err: str
    seconds: float


class ForkedCommands:
    """The server. Its commands run one after the other.

    Args:
        folder: for what commands print.
        also: further modules to import, which the commands would import.
    """

    def __init__(self, folder: Path, also: Sequence[str] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.out, self.err = folder / "out.txt", folder / "err.txt"
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.forked_commands", str(self.out), str(self.err), *MODULES, *also],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._started = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def start(self, words: list[str], fault: Fault | None = None) -> int:
        """Begin a command; the number of its process."""
        self._started = time.perf_counter()
        self._server.stdin.write(json.dumps([words, fault and asdict(fault)]) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def end(self) -> Ended:
        """Wait for the command."""
        code = int(self._server.stdout.readline())
        out, err = (file.read_text(errors="replace") for file in (self.out, self.err))
        return Ended(code, out, err, time.perf_counter() - self._started)

    def run(self, words: list[str], fault: Fault | None = None, kill_after: float | None = None) -> Ended:
        """Run a command; kill it after some seconds. After five minutes it is killed in any case."""
        process = self.start(words, fault)
        timer = threading.Timer(300 if kill_after is None else kill_after, kill, [process])
        timer.start()
        try:
            return self.end()
        finally:
            timer.cancel()


def kill(process: int) -> None:
    """Kill a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def serve(out: str, err: str, *modules: str) -> None:
    """The server: reads commands line by line, says each one's process, and how it ended."""
    for name in modules:
        importlib.import_module(name)
    import torch

    assert threading.active_count() == 1
    for line in sys.stdin:
        child = os.fork()
        if not child:
            for stream, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            words, fault = json.loads(line)
            torch.set_num_threads(1)
            flushes = Operations(**fault) if fault else None
            os.fsync = flushes.flush if flushes else lambda descriptor: None
            code = 1
            try:
                code = sys.modules["pipelines.__main__"].main(words)
            except SystemExit as left:
                code = int(left.code or 0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                if flushes:
                    flushes.note_count()
                sys.stdout.flush()
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Operations:
    """Counts a process's operations on files, and lets a fault happen at one of them. Arguments as of `Fault`."""

    def __init__(self, root: str, at: int, error: int, journal: str | None) -> None:
        self.root, self.at, self.error = root, at, error
        self.count = itertools.count(1)
        self.journal = journal and os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        sys.addaudithook(self.audit)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link"):
            path, folder = arguments[0], arguments[-1]
            if folder != -1:  # the path is relative to an open folder
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        else:
            return
        if not isinstance(path, int) and os.fsdecode(path).startswith(self.root):
            self.operate(os.fsdecode(path))

    def operate(self, path: str) -> None:
        if next(self.count) != self.at:
            return
        self.note(path)
        if not self.error:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(self.error, os.strerror(self.error), path)

    def flush(self, descriptor: int) -> None:
        """Takes the place of `os.fsync`: writes down what would be on the disk from now on."""
        self.operate(os.readlink(f"/proc/self/fd/{descriptor}"))
        if self.journal is None:
            return
        stat = os.fstat(descriptor)
        names = []
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            names = [[entry.name, entry.inode()] for entry in os.scandir(descriptor)]
        self.note([stat.st_ino, stat.st_size, stat.st_mtime_ns, names])

    def note_count(self) -> None:
        self.note(next(self.count) - 1)

    def note(self, value: Any) -> None:
        if self.journal is not None:
            os.write(self.journal, (json.dumps(value) + "\n").encode())


if __name__ == "__main__":
    serve(*sys.argv[1:])
