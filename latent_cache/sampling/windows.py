"""The order in which a split larger than memory is read: groups of chunks, windows of groups, epochs."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from latent_cache.errors import StoreError
from latent_cache.reading.reader import LatentCache
from latent_cache.sampling.draws import LegalTargets

MIN_GROUPS = 4  # per window, if the split has as many


DESIRED_GROUPS = 6  # per window, before groups get more than one chunk


MAX_GROUP_CHUNKS = 16  # beyond this a halo costs almost nothing, and more groups mix better


HALO_SHARE = 16  # kept halos use at most a sixteenth of the memory budget


ROUNDS = 16  # of `permute`; with 8, the orders of five or seven numbers are visibly not uniform


@dataclass(frozen=True, eq=False)
class Window:
    """Groups that are in memory together, each in its slot of a buffer [frame, c, h, w].

    Attributes:
        number: windows are counted through all epochs.
        groups: [k] int64 in ascending order.
        targets: [k + 1] int64 number of targets in the groups before each group.
        first_pairs: [k] int64 first legal pair of each group.
        shifts: [k] int64 row in the buffer minus frame number in the split.
        key: key of the permutation in which the targets are served.
    """

    number: int
    groups: np.ndarray
    targets: np.ndarray
    first_pairs: np.ndarray
    shifts: np.ndarray
    key: np.ndarray

    def pairs(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The legal pairs [n] at the given places of the window's order, and the shifts [n] of their groups."""
        served = permute(places, int(self.targets[-1]), self.key)
        group = np.searchsorted(self.targets, served, side="right") - 1
        return self.first_pairs[group] + served - self.targets[group], self.shifts[group]


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """The content of each window of each epoch, computed from the seed without any state.

    The split is divided into groups of consecutive whole chunks. Each epoch reads all groups in its own random order,
    one window at a time; a window serves each of its targets once, in its own random order. A group's slot has room
    for its halo before its first frame: frames in earlier chunks that can be references or conditions of the group's
    first targets.

    Two windows (one is served while the other is read) fill the memory budget, except for the halos of all groups,
    which are kept once they have been read, if they are small. A window has at least half as many groups as fit.

    Args:
        cache: the split.
        legal: its legal targets, at least one.
        seed: seed of the run, >= 0.
        clip_frames: >= 3.
        memory_budget: bytes.
    Raises:
        StoreError: the budget is too small for two windows of four groups of one chunk.
    """

    cache: LatentCache
    legal: LegalTargets
    seed: int
    clip_frames: int
    memory_budget: int

    def __post_init__(self) -> None:
        if self.memory_budget < (needed := self._least_bytes):
            least = self._least_chunks
            raise StoreError(
                f"{self.cache.url}, split {self.cache.split!r}: cache.memory_budget is {self.memory_budget} bytes, but "
                f"streaming needs at least {needed} (two windows of {least} chunks of {self.chunk_frames} frames, and "
                f"{self.halo_frames} frames before each): set cache.memory_budget='{-(-needed // 2**20)} MiB' or more, "
                "or encode again with smaller cache.chunk_frames"
            )

    @property
    def chunk_frames(self) -> int:
        """Frames per chunk."""
        return self.cache.latent_reader.chunk_frames

    @cached_property
    def halo_frames(self) -> int:
        """Frames before a group that fit in its slot."""
        return min(self.clip_frames, int(self.cache.lengths.max())) - 1

    @cached_property
    def group_chunks(self) -> int:
        """Chunks per group; the last group may have fewer."""
        fitting = (self._window_frames // DESIRED_GROUPS - self.halo_frames) // self.chunk_frames
        return max(1, min(fitting, MAX_GROUP_CHUNKS))

    @property
    def slot_frames(self) -> int:
        """Rows of the buffer per group."""
        return self.halo_frames + self.group_chunks * self.chunk_frames

    @property
    def buffer_frames(self) -> int:
        """Rows of the buffer of a window."""
        return min(self._window_frames // self.slot_frames, len(self._groups)) * self.slot_frames

    @cached_property
    def windows_per_epoch(self) -> int:
        """Windows per epoch; if it is 1, the windows of all epochs have the same groups."""
        return -(-len(self._groups) * self.slot_frames // self.buffer_frames)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers (two, or one if all groups fit into one) and of the kept halos."""
        return min(2, self.windows_per_epoch) * self.buffer_frames * self._frame_bytes + self._kept_bytes

    @property
    def keeps_halos(self) -> bool:
        """Whether the halos of all groups are kept in memory, so that only the first epoch reads them.

        If so, each halo is within the chunk before its group.
        """
        return self._kept_bytes > 0

    def chunks(self, group: int) -> range:
        """The chunks of a group."""
        first = group * self.group_chunks
        return range(first, min(first + self.group_chunks, -(-self.cache.frames // self.chunk_frames)))

    def halo(self, group: int) -> range:
        """Frames directly before a group that samples of its targets may contain."""
        start = group * self.group_chunks * self.chunk_frames
        stop = min(start + self.group_chunks * self.chunk_frames, self.cache.frames)
        video = int(np.searchsorted(self.cache.offsets, start, side="right")) - 1
        first, last = self.cache.offsets[video : video + 2]
        target = max(start, int(first) + 2)  # first legal target of the video that continues into the group
        if target >= min(stop, int(last)):
            return range(start, start)
        return range(min(start, max(int(first), target - (self.clip_frames - 1))), start)

    def window(self, number: int) -> Window:
        """The window with this number, >= 0."""
        epoch, place = divmod(number, self.windows_per_epoch)
        bounds = self._group_bounds[place : place + 2]
        groups = np.sort(self._order(epoch)[bounds[0] : bounds[1]])
        counts = self._pair_bounds[groups + 1] - self._pair_bounds[groups]
        slots = np.arange(len(groups)) * self.slot_frames + self.halo_frames
        return Window(
            number=number,
            groups=groups,
            targets=np.concatenate([[0], np.cumsum(counts)]),
            first_pairs=self._pair_bounds[groups],
            shifts=slots - groups * (self.group_chunks * self.chunk_frames),
            key=self._entropy("order of targets", epoch, place).generate_state(ROUNDS, np.uint64),
        )

    def segments(self, start: int, stop: int) -> Iterator[tuple[Window, np.ndarray]]:
        """The windows that serve samples `start` to `stop` (excluded) of the run, and the samples' places in each.

        Places are [n] int64, in the order of the samples.
        """
        while start < stop:
            epoch, sample = divmod(start, self.legal.count)
            order = self._order(epoch)
            counts = (self._pair_bounds[order + 1] - self._pair_bounds[order]).cumsum()
            ends = counts[self._group_bounds[1:] - 1]
            place = int(np.searchsorted(ends, sample, side="right"))
            window = self.window(epoch * self.windows_per_epoch + place)
            size = int(window.targets[-1])
            first = sample - (int(ends[place]) - size)
            count = min(stop - start, size - first)
            yield window, np.arange(first, first + count)
            start += count

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(self._entropy("order of groups", epoch))).permutation(self._groups)

    def _entropy(self, stream: str, *numbers: int) -> np.random.SeedSequence:
        return np.random.SeedSequence([self.seed, zlib.crc32(stream.encode()), *numbers])

    @property
    def _frame_bytes(self) -> int:
        return prod(self.cache.latent_shape) * self.cache.latents.dtype.itemsize

    @property
    def _least_chunks(self) -> int:
        """Number of one-chunk groups that must fit in a window."""
        return min(MIN_GROUPS, -(-self.cache.frames // self.chunk_frames))

    @property
    def _least_bytes(self) -> int:
        """The smallest possible memory budget: two minimal windows and no kept halos."""
        return 2 * self._least_chunks * (self.chunk_frames + self.halo_frames) * self._frame_bytes

    @cached_property
    def _kept_bytes(self) -> int:
        most = -(-self.cache.frames // self.chunk_frames) * self.halo_frames * self._frame_bytes
        small = self.halo_frames <= self.chunk_frames and most <= self.memory_budget // HALO_SHARE
        return most if small and self.memory_budget - most >= self._least_bytes else 0

    @property
    def _window_frames(self) -> int:
        return (self.memory_budget - self._kept_bytes) // (2 * self._frame_bytes)

    @cached_property
    def _pair_bounds(self) -> np.ndarray:
        """[groups + 1] int64 first legal pair of each group."""
        starts = np.arange(0, self.cache.frames, self.group_chunks * self.chunk_frames)
        return self.legal.before(np.append(starts, self.cache.frames))

    @cached_property
    def _groups(self) -> np.ndarray:
        """Groups with at least one target."""
        return np.flatnonzero(np.diff(self._pair_bounds))

    @cached_property
    def _group_bounds(self) -> np.ndarray:
        """[windows + 1] int64 where the windows of an epoch begin in its order of groups, as even as possible."""
        windows = self.windows_per_epoch
        return np.arange(windows + 1) * len(self._groups) // windows


def permute(numbers: np.ndarray, count: int, key: np.ndarray) -> np.ndarray:
    """Apply a pseudorandom permutation of 0 .. count - 1 to some of the numbers.

    A Feistel network over the next power of two, repeated until the result is below `count` (cycle walking; Black and
    Rogaway 2002). Any few results look independent and uniform; not all count! permutations have a key.

    Args:
        numbers: [n] int64 in 0 .. count - 1.
        count: >= 1.
        key: [ROUNDS] uint64.
    Returns:
        [n] int64 in 0 .. count - 1; different numbers have different results.
    """
    assert key.shape == (ROUNDS,), key.shape
    bits = max(2, (count - 1).bit_length())
    result = _feistel(numbers.astype(np.uint64), bits, key)
    outside = np.flatnonzero(result >= count)
    while outside.size:  # a cycle that begins below count returns there
        result[outside] = _feistel(result[outside], bits, key)
        outside = outside[result[outside] >= count]
    return result.astype(np.int64)


def _feistel(numbers: np.ndarray, bits: int, key: np.ndarray) -> np.ndarray:
    low_bits = np.uint64(bits // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << (np.uint64(bits) - low_bits)) - np.uint64(1)
    low, high = numbers & low_mask, numbers >> low_bits
    for number, round_key in enumerate(key):
        if number % 2:
            low ^= _mix(high, round_key) & low_mask
        else:
            high ^= _mix(low, round_key) & high_mask
    return high << low_bits | low


_ODD = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of the finalizer of splitmix64


_SHIFT = np.uint64(31)


def _mix(words: np.ndarray, key: np.uint64) -> np.ndarray:
    mixed = (words + key) * _ODD[0]  # arrays of unsigned integers wrap around silently
    mixed ^= mixed >> _SHIFT
    mixed *= _ODD[1]
    mixed ^= mixed >> _SHIFT
    return mixed
