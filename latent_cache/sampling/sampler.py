"""What a sampler is: batches of target, reference and condition, as a function of the seed and the step."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from latent_cache.errors import StoreError
from latent_cache.reading.reader import LatentCache
from latent_cache.sampling.draws import MIN_VIDEO_FRAMES, LegalTargets

NAMED_TARGETS = 8  # of a batch, in messages

Tier = Literal["device", "host", "stream"]


@dataclass(frozen=True)
class FlowBatch:
    """Three frames of one video a row, on the training device.

    Args:
        target: [b, c, h, w] the latent to predict.
        reference: [b, c, h, w] the frame before it.
        condition: [b, c, h, w] an earlier frame.
        distance: [b] int64, index of the reference minus that of the condition, >= 1.
    """

    target: Tensor
    reference: Tensor
    condition: Tensor
    distance: Tensor

    def to(self, device: torch.device | str) -> "FlowBatch":
        """The same batch on another device."""
        return FlowBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class Sampler(ABC):
    """Draws batches from a split, wherever its latents lie. Made by `open_sampler`.

    In every tier a target is drawn from all legal (video, target frame) pairs alike, legal meaning that two frames
    come before it, and reference and condition are drawn alike for a given target (see `draw_distance`).

    Args:
        cache: the split.
        device: where batches go.
        seed: >= 0, of the run.
        batch_size: rows of the global batch, over all processes.
        clip_frames: frames of a training clip, >= 3: no condition lies further back.
        dtype: of the batches.
        past_horizon: conditions are drawn from the last so many frames before the target, the reference among them,
            >= 2; None: from all of its clip.
    Raises:
        ValueError: sizes out of range.
        StoreError: no video has three frames.
    """

    tier: Tier
    why: str = ""  # of the tier, for the log

    def __init__(
        self,
        cache: LatentCache,
        device: torch.device | str,
        seed: int,
        batch_size: int,
        clip_frames: int,
        dtype: torch.dtype,
        past_horizon: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: at least 1 is wanted")
        if clip_frames < MIN_VIDEO_FRAMES:
            raise ValueError(f"clip_frames = {clip_frames}: at least {MIN_VIDEO_FRAMES} (condition, reference, target)")
        if past_horizon is not None and past_horizon < 2:
            raise ValueError(f"past_horizon = {past_horizon}: at least 2 (condition, reference) or None")
        if seed < 0:
            raise ValueError(f"seed = {seed}: must be >= 0")
        self.device = torch.device(device)
        self.seed = seed
        self.batch_size = batch_size
        self.clip_frames = clip_frames
        self.past_horizon = past_horizon
        self.dtype = dtype
        self._pin = self.device.type == "cuda"
        self._cache = cache
        self._legal = LegalTargets(cache.offsets)
        if self._legal.count == 0:
            lengths = cache.lengths
            raise StoreError(
                f"{cache.url}, split {cache.split!r}: no video has the {MIN_VIDEO_FRAMES} frames of a sample; the "
                f"{len(lengths)} videos have {lengths.min()} to {lengths.max()}: encode longer ones"
            )

    @property
    def legal_targets(self) -> int:
        """Number of (video, target) pairs that can be drawn: samples in an epoch."""
        return self._legal.count

    @abstractmethod
    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> FlowBatch:
        """The rows of the global batch of a step that belong to one process.

        Args:
            step: >= 0.
            rank: of the process, of `world_size`, which must divide the batch size.
        Returns:
            batch_size / world_size rows; those of all ranks in order are those of world_size 1.
        Raises:
            ValueError: ranks that don't fit, a negative step.
        """

    @abstractmethod
    def targets(self, step: int) -> np.ndarray:
        """[batch_size] int64 frame numbers in the split of a step's targets."""

    def describe_batch(self, step: int) -> str:
        """Which videos a step is trained on, in a few words: for the message about a step that failed."""
        targets, offsets = self.targets(step), self._cache.offsets
        videos = np.searchsorted(offsets, targets, side="right") - 1
        named = [f"{self._cache.video_ids[v]} frame {t - offsets[v]}" for t, v in zip(targets, videos, strict=True)]
        more = f" and {len(named) - NAMED_TARGETS} more" if len(named) > NAMED_TARGETS else ""
        return f"targets in {', '.join(named[:NAMED_TARGETS])}{more}"

    @property
    def order(self) -> str:
        """In words, all but seed and batch size that decides what a step draws: equal words, equal batches."""
        return "drawn from the whole split"

    @abstractmethod
    def describe(self) -> str:
        """Where the latents lie, how many bytes, and why there: for the log."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the latents, and end the threads, if any. Safe to call twice; no batch comes after it."""

    def _rows(self, step: int, rank: int, world_size: int) -> slice:
        if step < 0:
            raise ValueError(f"step = {step}: must be >= 0")
        if self.batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size = {self.batch_size}, rank {rank} of {world_size} processes: choose a batch size that the "
                "number of processes divides"
            )
        size = self.batch_size // world_size
        return slice(rank * size, (rank + 1) * size)

    def _to_batch(self, frames: Tensor, distance: Tensor) -> FlowBatch:
        """Frames [3 * b, c, h, w] (targets, references, conditions) and distances [b] to a batch on the device."""
        # From ordinary memory a copy to a GPU would wait for all that the GPU has still to do; `frames` are in pinned
        # memory already. They are converted after the copy: half the bytes on the way.
        if self._pin and not distance.is_cuda:
            distance = distance.pin_memory()
        frames = frames.to(self.device, non_blocking=True).to(self.dtype)
        target, reference, condition = frames.chunk(3)
        distance = distance.to(self.device, non_blocking=True)
        return FlowBatch(target=target, reference=reference, condition=condition, distance=distance)


def as_tensor(values: np.ndarray) -> Tensor:
    """A copy: what a caller does to a batch must not reach the draws that are kept."""
    return torch.from_numpy(values.copy())
