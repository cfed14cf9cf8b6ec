"""Where a split's latents are kept during training: the choice of a sampler by size and free memory."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from latent_cache.errors import StoreError
from latent_cache.reading.reader import LatentCache
from latent_cache.sampling.resident import ResidentSampler
from latent_cache.sampling.sampler import Sampler, Tier
from latent_cache.sampling.streaming import StreamingSampler

# Of the free memory: on a GPU the network, its optimizer and its activations are allocated after the latents.
USABLE_FRACTION = {"device": 0.5, "host": 0.7}


# Whether all processes of a training answer yes. A single process agrees with itself.
Agree = Callable[[bool], bool]


@dataclass(frozen=True)
class Residency:
    """A tier, and the reason for choosing it as text."""

    tier: Tier
    why: str


def _alone(answer: bool) -> bool:
    return answer


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
    recent_frames: int = 1,
    agree: Agree = _alone,
    sharing: int = 1,
) -> Sampler:
    """Open the sampler of a split in the requested tier, or in the fastest one that fits. Close it after use.

    All processes of a training open it at the same time: they use one tier, since tiers draw in different orders.

    Args:
        cache: the split.
        device: device of the batches.
        seed: seed of the run, >= 0.
        batch_size: rows of the global batch, over all processes.
        clip_frames: frames of a training clip, >= 3; conditions are within the clip.
        residency: see `choose_residency`.
        memory_budget: bytes of host memory that the `stream` tier may use for latents.
        dtype: dtype of the batches.
        past_horizon, recent_frames: see `Sampler`.
        agree, sharing: see `choose_residency`.
    Raises:
        ValueError: sizes out of range.
        StoreError: the split does not fit in the requested tier in every process, or no video has three frames.
        CorruptStoreError: the split cannot be read.
    """
    chosen = choose_residency(cache, device, residency, agree=agree, sharing=sharing)
    common = {"dtype": dtype, "past_horizon": past_horizon, "recent_frames": recent_frames}
    if chosen.tier == "stream":
        sampler = StreamingSampler(cache, device, seed, batch_size, clip_frames, memory_budget, **common)
        free = free_memory(torch.device("cpu")) // sharing
        fits = sampler.plan.nbytes <= free
        if not agree(fits):
            sampler.close()
            raise StoreError(
                f"{cache.url}, split {cache.split!r}: streaming needs {_gib(sampler.plan.nbytes)} with this "
                f"cache.memory_budget, but the host has {_gib(free)} free{_where(fits, sharing)}: lower "
                "cache.memory_budget, or free some"
            )
    else:
        storage = device if chosen.tier == "device" else "cpu"
        sampler = ResidentSampler(cache, device, seed, batch_size, clip_frames, storage_device=storage, **common)
    sampler.why = chosen.why
    return sampler


def choose_residency(
    cache: LatentCache,
    device: torch.device | str,
    requested: Literal["auto", "device", "host", "stream"],
    *,
    agree: Agree = _alone,
    sharing: int = 1,
) -> Residency:
    """Choose where to keep a split's latents during training: the same place in all its processes.

    Args:
        cache: the split.
        device: device of the batches.
        requested: a tier, or `auto`: the device if the latents fit into half of its free memory, otherwise the host if
            they fit into 70 % of its free memory, otherwise streaming.
        agree: answers whether all processes of the training say yes, each of which calls it equally often.
        sharing: number of processes on this machine, each of which keeps its own copy in the host's memory.
    Raises:
        StoreError: `device` or `host` is requested, but the latents do not fit there in every process.
    """
    if requested == "stream":
        return Residency("stream", "cache.residency = 'stream'")
    # Read before the first agreement, and so before any process has loaded its copy.
    device = torch.device(device)
    host = free_memory(torch.device("cpu")) // sharing
    free = {"device": host if device.type == "cpu" else free_memory(device), "host": host}
    for place in ("device", "host") if requested == "auto" else (requested,):
        fits = cache.nbytes <= USABLE_FRACTION[place] * free[place]
        if agree(fits):
            why = f"fits into {USABLE_FRACTION[place]:.0%} of {_gib(free[place])} free memory"
            return Residency(place, why if requested == "auto" else f"cache.residency = {requested!r}")
    sizes = ", ".join(f"{place}: {_gib(size)}" for place, size in free.items()) + _where(fits, sharing)
    if requested == "auto":
        return Residency("stream", f"does not fit into the usable part of the free memory, {sizes}")
    raise StoreError(
        f"{cache.url}, split {cache.split!r}: cache.residency = {requested!r}, but the latents need "
        f"{_gib(cache.nbytes)}, and at most {USABLE_FRACTION['device']:.0%} of the device's and "
        f"{USABLE_FRACTION['host']:.0%} of the host's free memory ({sizes}) is used: free some, or choose another "
        "residency, such as cache.residency=stream, which reads the latents in parts"
    )


def _where(fits: bool, sharing: int) -> str:
    """Which process's free memory is meant, where there are several."""
    return (" per process" if sharing > 1 else "") + (", and less in another process" if fits else "")


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device; for the CPU within the container's limit, if there is one."""
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
