"""Batches from a split that is larger than memory: one window of it is served while the next one is read."""

import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latent_cache.reading.reader import LatentCache
from latent_cache.sampling.draws import draw_past, past_offsets, steps_per_block, uniform_block
from latent_cache.sampling.sampler import FlowBatch, Sampler
from latent_cache.sampling.windows import Window, WindowPlan


class StreamingSampler(Sampler):
    """Serves every legal target exactly once per epoch, in an order that is shuffled twice (see `WindowPlan`).

    Epoch, window and place of sample number step * batch_size + row follow by arithmetic, so any step reads only its
    own window, and resuming at any step is exact. The draws of a step depend on the seed, the batch size, clip_frames,
    past_horizon, the store's chunks and the memory budget: another budget means another order, which is as random. The
    first batch waits for its window; from then on the next window is read while one is served.

    Memory: two windows, which are at most the budget, and for the draws 12 bytes per video and about 3 MB. (Chunks of
    remote stores are read through zarr, which needs more memory for the few that are read at the same time.) Every
    process of a distributed training reads the same windows itself.

    Args:
        memory_budget: bytes.
        Others: as `Sampler`.
    Raises:
        StoreError: the budget is too small for the store's chunks; also, like ValueError, as `Sampler`.
        CorruptStoreError: a chunk's file is missing or has the wrong size. Damage within a file is found when it is
            read, and raised by `batch`.
    """

    tier = "stream"

    def __init__(
        self,
        cache: LatentCache,
        device: torch.device | str,
        seed: int,
        batch_size: int,
        clip_frames: int,
        memory_budget: int,
        dtype: torch.dtype = torch.float32,
        past_horizon: int | None = None,
        recent_frames: int = 1,
    ) -> None:
        super().__init__(cache, device, seed, batch_size, clip_frames, dtype, past_horizon, recent_frames)
        # With a horizon, a sample spans few frames before its target: fewer have to be read before a group.
        reach = clip_frames if past_horizon is None else min(clip_frames, max(past_horizon, recent_frames) + 1)
        self.plan = WindowPlan(cache, self._legal, seed, reach, memory_budget)
        cache.latent_reader.check_files()
        # At most an epoch, so that a block of a small split does not consist of thousands of windows.
        self._block_steps = steps_per_block(batch_size, self.legal_targets)
        self._block: _Block | None = None
        self._lock = threading.Lock()
        self._threads = ReadingThreads(min(4, os.cpu_count() or 1), "latents")
        self._buffers: list[Tensor | None] = [None, None]
        self._loads: list[_Load | None] = [None, None]
        self._halos: dict[int, np.ndarray] = {}  # by group, once they have been read
        self._served = 0  # index of the last window's buffer
        self._closed = False

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> FlowBatch:
        """As `Sampler.batch`; waits until the window of the step has been read.

        Raises:
            CorruptStoreError: a chunk of the window is missing or damaged; names its file and its videos.
            ValueError: as `Sampler.batch`, or the sampler is closed.
        """
        rows = self._rows(step, rank, world_size)
        block = self._drawn(step // self._block_steps)
        place = step % self._block_steps * self.batch_size
        start, stop = place + rows.start, place + rows.stop
        shape = (len(block.rows), stop - start, *self._cache.latent_shape)
        frames = torch.empty(shape, dtype=_torch_dtype(self._cache), pin_memory=self._pin)
        with self._lock:
            for segment in block.segments:
                first, last = max(start, segment.start), min(stop, segment.stop)
                if first >= last:
                    continue
                window = self._window(segment.window)
                for out, numbers in zip(
                    frames[:, first - start : last - start], block.rows[:, first:last], strict=True
                ):
                    torch.index_select(window, 0, torch.from_numpy(numbers), out=out)
        # A copy: the caller may change its batch, but not the draws.
        return self._to_batch(frames.flatten(0, 1), torch.from_numpy(block.distance[start:stop].copy()))

    def targets(self, step: int) -> np.ndarray:
        """As `Sampler.targets`."""
        block, place = self._drawn(step // self._block_steps), step % self._block_steps * self.batch_size
        return block.target[place : place + self.batch_size]

    @property
    def order(self) -> str:
        """As `Sampler.order`; it depends on the memory budget, which determines the windows."""
        plan = self.plan
        return f"streamed in windows of {plan.buffer_frames} frames, groups of {plan.group_chunks} chunks"

    def describe(self) -> str:
        """As `Sampler.describe`."""
        plan = self.plan
        return (
            f"{self._cache.nbytes / 1e6:.0f} MB of latents streamed through {plan.nbytes / 1e6:.0f} MB of host memory, "
            f"{plan.windows_per_epoch} windows per epoch, {plan.group_chunks} chunks per group"
            f"{self.why and f' ({self.why})'}"
        )

    def close(self) -> None:
        """As `Sampler.close`."""
        with self._lock:
            self._closed = True
            for load in self._loads:
                if load is not None:
                    load.cancel()
            self._threads.close()
            self._loads, self._buffers, self._block = [None, None], [None, None], None

    def _drawn(self, number: int) -> "_Block":
        """The draws of a block. Threads may call this at the same time; at worst each draws the block itself."""
        block = self._block
        if block is None or block.number != number:
            self._block = block = self._draw(number)
        return block

    def _draw(self, number: int) -> "_Block":
        samples = self._block_steps * self.batch_size
        segments, pairs, shifts = [], [], []
        start = 0
        for window, places in self.plan.segments(number * samples, (number + 1) * samples):
            segments.append(_Segment(start, start + len(places), window.number))
            start += len(places)
            for parts, values in zip((pairs, shifts), window.pairs(places), strict=True):
                parts.append(values)
        place_in_video, target = self._legal.locate(np.concatenate(pairs))
        uniform = uniform_block(self.seed, "conditions", number, (2, samples))
        place, distance = draw_past(uniform[0], uniform[1], place_in_video, self.clip_frames, self.past_horizon)
        rows = target + np.concatenate(shifts) + past_offsets(place, distance, self.recent_frames)
        return _Block(number, target, rows, distance, segments)

    def _window(self, number: int) -> Tensor:
        """The buffer of a window, read if necessary; starts to read the next window into the other buffer."""
        if self._closed:
            raise ValueError("the sampler is closed")
        # With one window per epoch, all windows have the same content.
        several = self.plan.windows_per_epoch > 1
        content = number if several else 0
        held = [load is not None and load.content == content for load in self._loads]
        place = held.index(True) if any(held) else 1 - self._served if several else 0
        if not any(held):
            self._load(place, content)
        try:
            self._loads[place].finish()
        except BaseException as error:
            if isinstance(error, Exception):  # not when a signal interrupted the waiting
                self._loads[place].cancel()
                self._loads[place] = None  # the next call reads it again
            raise
        self._served = place
        ahead = self._loads[1 - place]
        if several and (ahead is None or ahead.content != content + 1):
            self._load(1 - place, content + 1)
        return self._buffers[place]

    def _load(self, place: int, number: int) -> None:
        """Start to read a window into a buffer."""
        if self._loads[place] is not None:
            self._loads[place].cancel()
        if self._buffers[place] is None:
            shape = (self.plan.buffer_frames, *self._cache.latent_shape)
            # Allocated by numpy, which requests huge pages.
            self._buffers[place] = torch.from_numpy(np.empty(shape, self._cache.latents.dtype))
        self._loads[place] = load = _Load(number)
        window = self.plan.window(number)
        buffer = self._buffers[place].numpy()
        for slot, group in enumerate(window.groups.tolist()):
            for chunk in self.plan.chunks(group):
                load.parts.append(self._threads.submit(self._read, window, buffer, slot, chunk))

    def _read(self, window: Window, buffer: np.ndarray, slot: int, chunk: int) -> None:
        """Read a chunk to its place in the buffer; with the first chunk of a group, also read the group's halo."""
        reader, size, shift = self._cache.latent_reader, self.plan.chunk_frames, int(window.shifts[slot])
        start, stop = chunk * size, min((chunk + 1) * size, self._cache.frames)
        group = int(window.groups[slot])
        chunks = self.plan.chunks(group)
        if chunk == chunks[0]:
            halo = self.plan.halo(group)
            before = buffer[halo.start + shift : halo.stop + shift]
            if group in self._halos:
                before[:] = self._halos[group]
            else:
                # Earlier chunks are read and checked as a whole, in the place of the group's own chunk.
                whole = buffer[start + shift : start + size + shift]
                for earlier in range(halo.start // size, chunk) if halo else ():
                    reader.read_chunk(earlier, whole)
                    first = max(halo.start, earlier * size)
                    buffer[first + shift : (earlier + 1) * size + shift] = whole[first - earlier * size :]
                self._keep(group, before)
        reader.read_chunk(chunk, buffer[start + shift : stop + shift])
        if chunk == chunks[-1] and stop < self._cache.frames:
            halo = self.plan.halo(group + 1)
            self._keep(group + 1, buffer[halo.start + shift : halo.stop + shift])

    def _keep(self, group: int, halo: np.ndarray) -> None:
        if self.plan.keeps_halos and group not in self._halos:
            self._halos[group] = halo.copy()


class _Segment(NamedTuple):
    """Samples `start` to `stop` (excluded) of a block, which are served from one window."""

    start: int
    stop: int
    window: int


@dataclass(frozen=True, eq=False)
class _Block:
    """Draws of a block of steps, n samples.

    Attributes:
        target: [n] int64 frame numbers in the split.
        rows: [k + 2, n] int64 rows in the window's buffer, see `past_offsets`.
        distance: [n] int64.
    """

    number: int
    target: np.ndarray
    rows: np.ndarray
    distance: np.ndarray
    segments: list[_Segment]


@dataclass(eq=False)
class _Load:
    """The reading of a window into a buffer: one task per chunk."""

    content: int
    parts: list[Future[None]] = field(default_factory=list)

    def finish(self) -> None:
        """Wait for all tasks; raise the first error."""
        for part in self.parts:
            part.result()

    def cancel(self) -> None:
        """Cancel all tasks that have not started, and wait until none writes into the buffer."""
        for part in self.parts:
            part.cancel()
        wait(self.parts)


_Task = tuple[Future[None], Callable[..., None], tuple[Any, ...]] | None


class ReadingThreads:
    """A pool of threads, started at the first task.

    Not a ThreadPoolExecutor, which waits for all queued tasks at the end of the program.

    Args:
        count: number of threads.
        name: prefix of their names.
    """

    def __init__(self, count: int, name: str) -> None:
        self._tasks: SimpleQueue[_Task] = SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._tasks,), name=f"{name}-{number}", daemon=True)
            for number in range(count)
        ]
        # The threads refer to the queue only, so a sampler that is not closed can be collected, which ends its threads.
        self._end = weakref.finalize(self, _end, self._tasks, count)
        self._end.atexit = False
        self._started = False

    def submit(self, task: Callable[..., None], *arguments: Any) -> Future[None]:
        """Queue a task."""
        if not self._started:
            self._started = True
            for thread in self._threads:
                thread.start()
        future: Future[None] = Future()
        self._tasks.put((future, task, arguments))
        return future

    def close(self) -> None:
        """Wait for all tasks and stop the threads. Safe to call twice; no task may follow."""
        self._end()
        if self._started:
            for thread in self._threads:
                thread.join()


def _work(tasks: "SimpleQueue[_Task]") -> None:
    while (next_task := tasks.get()) is not None:
        future, task, arguments = next_task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(task(*arguments))
            except BaseException as error:  # raised by future.result()
                future.set_exception(error)
        del next_task, future, task, arguments  # a waiting thread must not keep a sampler alive


def _end(tasks: "SimpleQueue[_Task]", count: int) -> None:
    for _ in range(count):
        tasks.put(None)


def _torch_dtype(cache: LatentCache) -> torch.dtype:
    return torch.from_numpy(np.empty(0, cache.latents.dtype)).dtype
