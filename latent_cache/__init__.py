"""The Zarr store of latents: schema, writer, reader, batch samplers, verification. Knows no network.

`latent_cache.open("latents/kth.zarr", split="train")` reads one split; `StoreWriter.open` writes a store.
"""

from latent_cache.errors import (
    CorruptStoreError,
    IncompleteStoreError,
    LockedStoreError,
    StoreError,
    StoreMismatchError,
)
from latent_cache.plan import ChunkPlan, SplitPlan, default_chunk_frames
from latent_cache.reader import LatentCache, is_complete, open_metadata, splits
from latent_cache.reader import open_cache as open
from latent_cache.sampler import FlowBatch, ResidentSampler, choose_residency, step_generator
from latent_cache.schema import StoreMetadata
from latent_cache.writer import StoreWriter

__all__ = [
    "ChunkPlan",
    "CorruptStoreError",
    "FlowBatch",
    "IncompleteStoreError",
    "LatentCache",
    "LockedStoreError",
    "ResidentSampler",
    "SplitPlan",
    "StoreError",
    "StoreMetadata",
    "StoreMismatchError",
    "StoreWriter",
    "choose_residency",
    "default_chunk_frames",
    "is_complete",
    "open",
    "open_metadata",
    "splits",
    "step_generator",
]
