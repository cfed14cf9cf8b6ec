"""Encoding killed again and again, at any moment: what comes out is what an encoding that was left alone writes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import pytest

import latent_cache

CHUNKS = ("cache.chunk_frames=6",)  # of 24 x 12 frames: 48 chunks, and 8 each of val and test
ALL = 48 + 8 + 8
KILLS = 12

# Imports once, and forks a child for each line of arguments; says the child's number, and then how it ended.
PARENT = """
import json, os, sys, threading
import torch
import pipelines.__main__, pipelines.stages, latent_cache, dask.threaded
os.fsync = lambda descriptor: None  # what was written survives a killed process, flushed or not
assert threading.active_count() == 1
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        torch.set_num_threads(1)
        os._exit(pipelines.__main__.main(json.loads(line)))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Attempts:
    """Runs the command line in forked children, and kills them."""

    def __init__(self, errors: Path) -> None:
        self.errors = errors
        with errors.open("w") as file:
            self._start(file)

    def _start(self, errors: IO[str]) -> None:
        self.parent = subprocess.Popen(
            [sys.executable, "-c", PARENT],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )

    def start(self, words: list[str]) -> int:
        """Begin a command; the number of its process."""
        self.parent.stdin.write(json.dumps(words) + "\n")
        self.parent.stdin.flush()
        return int(self.parent.stdout.readline())

    def end(self) -> int:
        """Wait for the command; its exit code."""
        return int(self.parent.stdout.readline())

    def close(self) -> None:
        self.parent.stdin.close()
        self.parent.wait()
        self.parent.stdout.close()


@pytest.fixture
def attempts(tmp_path: Path) -> Iterator[Attempts]:
    running = Attempts(tmp_path / "errors.txt")
    yield running
    running.close()


def finished(store: Path) -> int:
    return sum(name.endswith(".json") for split in latent_cache.schema.SPLIT_ORDER for name in listed(store, split))


def listed(store: Path, split: str) -> list[str]:
    try:
        return os.listdir(store / ".encoding" / split)
    except FileNotFoundError:
        return []


def still_runs(process: int) -> bool:
    """Whether a process is there and is not just waiting to be noticed as dead."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_encode_killed_at_any_moment(trained, tmp_path: Path, story: ModuleType, attempts: Attempts) -> None:
    def place(name: str) -> Any:
        return trained.copy(tmp_path / name, "runs").with_sets(*CHUNKS)

    whole = place("whole")
    whole.run("encode").ok()
    expected = story.tree(whole.store)
    assert sum("latents/c/" in name for name in expected) == ALL

    chance, killed = random.Random(7), place("killed")
    hits, completed = [], 0
    while len(hits) < KILLS:
        overwrite = completed > 0 and latent_cache.is_complete(killed.store)
        before = finished(killed.store)
        process = attempts.start(killed.arguments("encode", *(["--overwrite"] if overwrite else [])))
        # Some moment near the one at which so many more chunks are finished, which may be beyond the last; or soon.
        more = chance.choice([0, 1, 2, 5, 9, 20])
        delay = chance.choice([0, 1, 5, 30, 100] if more else [50, 100, 200, 300]) / 1000
        while more and still_runs(process) and finished(killed.store) < before + more:
            time.sleep(0.0005)
        time.sleep(delay)
        done = finished(killed.store)
        if still_runs(process):
            os.kill(process, signal.SIGKILL)
        code = attempts.end()
        assert code in (0, -signal.SIGKILL), attempts.errors.read_text()
        if code:
            hits.append(done)
        elif latent_cache.is_complete(killed.store):
            assert story.tree(killed.store) == expected
            completed += 1
            if completed % 2:
                shutil.rmtree(killed.store)

    # They fell into the encoding, and into many places of it.
    assert sum(0 < done < ALL for done in hits) >= KILLS / 2, hits
    assert len(set(hits)) >= 4, hits
    attempts.start(killed.arguments("encode"))
    assert attempts.end() == 0, attempts.errors.read_text()
    assert story.tree(killed.store) == expected
    assert "Traceback" not in attempts.errors.read_text()
