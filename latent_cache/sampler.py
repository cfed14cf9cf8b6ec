"""Training batches from latents that fit in memory: what is drawn at a step depends on the seed and the step only."""

import os
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from latent_cache.errors import StoreError
from latent_cache.reader import LatentCache

# Of the memory that is free: on a GPU the network, its optimizer and its activations come after the latents.
USABLE_FRACTION = {"device": 0.5, "host": 0.7}
MIN_VIDEO_FRAMES = 3  # condition, reference, target


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


@dataclass(frozen=True)
class FlowIndices:
    """The rows of `FlowBatch` as frame numbers in the split, each [b] int64 on the CPU."""

    target: Tensor
    reference: Tensor
    condition: Tensor
    distance: Tensor


def step_generator(seed: int, step: int, device: torch.device | str = "cpu", stream: str = "step") -> torch.Generator:
    """A generator for the draws of one step, which is all that decides them.

    Args:
        seed: >= 0, of the run; `step`: >= 0.
        device: where the draws are made; a CPU and a GPU draw different numbers.
        stream: what is drawn. Draws of one step from one stream are the same numbers, so noise must not share the
            stream that chose the frames.
    Raises:
        ValueError: a negative seed or step.
    """
    if seed < 0 or step < 0:
        raise ValueError(f"seed = {seed}, step = {step}: both must be >= 0")
    # torch's CPU generator looks at the low 32 bits of a seed only. Hashing the step into them would give two steps
    # of a run the same draws after some 10^5 steps (birthdays), a bijection of the step never does.
    tag = zlib.crc32(stream.encode())
    low = _scramble((step + _stream_offset(seed, tag)) % 2**32)
    high = int(np.random.SeedSequence([seed, tag, step]).generate_state(1)[0])
    return torch.Generator(device=device).manual_seed(high << 32 | low)


@lru_cache(maxsize=256)
def _stream_offset(seed: int, tag: int) -> int:
    return int(np.random.SeedSequence([seed, tag]).generate_state(1)[0])


def _scramble(word: int) -> int:
    """MurmurHash3's finaliser: a bijection of 32-bit words in which every bit depends on all."""
    word = ((word ^ word >> 16) * 0x85EBCA6B) % 2**32
    word = ((word ^ word >> 13) * 0xC2B2AE35) % 2**32
    return word ^ word >> 16


class ResidentSampler:
    """Draws batches from a split that lies in memory whole.

    A row is drawn so (section 2 of the method, for videos of any length): the target uniformly over all legal
    (video, target frame) pairs, legal meaning that two frames come before it; its place p in a clip ~ U{2 ..
    min(clip_frames - 1, target)}; the condition ~ U{target - p .. target - 2}; the reference is target - 1.

    Args:
        cache: the split.
        device: where batches go.
        seed: >= 0, of the run.
        batch_size: rows of the global batch, over all processes.
        clip_frames: frames of a training clip, >= 3: no condition lies further back.
        dtype: of the batches.
        storage_device: where the latents lie; the same as `device`, or the CPU. See `choose_residency`.
    Raises:
        ValueError: sizes out of range.
        StoreError: no video has three frames.
        CorruptStoreError: the split cannot be read.
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
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: at least 1 is wanted")
        if clip_frames < MIN_VIDEO_FRAMES:
            raise ValueError(f"clip_frames = {clip_frames}: at least {MIN_VIDEO_FRAMES} (condition, reference, target)")
        self.device = torch.device(device)
        self.storage_device = self.device if storage_device is None else torch.device(storage_device)
        if self.storage_device.type not in ("cpu", self.device.type):
            raise ValueError(f"storage_device = {self.storage_device}: the CPU or the device, {self.device}, is wanted")
        self.seed = seed
        self.batch_size = batch_size
        self.clip_frames = clip_frames
        self.dtype = dtype
        legal = np.maximum(cache.lengths - (MIN_VIDEO_FRAMES - 1), 0)
        if legal.sum() == 0:
            raise StoreError(
                f"{cache.url}, split {cache.split!r}: no video has the {MIN_VIDEO_FRAMES} frames of a sample; the "
                f"{len(legal)} videos have {cache.lengths.min()} to {cache.lengths.max()}: encode longer ones"
            )
        self._legal_offsets = np.concatenate([[0], np.cumsum(legal)])
        self._video_offsets = cache.offsets
        self._pin = self.device.type == "cuda"
        self._latents = cache.load().to(self.storage_device)

    @property
    def legal_targets(self) -> int:
        """Number of (video, target) pairs that can be drawn: samples in an epoch."""
        return int(self._legal_offsets[-1])

    def indices(self, step: int) -> FlowIndices:
        """The draws of a step for the whole global batch.

        They are made on the CPU wherever the latents lie, so that the same step has the same batch in every
        residency, and a run that resumes on another machine goes on as it was. They are 8 bytes a number, and their
        copy to a GPU waits for nothing.
        """
        generator = step_generator(self.seed, step, stream="frames")
        # 53 bits a number: float32 could not name one of 10^8 frames, and randint is biased by up to 1 % there.
        uniform = torch.rand((3, self.batch_size), generator=generator, dtype=torch.float64).numpy()
        pair = _to_integer(uniform[0], self._legal_offsets[-1])
        video = np.searchsorted(self._legal_offsets, pair, side="right") - 1  # right: steps over too short videos
        place_in_video = pair - self._legal_offsets[video] + (MIN_VIDEO_FRAMES - 1)
        place_in_clip = 2 + _to_integer(uniform[1], np.minimum(place_in_video, self.clip_frames - 1) - 1)
        distance = torch.from_numpy(1 + _to_integer(uniform[2], place_in_clip - 1))
        target = torch.from_numpy(place_in_video + self._video_offsets[video])
        return FlowIndices(target=target, reference=target - 1, condition=target - 1 - distance, distance=distance)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> FlowBatch:
        """The rows of the global batch of a step that belong to one process.

        Args:
            step: >= 0.
            rank: of the process, of `world_size`, which must divide the batch size.
        Returns:
            batch_size / world_size rows; those of all ranks in order are those of world_size 1.
        Raises:
            ValueError: ranks that don't fit.
        """
        if self.batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size = {self.batch_size}, rank {rank} of {world_size} processes: choose a batch size that the "
                "number of processes divides"
            )
        size = self.batch_size // world_size
        rows = slice(rank * size, (rank + 1) * size)
        drawn = self.indices(step)
        frames = self._gather(torch.cat([drawn.target[rows], drawn.reference[rows], drawn.condition[rows]]))
        target, reference, condition = frames.chunk(3)
        return FlowBatch(
            target=target, reference=reference, condition=condition, distance=self._to_device(drawn.distance[rows])
        )

    def _gather(self, frames: Tensor) -> Tensor:
        if self.storage_device.type != "cpu":
            return self._latents.index_select(0, self._to_device(frames)).to(self.dtype)
        # Gathered straight into pinned memory, and converted on the device: half the bytes on the way.
        gathered = torch.empty((len(frames), *self._latents.shape[1:]), dtype=self._latents.dtype, pin_memory=self._pin)
        # Rows copied one after the other: torch would wake its threads for a few hundred kilobytes. Indices are in
        # range by construction; `clip` only tells numpy that it need not copy twice to make sure.
        np.take(self._latents.numpy(), frames.numpy(), axis=0, out=gathered.numpy(), mode="clip")
        return gathered.to(self.device, non_blocking=True).to(self.dtype)

    def _to_device(self, values: Tensor) -> Tensor:
        # From ordinary memory a copy to a GPU would wait for all that the GPU has still to do.
        return (values.pin_memory() if self._pin else values).to(self.device, non_blocking=True)


def _to_integer(uniform: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Map float64 in [0, 1) to int64 in 0 .. limit - 1; the bias is below limit / 2^53."""
    return (uniform * limit).astype(np.int64)


def choose_residency(
    cache: LatentCache, device: torch.device | str, wanted: Literal["auto", "device", "host"]
) -> Literal["device", "host"]:
    """Where a split's latents should lie during training.

    Args:
        wanted: `auto` takes the device if they fit into half of its free memory, else the host.
    Raises:
        StoreError: they don't fit there.
    """
    free = {"device": free_memory(torch.device(device)), "host": free_memory(torch.device("cpu"))}
    for place in ("device", "host") if wanted == "auto" else (wanted,):
        if cache.nbytes <= USABLE_FRACTION[place] * free[place]:
            return place
    sizes = ", ".join(f"{place}: {size / 2**30:.1f} GiB" for place, size in free.items())
    raise StoreError(
        f"{cache.url}, split {cache.split!r}: cache.residency = {wanted!r}, but the latents take "
        f"{cache.nbytes / 2**30:.1f} GiB, and of the free memory ({sizes}) at most {USABLE_FRACTION['device']:.0%} of "
        f"the device's and {USABLE_FRACTION['host']:.0%} of the host's is used: free some, or choose another residency"
    )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; for the CPU within the limit of the container, if it has one."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))
