"""The Zarr store of latents: schema, writer, reader, batch samplers. Independent of the networks.

`latent_cache.open("latents/kth.zarr", split="train")` reads one split; `StoreWriter.open` writes a store.
"""

from latent_cache.errors import (
    CorruptStoreError,
    DamagedFramesError,
    IncompleteStoreError,
    LockedStoreError,
    LostManifestError,
    NoSpaceError,
    ReplacedStoreError,
    StaleWriterError,
    StoreError,
    StoreMismatchError,
)
from latent_cache.reading.reader import (
    LatentCache,
    SplitProgress,
    changed_files,
    codebook_damages,
    is_complete,
    is_sealed,
    open_metadata,
    open_notes,
    open_progress,
    splits,
)
from latent_cache.reading.reader import open_cache as open
from latent_cache.sampling.clip_dataset import ClipDataset
from latent_cache.sampling.clip_dataset import ClipDataset as torch_dataset
from latent_cache.sampling.draws import longest_distance, step_generator
from latent_cache.sampling.residency import Residency, choose_residency, open_sampler
from latent_cache.sampling.resident import FlowIndices, ResidentSampler, first_batch
from latent_cache.sampling.sampler import FlowBatch, Sampler
from latent_cache.sampling.streaming import StreamingSampler
from latent_cache.schema import StoreMetadata, has_only_begun
from latent_cache.writing.appending import discard_generation, remove_store, replacing_store
from latent_cache.writing.chunk_plan import ChunkPlan, SplitPlan, default_chunk_frames, default_shard_chunks
from latent_cache.writing.chunk_writer import ChunkWriter
from latent_cache.writing.writer import StoreWriter, seal, unseal

__all__ = [
    "ChunkPlan",
    "ChunkWriter",
    "ClipDataset",
    "CorruptStoreError",
    "DamagedFramesError",
    "FlowBatch",
    "FlowIndices",
    "IncompleteStoreError",
    "LatentCache",
    "LockedStoreError",
    "LostManifestError",
    "NoSpaceError",
    "ReplacedStoreError",
    "Residency",
    "ResidentSampler",
    "Sampler",
    "SplitPlan",
    "SplitProgress",
    "StaleWriterError",
    "StoreError",
    "StoreMetadata",
    "StoreMismatchError",
    "StoreWriter",
    "StreamingSampler",
    "changed_files",
    "choose_residency",
    "codebook_damages",
    "default_chunk_frames",
    "default_shard_chunks",
    "discard_generation",
    "first_batch",
    "has_only_begun",
    "is_complete",
    "is_sealed",
    "longest_distance",
    "open",
    "open_metadata",
    "open_notes",
    "open_progress",
    "open_sampler",
    "remove_store",
    "replacing_store",
    "seal",
    "splits",
    "step_generator",
    "torch_dataset",
    "unseal",
]
