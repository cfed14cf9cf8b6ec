"""The Zarr store of latents: schema, writer, reader, batch samplers, verification. Knows no network.

`latent_cache.open("latents/kth.zarr", split="train")` reads one split; `StoreWriter.open` writes a store.
"""

from latent_cache.chunk_writer import ChunkWriter
from latent_cache.errors import (
    CorruptStoreError,
    IncompleteStoreError,
    LockedStoreError,
    NoSpaceError,
    StaleWriterError,
    StoreError,
    StoreMismatchError,
)
from latent_cache.plan import ChunkPlan, SplitPlan, default_chunk_frames, default_shard_chunks
from latent_cache.reader import LatentCache, is_complete, open_metadata, splits
from latent_cache.reader import open_cache as open
from latent_cache.sampler import FlowBatch, ResidentSampler, choose_residency, step_generator
from latent_cache.schema import StoreMetadata
from latent_cache.writer import StoreWriter

__all__ = [
    "ChunkPlan",
    "ChunkWriter",
    "CorruptStoreError",
    "FlowBatch",
    "IncompleteStoreError",
    "LatentCache",
    "LockedStoreError",
    "NoSpaceError",
    "ResidentSampler",
    "SplitPlan",
    "StaleWriterError",
    "StoreError",
    "StoreMetadata",
    "StoreMismatchError",
    "StoreWriter",
    "choose_residency",
    "default_chunk_frames",
    "default_shard_chunks",
    "is_complete",
    "open",
    "open_metadata",
    "splits",
    "step_generator",
]
