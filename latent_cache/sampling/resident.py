"""Batches from latents that are completely in memory, on the training device or on the host."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latent_cache.reading.reader import LatentCache
from latent_cache.sampling.draws import (
    LegalTargets,
    draw_past,
    past_offsets,
    steps_per_block,
    to_integer,
    uniform_block,
)
from latent_cache.sampling.sampler import FlowBatch, Sampler, batch_of


@dataclass(frozen=True)
class FlowIndices:
    """The rows of `FlowBatch` as frame numbers in the split, int64 on the CPU: reference [k, b], the others [b]."""

    target: Tensor
    reference: Tensor
    condition: Tensor
    distance: Tensor


class ResidentSampler(Sampler):
    """Draws independently and with replacement, targets uniformly over all legal pairs.

    The draws of many steps are made together, always on the CPU, so a step has the same batch in both residencies, and
    a run that is resumed on another machine continues with the same batches.

    Args:
        storage_device: device of the latents: the same as `device`, or the CPU. See `choose_residency`.
        Others: as `Sampler`.
    Raises:
        CorruptStoreError: the split cannot be read.
        ValueError, StoreError: as `Sampler`.
    """

    def __init__(
        self,
        cache: LatentCache,
        device: torch.device | str,
        seed: int,
        batch_size: int,
        clip_frames: int,
        dtype: torch.dtype = torch.float32,
        storage_device: torch.device | str | None = None,
        past_horizon: int | None = None,
        recent_frames: int = 1,
    ) -> None:
        super().__init__(cache, device, seed, batch_size, clip_frames, dtype, past_horizon, recent_frames)
        self.storage_device = self.device if storage_device is None else torch.device(storage_device)
        if self.storage_device.type not in ("cpu", self.device.type):
            raise ValueError(f"storage_device = {self.storage_device}: expected the CPU or the device, {self.device}")
        self.tier = "device" if self.storage_device.type == self.device.type else "host"
        self._block_steps = steps_per_block(batch_size)
        self._block: tuple[int, Tensor] | None = None
        self._latents: Tensor | None = cache.load().to(self.storage_device)

    def indices(self, step: int) -> FlowIndices:
        """The draws of a step for the whole global batch."""
        target, *newest, condition, distance = self._drawn(step).cpu().clone()
        return FlowIndices(target, torch.stack(newest), condition, distance)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> FlowBatch:
        """As `Sampler.batch`; does not synchronize with a GPU that holds the latents."""
        rows = self._rows(step, rank, world_size)
        if self._latents is None:
            raise ValueError("the sampler is closed")
        drawn = self._drawn(step)
        numbers = drawn[:-1, rows].reshape(-1)
        if self._pin and not self._latents.is_cuda:
            shape = (len(numbers), *self._latents.shape[1:])
            frames = torch.empty(shape, dtype=self._latents.dtype, pin_memory=True)
            torch.index_select(self._latents, 0, numbers, out=frames)
        else:
            frames = self._latents.index_select(0, numbers)
        return self._to_batch(frames, drawn[-1, rows].clone())

    def targets(self, step: int) -> np.ndarray:
        """As `Sampler.targets`."""
        return self.indices(step).target.numpy()

    def describe(self) -> str:
        """As `Sampler.describe`."""
        size = 0 if self._latents is None else self._latents.nbytes
        return f"{size / 1e6:.0f} MB of latents resident on {self.storage_device}{self.why and f' ({self.why})'}"

    def close(self) -> None:
        """Free the latents."""
        self._latents = self._block = None

    def _drawn(self, step: int) -> Tensor:
        """[k + 3, batch_size] int64 frame numbers (see `past_offsets`) and distances, with the latents.

        Threads may call this at the same time; at worst each draws the block itself.
        """
        number, place = divmod(step, self._block_steps)
        block = self._block
        if block is None or block[0] != number:
            drawn = torch.from_numpy(self._draw(number))
            if self.storage_device.type == "cuda":  # all indices of the block in one asynchronous copy
                drawn = drawn.pin_memory().to(self.storage_device, non_blocking=True)
            self._block = block = (number, drawn)
        return block[1][place]

    def _draw(self, block: int) -> np.ndarray:
        """[steps, k + 3, batch_size] int64, see `_drawn`."""
        settings = self.clip_frames, self.past_horizon, self.recent_frames
        return _draw(self._legal, self.seed, block, self.batch_size, *settings)


def first_batch(
    cache: LatentCache,
    seed: int,
    batch_size: int,
    clip_frames: int,
    past_horizon: int | None = None,
    recent_frames: int = 1,
) -> FlowBatch:
    """The batch of step 0 of a `ResidentSampler`, float32 on the CPU, whatever fits into memory: one chunk at a time.

    Args:
        As `Sampler`; the split has a video of three frames.
    Raises:
        CorruptStoreError: a chunk of the batch cannot be read.
    """
    drawn = _draw(LegalTargets(cache.offsets), seed, 0, batch_size, clip_frames, past_horizon, recent_frames)[0]
    numbers, size = drawn[:-1].reshape(-1), cache.latent_reader.chunk_frames
    frames = torch.empty(len(numbers), *cache.latent_shape)
    for chunk in np.unique(numbers // size):
        start = int(chunk) * size
        read = torch.from_numpy(cache.latent_reader.read(start, min(start + size, cache.frames)))
        rows = np.flatnonzero(numbers // size == chunk)
        frames[rows] = read[numbers[rows] - start].float()
    return batch_of(frames, torch.from_numpy(drawn[-1].copy()))


def _draw(
    legal: LegalTargets,
    seed: int,
    block: int,
    batch_size: int,
    clip_frames: int,
    past_horizon: int | None,
    recent_frames: int,
) -> np.ndarray:
    """[steps, k + 3, batch_size] int64 frame numbers (see `past_offsets`) and distances of a block of steps."""
    steps = steps_per_block(batch_size)
    uniform = uniform_block(seed, "frames", block, (3, steps * batch_size))
    place_in_video, target = legal.locate(to_integer(uniform[0], legal.count))
    place, distance = draw_past(uniform[1], uniform[2], place_in_video, clip_frames, past_horizon)
    drawn = np.empty((steps, recent_frames + 3, batch_size), np.int64)
    for column, values in enumerate((*(target + past_offsets(place, distance, recent_frames)), distance)):
        drawn[:, column] = values.reshape(steps, batch_size)
    return drawn
