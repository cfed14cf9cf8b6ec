"""What the writer remembers of finished chunks: the proof that they are whole, and their part of the statistics."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np

from latent_cache.disk import write_json
from latent_cache.plan import ChunkPlan


@dataclass(frozen=True)
class ChunkMarker:
    """A finished chunk. Written after the chunk is on the disk, so that its presence proves the chunk's.

    Args:
        key: the plan's, see `ChunkPlan`.
        frames: of the chunk.
        count: values a channel.
        sum, sum_of_squares: [channel] float64, of the values as stored.
    """

    key: str
    frames: int
    count: int
    sum: list[float]
    sum_of_squares: list[float]

    @classmethod
    def of(cls, chunk: ChunkPlan, stored: np.ndarray) -> Self:
        """The marker of a chunk whose latents were stored as `stored`, [frames, c, h, w]."""
        exact = stored.astype(np.float64)
        return cls(
            key=chunk.key,
            frames=chunk.frames,
            count=exact.size // exact.shape[1],
            sum=exact.sum(axis=(0, 2, 3)).tolist(),
            sum_of_squares=np.square(exact).sum(axis=(0, 2, 3)).tolist(),
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ValueError or TypeError for a file that is no marker."""
        return cls(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        """Write it, whole or not at all."""
        write_json(path, asdict(self))

    def proves(self, chunk: ChunkPlan) -> bool:
        """Whether the marked chunk holds what a plan wants there."""
        return (self.key, self.frames) == (chunk.key, chunk.frames)


def channel_statistics(markers: Sequence[ChunkMarker]) -> dict[str, list[float]]:
    """`mean` and `std` of each channel over all frames of a split, in float64, whatever order they were written in."""
    count = sum(marker.count for marker in markers)
    mean, std = [], []
    for channel in range(len(markers[0].sum)):
        average = math.fsum(marker.sum[channel] for marker in markers) / count
        mean_square = math.fsum(marker.sum_of_squares[channel] for marker in markers) / count
        variance = mean_square - average**2
        # Below this the difference is rounding: a constant channel has deviation 0, not 1e-9.
        std.append(math.sqrt(variance) if variance > 1e-12 * mean_square else 0.0)
        mean.append(average)
    return {"mean": mean, "std": std}
