"""A folder of many small videos: time and memory per video of `data` and `encode --dry-run`.

`-s` prints the measured figures, and `--videos 1000000` takes more than these.
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from latent_cache import SplitPlan, StoreMetadata
from pipelines.config import RiverConfig, load_config
from pipelines.data.datasets import division_note, open_raw_splits
from pipelines.encoding.store_checks import store_preprocessing
from tests.linked_store import write_linked_store

LINKS = 10_000  # of one file; ext4 takes 65 000
SETS = ("dataset.source=videos", "dataset.splits={}")


@dataclasses.dataclass(frozen=True)
class Used:
    """What a command took: processor seconds, the peak of its memory in bytes, what it printed."""

    command: str
    seconds: float
    peak: int
    out: str


@pytest.fixture(scope="module")
def measure(story: Any) -> Callable[..., Used]:
    def run(place: Any, command: str, *arguments: str) -> Used:
        words = place.with_sets(*SETS).arguments(command, *arguments)
        started = subprocess.Popen(
            [sys.executable, "-m", "pipelines", *words],
            cwd=story.REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        out = started.stdout.read()
        _, status, usage = os.wait4(started.pid, 0)
        started.returncode = os.waitstatus_to_exitcode(status)
        started.stdout.close()
        assert started.returncode == 0, out
        return Used(" ".join([command, *arguments]), usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, out)

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, story: Any, pytestconfig: pytest.Config) -> tuple[Any, Any, int]:
    """A place with ten videos, one with many, hard links of a few files in folders of a thousand each; how many."""
    few, many = (story.Place(tmp_path_factory.mktemp(name)) for name in ("few", "many"))
    count = pytestconfig.getoption("--videos")
    bases = [few.data / f"{number}.mp4" for number in range(max(10, -(-count // LINKS)))]
    for number, base in enumerate(bases):
        story.write_video(base, story.moving_square(4, number, 32, 32))
    for number in range(count):
        path = many.data / f"{number // 1000:04d}" / f"clip_{number:07d}.mp4"
        if number % 1000 == 0:
            path.parent.mkdir(parents=True)
        os.link(bases[number % len(bases)], path)
    return few, many, count


def write_store(config: RiverConfig) -> None:
    """A complete store of the videos that are there."""
    splits = open_raw_splits(config)
    model = config.autoencoder.model
    plans = {
        split: SplitPlan(
            source.videos.ids,
            ["identity"] * len(source.videos),
            source.videos.frames,
            model.latent_shape(config.dataset.frame_size),
            chunk_frames=1024,
            fingerprints=source.videos.fingerprints,
        )
        for split, source in splits.items()
    }
    origin = {"sha256": "0" * 64, "latent_channels": model.latent_channels}
    metadata = StoreMetadata(config.dataset.name, 10.0, store_preprocessing(config), origin, {})
    config.store_path.parent.mkdir(parents=True, exist_ok=True)
    write_linked_store(config.store_path, plans, metadata, division_note(config))


@pytest.mark.long
def test_a_million_videos_take_minutes_and_less_than_two_gigabytes(folders, measure) -> None:
    """By what each of fewer takes, unless there are a million."""
    few, many, count = folders

    def more(base: Used, used: Used) -> tuple[float, float]:
        seconds, memory = (used.seconds - base.seconds) / count, (used.peak - base.peak) / count
        print(f"\n{used.command}: {1e6 * seconds:.0f} µs and {memory:.0f} bytes per video, {used.peak / 1e6:.0f} MB")
        return seconds, memory

    base, first, again = measure(few, "data"), measure(many, "data"), measure(many, "data")
    assert f"{count} usable" in again.out
    for place in (few, many):
        write_store(load_config(place.folder / "tiny.yaml", SETS))
    base_planned, planned = (measure(place, "encode", "--dry-run") for place in (few, many))
    assert "store        done" in planned.out
    costs = [more(base, first), more(base, again), more(base_planned, planned)]
    assert costs[0][0] < 2e-3
    assert max(seconds for seconds, _ in costs[1:]) < 4e-4
    assert max(memory for _, memory in costs) < 1500
