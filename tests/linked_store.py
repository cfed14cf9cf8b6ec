"""Stores of any size of which the disk holds one file of each array, linked many times."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import zarr

from latent_cache import SplitPlan, StoreMetadata, StoreWriter
from latent_cache.schema import CODES, LATENTS
from latent_cache.writing.chunk_writer import file_path


def write_linked_store(
    path: Path, plans: Mapping[str, SplitPlan], metadata: StoreMetadata, notes: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, np.ndarray]:
    """Write a complete store of random latents whose files are all alike within a split.

    Returns:
        for each split the latents of its first file [frame, c, h, w] float16: frame i of the split is i % len of it.
    """
    contents = {}
    with StoreWriter.open(path, metadata, plans, codes=True) as writer:
        for split, plan in plans.items():
            first, *others = writer.pending(split)
            generator = np.random.default_rng(0)
            shape = (first.frames, *plan.latent_shape)
            contents[split] = generator.standard_normal(shape, dtype=np.float32).astype(np.float16)
            codes = generator.integers(0, 64, (shape[0], *shape[2:]))
            marker = writer.chunk_writer.write(split, first, contents[split], codes)
            writer.accept(split, first, marker)
            for name in (LATENTS, CODES):
                array = zarr.open_array(path / split / name, mode="r")
                source = file_path(path / split / name, array, first.index)
                for chunk in others:
                    target = file_path(path / split / name, array, chunk.index)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.link(source, target)
            for chunk in others:
                writer.accept(split, chunk, marker)
        writer.finish(store_notes=notes)
    return contents
