"""Where a split's latents lie during training: the choice of a sampler by size and free memory."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from latent_cache.errors import StoreError
from latent_cache.reading.reader import LatentCache
from latent_cache.sampling.resident import ResidentSampler
from latent_cache.sampling.sampler import Sampler, Tier
from latent_cache.sampling.streaming import StreamingSampler

# Of the memory that is free: on a GPU the network, its optimizer and its activations come after the latents.
USABLE_FRACTION = {"device": 0.5, "host": 0.7}


@dataclass(frozen=True)
class Residency:
    """A tier, and in words why it was chosen."""

    tier: Tier
    why: str


def open_sampler(
    cache: LatentCache,
    device: torch.device | str,
    seed: int,
    batch_size: int,
    clip_frames: int,
    *,
    residency: Literal["auto", "device", "host", "stream"],
    memory_budget: int,
    dtype: torch.dtype = torch.float32,
    past_horizon: int | None = None,
) -> Sampler:
    """The sampler of a split in the tier that is wanted, or the fastest that fits. Close it after use.

    Args:
        cache: the split.
        device: where batches go.
        seed: >= 0, of the run.
        batch_size: rows of the global batch, over all processes.
        clip_frames: frames of a training clip, >= 3: no condition lies further back.
        residency: see `choose_residency`.
        memory_budget: bytes of host memory that the `stream` tier may take for latents.
        dtype: of the batches.
        past_horizon: see `Sampler`.
    Raises:
        ValueError: sizes out of range.
        StoreError: the split doesn't fit where it is wanted; no video has three frames.
        CorruptStoreError: the split cannot be read.
    """
    chosen = choose_residency(cache, device, residency)
    if chosen.tier == "stream":
        sampler = StreamingSampler(cache, device, seed, batch_size, clip_frames, memory_budget, dtype, past_horizon)
        free = free_memory(torch.device("cpu"))
        if sampler.plan.nbytes > free:
            sampler.close()
            raise StoreError(
                f"{cache.url}, split {cache.split!r}: streaming takes {_gib(sampler.plan.nbytes)} at this "
                f"cache.memory_budget, and the host has {_gib(free)} free: lower cache.memory_budget, or free some"
            )
    else:
        storage = device if chosen.tier == "device" else "cpu"
        sampler = ResidentSampler(cache, device, seed, batch_size, clip_frames, dtype, storage, past_horizon)
    sampler.why = chosen.why
    return sampler


def choose_residency(
    cache: LatentCache, device: torch.device | str, wanted: Literal["auto", "device", "host", "stream"]
) -> Residency:
    """Where a split's latents should lie during training.

    Args:
        wanted: `auto` takes the device if they fit into half of its free memory, else the host if they fit into 70 %
            of its free memory, else streams them.
    Raises:
        StoreError: `device` or `host` is wanted, and they don't fit there.
    """
    if wanted == "stream":
        return Residency("stream", "cache.residency = 'stream'")
    free = {"device": free_memory(torch.device(device)), "host": free_memory(torch.device("cpu"))}
    for place in ("device", "host") if wanted == "auto" else (wanted,):
        if cache.nbytes <= USABLE_FRACTION[place] * free[place]:
            why = f"fits into {USABLE_FRACTION[place]:.0%} of the {_gib(free[place])} free"
            return Residency(place, why if wanted == "auto" else f"cache.residency = {wanted!r}")
    sizes = ", ".join(f"{place}: {_gib(size)}" for place, size in free.items())
    if wanted == "auto":
        return Residency("stream", f"larger than the part of the free memory that is used, {sizes}")
    raise StoreError(
        f"{cache.url}, split {cache.split!r}: cache.residency = {wanted!r}, but the latents take "
        f"{_gib(cache.nbytes)}, and of the free memory ({sizes}) at most {USABLE_FRACTION['device']:.0%} of "
        f"the device's and {USABLE_FRACTION['host']:.0%} of the host's is used: free some, or choose another "
        "residency, such as cache.residency=stream, which reads the latents in parts"
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


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
