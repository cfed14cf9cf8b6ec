"""The interface of samplers: batches of target, reference and condition, as a function of seed and step."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from latent_cache.errors import StoreError
from latent_cache.reading.reader import LatentCache
from latent_cache.sampling.draws import MIN_VIDEO_FRAMES, LegalTargets

NAMED_TARGETS = 8  # number of a batch's targets that messages name

Tier = Literal["device", "host", "stream"]


@dataclass(frozen=True)
class FlowBatch:
    """Frames of one video per row, on the training device.

    Args:
        target: [b, c, h, w] latents to predict.
        reference: [b, k c, h, w] latents of the k newest frames before it, the newest first.
        condition: [b, c, h, w] latents of an earlier frame.
        distance: [b] int64 index of the newest frame minus index of the condition, >= 1.
    """

    target: Tensor
    reference: Tensor
    condition: Tensor
    distance: Tensor

    def to(self, device: torch.device | str) -> "FlowBatch":
        """The same batch on another device."""
        return FlowBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class Sampler(ABC):
    """Draws batches from a split. Made by `open_sampler`.

    In every tier, targets are uniform over all legal (video, target frame) pairs (see `LegalTargets`), and conditions
    have the same distribution given the target (see `draw_past`).

    Args:
        cache: the split.
        device: device of the batches.
        seed: seed of the run, >= 0.
        batch_size: rows of the global batch, over all processes.
        clip_frames: frames of a training clip, >= 3; conditions are within the clip.
        dtype: dtype of the batches.
        past_horizon: conditions are drawn from this many frames before the target, the reference included, >= 2;
            None: from the whole clip.
        recent_frames: number k of newest frames in the reference, see `past_offsets`.
    Raises:
        ValueError: sizes out of range.
        StoreError: no video has three frames.
    """

    tier: Tier
    why: str = ""  # reason for choosing the tier, for the log

    def __init__(
        self,
        cache: LatentCache,
        device: torch.device | str,
        seed: int,
        batch_size: int,
        clip_frames: int,
        dtype: torch.dtype,
        past_horizon: int | None = None,
        recent_frames: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: must be at least 1")
        if clip_frames < MIN_VIDEO_FRAMES:
            raise ValueError(
                f"clip_frames = {clip_frames}: must be at least {MIN_VIDEO_FRAMES} (condition, reference, target)"
            )
        if past_horizon is not None and past_horizon < 2:
            raise ValueError(f"past_horizon = {past_horizon}: must be at least 2 (condition, reference) or None")
        if recent_frames < 1:
            raise ValueError(f"recent_frames = {recent_frames}: must be at least 1")
        if seed < 0:
            raise ValueError(f"seed = {seed}: must be >= 0")
        self.device = torch.device(device)
        self.seed = seed
        self.batch_size = batch_size
        self.clip_frames = clip_frames
        self.past_horizon = past_horizon
        self.recent_frames = recent_frames
        self.dtype = dtype
        self._pin = self.device.type == "cuda"
        self._cache = cache
        self._legal = LegalTargets(cache.offsets)
        if self._legal.count == 0:
            lengths = cache.lengths
            raise StoreError(
                f"{cache.url}, split {cache.split!r}: a sample needs {MIN_VIDEO_FRAMES} frames, but the {len(lengths)} "
                f"videos have {lengths.min()} to {lengths.max()}: encode longer videos"
            )

    @property
    def legal_targets(self) -> int:
        """Number of (video, target) pairs that can be drawn, which are the samples of an epoch."""
        return self._legal.count

    @abstractmethod
    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> FlowBatch:
        """One process's rows of the global batch of a step.

        Args:
            step: >= 0.
            rank: rank of the process.
            world_size: number of processes; must divide the batch size.
        Returns:
            batch_size / world_size rows; the rows of all ranks in order are those of world_size 1.
        Raises:
            ValueError: a rank or world size that does not fit, a negative step.
        """

    @abstractmethod
    def targets(self, step: int) -> np.ndarray:
        """[batch_size] int64 frame numbers (in the split) of a step's targets."""

    def describe_batch(self, step: int) -> str:
        """The targets of a step as text, for the message about a failed step."""
        targets, offsets = self.targets(step), self._cache.offsets
        videos = np.searchsorted(offsets, targets, side="right") - 1
        named = [f"{self._cache.video_ids[v]} frame {t - offsets[v]}" for t, v in zip(targets, videos, strict=True)]
        more = f" and {len(named) - NAMED_TARGETS} more" if len(named) > NAMED_TARGETS else ""
        return f"targets in {', '.join(named[:NAMED_TARGETS])}{more}"

    @property
    def order(self) -> str:
        """What decides the draws besides seed and batch size, as text: equal texts mean equal batches."""
        return "drawn from the whole split"

    @abstractmethod
    def describe(self) -> str:
        """Where the latents are, their size, and the reason, for the log."""

    @abstractmethod
    def close(self) -> None:
        """Free the latents and stop the threads. Safe to call twice; `batch` raises ValueError afterwards."""

    def _rows(self, step: int, rank: int, world_size: int) -> slice:
        if step < 0:
            raise ValueError(f"step = {step}: must be >= 0")
        if self.batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size = {self.batch_size}, rank {rank} of {world_size} processes: choose a batch size that is a "
                "multiple of the number of processes"
            )
        size = self.batch_size // world_size
        return slice(rank * size, (rank + 1) * size)

    def _to_batch(self, frames: Tensor, distance: Tensor) -> FlowBatch:
        """Move frames [(k + 2) b, c, h, w] (see `past_offsets`) and distances [b] to the device."""
        # A copy from pageable memory would wait for all pending work of the GPU; `frames` are already in pinned memory.
        # They are converted after the copy, which halves the bytes to copy.
        if self._pin and not distance.is_cuda:
            distance = distance.pin_memory()
        frames = frames.to(self.device, non_blocking=True).to(self.dtype)
        return batch_of(frames, distance.to(self.device, non_blocking=True))


def batch_of(frames: Tensor, distance: Tensor) -> FlowBatch:
    """A batch from its frames [(k + 2) b, c, h, w] (all targets, all newest frames, ..., all conditions)."""
    target, *newest, condition = frames.chunk(len(frames) // len(distance))
    return FlowBatch(target=target, reference=torch.cat(newest, dim=1), condition=condition, distance=distance)
