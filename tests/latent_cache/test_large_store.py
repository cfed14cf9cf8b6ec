"""A store of 10^8 frames and 10^6 videos, 61 GB that take 100 MB of the disk. With -s it prints what is measured."""

import time
from pathlib import Path

import numpy as np
import pytest

import latent_cache
from latent_cache import SplitPlan, default_chunk_frames, default_shard_chunks
from tests.linked_store import write_linked_store

FRAMES, VIDEOS = 10**8, 10**6
SHAPE = (4, 8, 8)
BATCH, BUDGET = 256, 256 * 2**20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """The store, and the latents of each of its files."""
    # Lengths around 100, two thirds of them odd.
    lengths = np.tile([99, 100, 101, 97, 103], VIDEOS // 5)
    chunk_frames = default_chunk_frames(SHAPE, FRAMES)
    plan = SplitPlan(
        [f"{video // 1000:04d}/clip_{video:07d}" for video in range(VIDEOS)],
        ["identity"] * VIDEOS,
        lengths,
        SHAPE,
        chunk_frames,
        shard_chunks=default_shard_chunks(FRAMES, chunk_frames),
    )
    path = tmp_path_factory.mktemp("large") / "large.zarr"
    metadata = latent_cache.StoreMetadata("large", 10.0, {}, {"sha256": "0" * 64}, {})
    return path, write_linked_store(path, {"train": plan}, metadata)["train"]


def resident_bytes() -> int:
    """Memory of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


@pytest.mark.long
def test_opening(large) -> None:
    path, _ = large
    latent_cache.open(path)  # imports, and what the process keeps
    before, seconds, caches = resident_bytes(), [], []
    for _ in range(10):
        started = time.process_time()
        caches.append(latent_cache.open(path))
        seconds.append(time.process_time() - started)
    grown = (resident_bytes() - before) / len(caches)
    print(f"\nopening: {1e3 * min(seconds):.0f} ms of a core, {grown / 1e6:.1f} MB each")
    cache = caches[0]
    assert (cache.frames, len(cache.video_ids)) == (FRAMES, VIDEOS)
    assert cache.video_ids[VIDEOS // 2] == "0500/clip_0500000"
    assert min(seconds) < 0.1
    assert grown < 16 * VIDEOS  # 8 bytes of each video's offset, and two chunks of names


@pytest.mark.long
def test_streaming(large) -> None:
    path, content = large
    cache = latent_cache.open(path)
    before = resident_bytes()
    sampler = latent_cache.open_sampler(
        cache, "cpu", seed=0, batch_size=BATCH, clip_frames=16, residency="stream", memory_budget=BUDGET
    )
    window = sampler.legal_targets // BATCH // sampler.plan.windows_per_epoch
    memory, rates = [], []
    for turn in range(3):
        started, used = time.perf_counter(), time.process_time()
        for step in range(turn * window, (turn + 1) * window):
            sampler.batch(step)
        seconds, used = time.perf_counter() - started, time.process_time() - used
        rates.append(window * BATCH / used)
        memory.append(resident_bytes() - before)
        print(
            f"\nstreaming: {window * BATCH / seconds:.3g} targets/s ({rates[-1]:.3g} per second of a core), "
            f"{memory[-1] / 1e6:.0f} MB more than before"
        )
    for number in (0, 3 * window, 10**9):  # any step reads its own window
        expected = content[sampler.targets(number) % len(content)]
        np.testing.assert_array_equal(sampler.batch(number).target.numpy(), expected)
    sampler.close()
    assert max(rates) > 50_000
    assert max(memory) < sampler.plan.nbytes + 24 * VIDEOS + 64 * 2**20
