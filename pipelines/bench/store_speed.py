"""Benchmarks of reading: loading, resident and streamed batches, the official data path, opening a huge store."""

import itertools
import json
import math
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import zarr

import latent_cache
from latent_cache import (
    ChunkPlan,
    LatentCache,
    ResidentSampler,
    SplitPlan,
    StoreMetadata,
    StoreWriter,
    StreamingSampler,
    schema,
)
from pipelines.bench.measurement import Measurement, in_turn

SHAPE = (4, 8, 8)
FRAMES, VIDEOS = 292_968, 600  # 150 MB: the size of KTH's training split
STREAMED_FRAMES = 3_000_000  # 1.5 GB
BATCH, CLIP_FRAMES, STEPS = 256, 40, 2000
HUGE_FRAMES, HUGE_VIDEOS = 10**8, 10**6


def store_measurements(folder: Path, device: torch.device) -> Iterator[Measurement]:
    """Measure on a store of random latents of KTH's size, made in `folder`."""
    started = time.perf_counter()
    path = _write_store(folder / "latents.zarr")
    seconds = time.perf_counter() - started
    cache = latent_cache.open(path)
    megabytes = cache.nbytes / 1e6
    yield Measurement("write latents and codes, flushed to disk", megabytes / seconds, "MB/s")
    yield _load(cache, folder)
    yield from _resident(cache, device)
    yield from _streaming(folder, device)
    yield from _opening(folder)


def _write_store(path: Path, frames: int = FRAMES, codes: bool = True) -> Path:
    videos = frames * VIDEOS // FRAMES
    lengths = np.diff(np.linspace(0, frames, videos + 1).astype(np.int64))
    names = [f"video_{row:06d}" for row in range(videos)]
    chunk = latent_cache.default_chunk_frames(SHAPE, frames)
    plan = SplitPlan(names, ["identity"] * videos, lengths, SHAPE, chunk)
    metadata = StoreMetadata("bench", 25.0, {}, {"sha256": "bench", "codes": 1024}, {})
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((chunk, *SHAPE), np.float32)
    quantized = generator.integers(0, 1024, (chunk, *SHAPE[1:]), np.uint16)
    with StoreWriter.open(path, metadata, {"train": plan}, codes=codes) as writer:

        def write(part: ChunkPlan) -> None:
            writer.write_chunk("train", part, latents[: part.frames], quantized[: part.frames] if codes else None)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(write, writer.pending("train")))
        writer.finish()
    return path


def _load(cache: LatentCache, folder: Path) -> Measurement:
    files = []
    for index in range(cache.latent_reader.chunk_count):
        files.append(folder / f"plain_{index}")
        start = index * cache.latent_reader.chunk_frames
        cache.latents[start : start + cache.latent_reader.chunk_frames].tofile(files[-1])

    def plain() -> None:
        out = memoryview(np.empty(cache.nbytes, np.uint8))
        place = 0
        for file in files:
            with open(file, "rb", buffering=0) as opened:
                place += opened.readinto(out[place:])
        assert place == cache.nbytes

    ours, reference = in_turn(cache.load, plain, repeats=15)
    for file in files:
        file.unlink()
    return Measurement(
        f"load {cache.nbytes / 1e6:.0f} MB, checksums verified", ours * 1e3, "ms",
        f"plain files: {reference * 1e3:.1f} ms", reference / ours, at_least=0.5,
    )  # fmt: skip


def _resident(cache: LatentCache, device: torch.device) -> Iterator[Measurement]:
    sampler = ResidentSampler(cache, device, 0, BATCH, CLIP_FRAMES, torch.float32, device)
    latents = cache.load().to(device)
    drawn = [sampler.indices(step) for step in range(64)]
    rows = [torch.cat([draw.target, draw.reference, draw.condition]).to(device) for draw in drawn]
    steps = itertools.count()

    def ours() -> None:
        for _ in range(STEPS):
            sampler.batch(next(steps))
        _wait_for(device)

    def prepared() -> None:
        for number in range(STEPS):
            latents.index_select(0, rows[number % len(rows)]).to(torch.float32)
        _wait_for(device)

    seconds, reference = (value / STEPS for value in in_turn(ours, prepared, repeats=7))
    yield Measurement(
        f"resident batch of {BATCH}: draw, gather, to float32", seconds * 1e6, "us",
        f"index_select, prepared rows: {reference * 1e6:.1f} us", reference / seconds, at_least=0.5,
    )  # fmt: skip
    yield Measurement("samples/s of it", BATCH / seconds, "samples/s")
    yield from _official(BATCH / seconds)
    sampler.close()


def _official(samples_per_second: float) -> Iterator[Measurement]:
    """The official data path: an HDF5 file, one lzf data set a frame, a whole clip decoded for a sample."""
    name = "resident tier against the official data path"
    try:
        import h5py
    except ImportError:
        yield Measurement(name, samples_per_second, "samples/s", "not measured: pip install '.[h5]'")
        return
    side, videos, clip = 64, 20, CLIP_FRAMES
    generator = np.random.default_rng(0)
    # Smooth noise: it compresses about as real frames do.
    waves = generator.random((videos, 1, 1, 1, 3)) * 6
    grid = np.linspace(0, 3, side)
    video = np.sin(grid[:, None, None] + waves) + np.sin(grid[None, :, None] * 2 - waves)
    frames = np.broadcast_to((video * 60 + 128), (videos, clip, side, side, 3))
    frames = (frames + generator.integers(0, 3, frames.shape)).astype(np.uint8)
    with h5py.File("bench", "w", driver="core", backing_store=False) as file:
        for number in range(videos):
            file[f"len/{number}"] = clip
            for frame in range(clip):
                file.create_dataset(f"{number}/{frame}", data=frames[number, frame], compression="lzf")

        def official() -> None:
            for number in range(videos):
                length = file[f"len/{number}"][()]
                read = np.stack([file[f"{number}/{frame}"][()] for frame in range(length)])
                torch.from_numpy(read).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)

        (seconds,) = in_turn(official, repeats=3)
    reference = videos / seconds
    yield Measurement(
        name, samples_per_second, "samples/s", f"HDF5, lzf, clips of {clip} frames: {reference:.0f} samples/s",
        samples_per_second / reference, at_least=1000,
    )  # fmt: skip


def _streaming(folder: Path, device: torch.device) -> Iterator[Measurement]:
    """A store ten times as large as the memory budget; measured from the second epoch on, when memory is in use."""
    cache = latent_cache.open(_write_store(folder / "large.zarr", STREAMED_FRAMES, codes=False))
    budget = cache.nbytes // 10
    words = f"{cache.nbytes / 1e6:.0f} MB through {budget / 1e6:.0f} MB"
    windows = StreamingSampler(cache, "cpu", 0, 1, CLIP_FRAMES, budget)
    plan = windows.plan
    reader, epoch = cache.latent_reader, itertools.count()
    # As much memory as a window takes, used in turn: one chunk's would stay in the processor's cache.
    memory = np.empty((plan.buffer_frames // reader.chunk_frames, reader.chunk_frames, *SHAPE), cache.latents.dtype)

    def visit() -> None:
        """One sample of each window of an epoch: the window must be there whole."""
        number = next(epoch)
        those = range(number * plan.windows_per_epoch, (number + 1) * plan.windows_per_epoch)
        targets = [int(plan.window(window).targets[-1]) for window in those]
        for step in itertools.accumulate(targets[:-1], initial=number * windows.legal_targets):
            windows.batch(step)

    def in_order() -> None:
        for index in range(reader.chunk_count):
            frames = min(reader.chunk_frames, cache.frames - index * reader.chunk_frames)
            reader.read_chunk(index, memory[index % len(memory)][:frames])

    # The first epoch also reads what lies before the groups, and touches the memory for the first time.
    (first,) = in_turn(visit, repeats=1)
    ours, reference = in_turn(visit, in_order, repeats=4)
    windows.close()
    rate = cache.nbytes / 1e6
    yield Measurement(
        f"stream {words}: windows", rate / ours, "MB/s",
        f"the same chunks in order: {rate / reference:.0f} MB/s", reference / ours, at_least=0.75,
    )  # fmt: skip
    yield Measurement("its first epoch", rate / first, "MB/s")
    sampler = StreamingSampler(cache, device, 0, BATCH, CLIP_FRAMES, budget)
    steps = itertools.count()

    def batches() -> None:
        for _ in range(STEPS):
            sampler.batch(next(steps))
        _wait_for(device)

    (seconds,) = in_turn(batches, repeats=5)
    sampler.close()
    rate = STEPS * BATCH / seconds
    yield Measurement(f"stream {words}: batches of {BATCH}", rate, "targets/s", "", rate, at_least=50_000)


def _opening(folder: Path) -> Iterator[Measurement]:
    path = pretend_huge(folder / "huge.zarr")
    seconds = min(in_turn(lambda: latent_cache.open(path), repeats=9))
    tracemalloc.start()
    cache = latent_cache.open(path)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    words = f"{HUGE_FRAMES:.0e} frames, {HUGE_VIDEOS:.0e} videos"
    yield Measurement(f"open a store of {words}", seconds * 1e3, "ms", "", seconds * 1e3, at_most=100)
    per_video = size / HUGE_VIDEOS
    yield Measurement("its index in memory", per_video, "bytes/video", "", per_video, at_most=32)
    del cache


def pretend_huge(path: Path) -> Path:
    """A store whose metadata and index say that it is huge, with the latents of one video."""
    metadata = StoreMetadata("huge", 25.0, {}, {"sha256": "bench", "codes": 1024}, {})
    plan = SplitPlan(["video"], ["identity"], [30], SHAPE, 30)
    with StoreWriter.open(path, metadata, {"train": plan}, codes=True) as writer:
        for part in writer.pending("train"):
            writer.write_chunk("train", part, np.ones((30, *SHAPE), np.float32), np.zeros((30, *SHAPE[1:]), np.uint16))
        writer.finish()
    for name in (schema.LATENTS, schema.CODES):
        file = path / "train" / name / "zarr.json"
        content = json.loads(file.read_text())
        content["shape"][0] = HUGE_FRAMES
        file.write_text(json.dumps(content))
    group = zarr.open_group(path, mode="r+")["train"]
    assert isinstance(group, zarr.Group)
    offsets = np.linspace(0, HUGE_FRAMES, HUGE_VIDEOS + 1).astype(np.int64)
    chunks = (schema.OFFSET_CHUNK,)
    schema.create_array(group, schema.VIDEO_OFFSET, offsets.shape, chunks, offsets.dtype)[:] = offsets
    digits = math.ceil(math.log10(HUGE_VIDEOS))
    for name, values in (
        (schema.VIDEO_ID, [f"video_{row:0{digits}d}" for row in range(HUGE_VIDEOS)]),
        (schema.VIDEO_VIEW, ["identity"] * HUGE_VIDEOS),
    ):
        texts = np.array(values, dtype=np.dtypes.StringDType())
        schema.create_array(group, name, texts.shape, (schema.NAME_CHUNK,), texts.dtype)[:] = texts
    return path


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
