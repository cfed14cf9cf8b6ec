"""Markers of finished chunks: digests of their files, and their part of the statistics."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from latent_cache.manifest import StoredFile
from latent_cache.writing.chunk_plan import ChunkPlan
from latent_cache.writing.disk import write_json


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ChunkMarker:
    """A finished chunk. Written after the chunk's files are on disk, with digests of their content.

    Args:
        key: key of the plan, see `ChunkPlan`.
        frames: frames of the chunk.
        files: each of the chunk's files, by name of the array.
        count: values per channel.
        sum, sum_of_squares: [channel] float64, of the values as stored.
        measured: JSON values from the caller of `ChunkWriter.write`, not interpreted here.
    """

    key: str
    frames: int
    files: dict[str, StoredFile]
    count: int
    sum: list[float]
    sum_of_squares: list[float]
    measured: dict[str, Any]

    @classmethod
    def of(
        cls, chunk: ChunkPlan, stored: np.ndarray, files: Mapping[str, StoredFile], measured: Mapping[str, Any]
    ) -> Self:
        """The marker of a chunk whose file holds the latents `stored`, [frames, c, h, w]."""
        sums, squares = [], []
        for channel in stored.swapaxes(0, 1):  # a float64 copy of the whole chunk would be four times its size
            exact = channel.astype(np.float64)
            sums.append(float(exact.sum()))
            squares.append(float(np.square(exact).sum()))
        return cls(
            key=chunk.key,
            frames=len(stored),
            files=dict(files),
            count=stored.size // stored.shape[1],
            sum=sums,
            sum_of_squares=squares,
            measured=dict(measured),
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a marker. Raises ValueError for a file that is no marker."""
        return TypeAdapter(cls).validate_python(json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        """Write the marker atomically."""
        write_json(path, asdict(self))

    def check(self, chunk: ChunkPlan, files: Mapping[str, Path]) -> None:
        """Check that a planned chunk is on disk as it was written.

        Raises:
            ValueError: the plan has other frames there, or a file has changed since it was written.
            OSError: a file is missing.
        """
        if (self.key, self.frames) != (chunk.key, chunk.frames):
            raise ValueError("the plan now has other frames there")
        if self.files.keys() != files.keys():
            raise ValueError(f"it has files {sorted(self.files)}, expected {sorted(files)}")
        for name, file in files.items():
            if hashlib.sha256(file.read_bytes()).hexdigest() != self.files[name].sha256:
                raise ValueError(f"{file} is damaged")


def channel_statistics(markers: Sequence[ChunkMarker]) -> dict[str, list[float]]:
    """`mean` and `std` of each channel over all frames of a split, in float64, independent of the order of writing."""
    count = sum(marker.count for marker in markers)
    mean, std = [], []
    for channel in range(len(markers[0].sum)):
        average = math.fsum(marker.sum[channel] for marker in markers) / count
        mean_square = math.fsum(marker.sum_of_squares[channel] for marker in markers) / count
        variance = mean_square - average**2
        # Smaller differences are rounding: a constant channel has deviation 0, not 1e-9.
        std.append(math.sqrt(variance) if variance > 1e-12 * mean_square else 0.0)
        mean.append(average)
    return {"mean": mean, "std": std}
