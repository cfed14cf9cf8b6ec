"""Benchmark of loading a store of latents, compared to reading plain files."""

from collections.abc import Iterator
from math import prod

import numpy as np

import latent_cache
from latent_cache import LatentCache, SplitPlan, StoreMetadata, StoreWriter
from pipelines.bench.measurement import Measurement
from pipelines.bench.workbench import Workbench

VIDEO_FRAMES = 100
CHUNKS = 16  # at least


def store_measurements(bench: Workbench) -> Iterator[Measurement]:
    """Measure while the files are in the page cache."""
    cache, files = random_store(bench), []
    reader = cache.latent_reader
    for index in range(reader.chunk_count):
        files.append(bench.folder / f"plain_{index}")
        cache.latents[index * reader.chunk_frames : (index + 1) * reader.chunk_frames].tofile(files[-1])

    def read_files() -> None:
        out = memoryview(np.empty(cache.nbytes, np.uint8))
        place = 0
        for file in files:
            with open(file, "rb", buffering=0) as opened:
                place += opened.readinto(out[place:])
        assert place == cache.nbytes

    ours, reference = bench.in_turn(cache.load, read_files)
    yield Measurement(
        f"load {cache.nbytes / 1e6:.3g} MB, checksums verified", ours * 1e3, "ms",
        f"plain files: {reference * 1e3:.3g} ms", reference / ours, at_least=0.5,
    )  # fmt: skip


def random_store(bench: Workbench) -> LatentCache:
    """The store of random latents, without codes; written on first use."""
    path, shape = bench.folder / "latents.zarr", bench.latent_shape
    if not path.exists():
        frames = bench.sizes.store_bytes // (2 * prod(shape))
        chunk = min(latent_cache.default_chunk_frames(shape, frames), frames // CHUNKS)
        lengths = np.diff(np.append(np.arange(0, frames, VIDEO_FRAMES), frames))
        names = [f"video_{row:06d}" for row in range(len(lengths))]
        plan = SplitPlan(names, ["identity"] * len(names), lengths, shape, chunk)
        metadata = StoreMetadata("bench", 25.0, {}, {"sha256": "bench"}, {})
        latents = np.random.default_rng(0).standard_normal((chunk, *shape), np.float32)
        with StoreWriter.open(path, metadata, {"train": plan}, codes=False) as writer:
            for part in writer.pending("train"):
                writer.write_chunk("train", part, latents[: part.frames], None)
            writer.finish()
    return latent_cache.open(path)
