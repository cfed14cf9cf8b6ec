"""Encoding killed again and again, at any moment: what comes out is what an encoding that was left alone writes."""

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import latent_cache
from tests.forked_commands import ForkedCommands, kill

CHUNKS = ("cache.chunk_frames=6",)  # of 24 x 12 frames: 48 chunks, and 8 each of val and test
ALL = 48 + 8 + 8
KILLS = 6  # `make test-faults` kills it far more often


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[ForkedCommands]:
    with ForkedCommands(tmp_path) as running:
        yield running


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
def test_encode_killed_at_any_moment(trained, tmp_path: Path, story: ModuleType, commands: ForkedCommands) -> None:
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
        process = commands.start(killed.arguments("encode", *(["--overwrite"] if overwrite else [])))
        # Some moment near the one at which so many more chunks are finished, which may be beyond the last; or soon.
        more = chance.choice([0, 1, 2, 5, 9, 20])
        delay = chance.choice([0, 1, 5, 30, 100] if more else [50, 100, 200, 300]) / 1000
        while more and still_runs(process) and finished(killed.store) < before + more:
            time.sleep(0.0005)
        time.sleep(delay)
        done = finished(killed.store)
        if still_runs(process):
            kill(process)
        ended = commands.end()
        assert ended.code in (0, -signal.SIGKILL), ended.err
        assert "Traceback" not in ended.err
        if ended.code:
            hits.append(done)
        elif latent_cache.is_complete(killed.store):
            assert story.tree(killed.store) == expected
            completed += 1
            if completed % 2:
                shutil.rmtree(killed.store)

    # They fell into the encoding, and into many places of it.
    assert sum(0 < done < ALL for done in hits) >= KILLS / 2, hits
    assert len(set(hits)) >= KILLS / 2, hits
    ended = commands.run(killed.arguments("encode"))
    assert ended.code == 0, ended.err
    assert story.tree(killed.store) == expected
