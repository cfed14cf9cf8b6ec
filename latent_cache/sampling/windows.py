"""The order in which a split that is larger than memory is visited: groups of chunks, windows of groups, epochs."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from latent_cache.errors import StoreError
from latent_cache.reading.reader import LatentCache
from latent_cache.sampling.draws import LegalTargets

MIN_GROUPS = 4  # in a window, or fewer in a split that has fewer


WANTED_GROUPS = 6  # so many a window, before groups have more than one chunk


MAX_GROUP_CHUNKS = 16  # beyond that the halo costs next to nothing, and more groups mix better


HALO_SHARE = 16  # of the memory budget, at most a sixteenth is for halos that are kept


ROUNDS = 16  # with 8, the orders of five or seven things are visibly not alike frequent


@dataclass(frozen=True, eq=False)
class Window:
    """Groups that lie in memory together, each in its slot of a buffer [frame, c, h, w].

    Attributes:
        number: windows are counted through all epochs.
        groups: [k] int64 in ascending order.
        targets: [k + 1] int64, of the window in groups before each.
        first_pairs: [k] int64, the first legal pair of each group.
        shifts: [k] int64, row in the buffer minus frame number in the split.
        key: of the order in which the targets are served.
    """

    number: int
    groups: np.ndarray
    targets: np.ndarray
    first_pairs: np.ndarray
    shifts: np.ndarray
    key: np.ndarray

    def pairs(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The legal pairs [n] at some places of the window's order, and the shifts [n] of their groups."""
        served = permute(places, int(self.targets[-1]), self.key)
        group = np.searchsorted(self.targets, served, side="right") - 1
        return self.first_pairs[group] + served - self.targets[group], self.shifts[group]


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """What each window of each epoch holds, by arithmetic from the seed: nothing is carried along.

    The split is cut into groups of consecutive whole chunks. An epoch visits all of them in an order of its own, a
    window at a time; a window serves each of its targets once, in an order of its own. A group's slot has room before
    its first frame for its halo: the frames of the same video that references and conditions of its first targets
    are among, and that lie in the chunks before.

    Two windows (the one that is served and the one that is read) fill the memory budget, but for the halos of all
    groups, which are kept once they were read, if they are small. A window has at least half as many groups as fit.

    Args:
        cache: the split; `legal`: its targets, at least one.
        seed: >= 0, of the run.
        clip_frames: >= 3.
        memory_budget: bytes.
    Raises:
        StoreError: the budget cannot hold two windows of four groups of one chunk.
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
        """Frames of a chunk."""
        return self.cache.latent_reader.chunk_frames

    @cached_property
    def halo_frames(self) -> int:
        """Frames before a group for which its slot has room."""
        return min(self.clip_frames, int(self.cache.lengths.max())) - 1

    @cached_property
    def group_chunks(self) -> int:
        """Chunks of a group; the last one may have fewer."""
        fitting = (self._window_frames // WANTED_GROUPS - self.halo_frames) // self.chunk_frames
        return max(1, min(fitting, MAX_GROUP_CHUNKS))

    @property
    def slot_frames(self) -> int:
        """Rows of the buffer that belong to one group."""
        return self.halo_frames + self.group_chunks * self.chunk_frames

    @property
    def buffer_frames(self) -> int:
        """Rows of a window's buffer."""
        return min(self._window_frames // self.slot_frames, len(self._groups)) * self.slot_frames

    @cached_property
    def windows_per_epoch(self) -> int:
        """Windows in an epoch; with one, every epoch's window has the same groups."""
        return -(-len(self._groups) * self.slot_frames // self.buffer_frames)

    @property
    def nbytes(self) -> int:
        """Memory of the buffers (two, or one when all groups fit into it) and of the halos that are kept."""
        return min(2, self.windows_per_epoch) * self.buffer_frames * self._frame_bytes + self._kept_bytes

    @property
    def keeps_halos(self) -> bool:
        """Whether the halos of all groups may stay in memory, so that only the first epoch reads for them.

        If so, each lies within the chunk before its group.
        """
        return self._kept_bytes > 0

    def chunks(self, group: int) -> range:
        """The chunks of a group."""
        first = group * self.group_chunks
        return range(first, min(first + self.group_chunks, -(-self.cache.frames // self.chunk_frames)))

    def halo(self, group: int) -> range:
        """Frames before a group, the last of them its neighbour, that its targets' samples may be made of."""
        start = group * self.group_chunks * self.chunk_frames
        stop = min(start + self.group_chunks * self.chunk_frames, self.cache.frames)
        video = int(np.searchsorted(self.cache.offsets, start, side="right")) - 1
        first, last = self.cache.offsets[video : video + 2]
        target = max(start, int(first) + 2)  # the first of the video that began before
        if target >= min(stop, int(last)):
            return range(start, start)
        return range(min(start, max(int(first), target - (self.clip_frames - 1))), start)

    def window(self, number: int) -> Window:
        """The window of that number, >= 0."""
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
        """The windows that samples `start` to `stop` (excluded) of the run are served from, and their places in each.

        Places are [n] int64; the samples of all of them, in order, are those that were asked for.
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
        """Groups of one chunk that a window must have room for."""
        return min(MIN_GROUPS, -(-self.cache.frames // self.chunk_frames))

    @property
    def _least_bytes(self) -> int:
        """The smallest memory budget: two windows of the fewest chunks, and no halo is kept."""
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
        """[groups + 1] int64, the first legal pair of each group."""
        starts = np.arange(0, self.cache.frames, self.group_chunks * self.chunk_frames)
        return self.legal.before(np.append(starts, self.cache.frames))

    @cached_property
    def _groups(self) -> np.ndarray:
        """Those that hold a target."""
        return np.flatnonzero(np.diff(self._pair_bounds))

    @cached_property
    def _group_bounds(self) -> np.ndarray:
        """[windows + 1] int64, where in an epoch's order its windows begin: as even as can be."""
        windows = self.windows_per_epoch
        return np.arange(windows + 1) * len(self._groups) // windows


def permute(numbers: np.ndarray, count: int, key: np.ndarray) -> np.ndarray:
    """Where some of the numbers 0 .. count - 1 go in the permutation that a key stands for.

    A Feistel network over the next power of two, walked along its cycle until it comes out below `count` (Black and
    Rogaway 2002). Any few places look independent and uniform; not every one of the count! permutations has a key.

    Args:
        numbers: [n] int64 in 0 .. count - 1.
        count: >= 1.
        key: [ROUNDS] uint64.
    Returns:
        [n] int64 in 0 .. count - 1; all of 0 .. count - 1 in some order, if `numbers` are.
    """
    assert key.shape == (ROUNDS,), key.shape
    bits = max(2, (count - 1).bit_length())
    result = _feistel(numbers.astype(np.uint64), bits, key)
    outside = np.flatnonzero(result >= count)
    while outside.size:  # each walk of the cycle leads back inside, for it began there
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


_ODD = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64's finaliser


_SHIFT = np.uint64(31)


def _mix(words: np.ndarray, key: np.uint64) -> np.ndarray:
    mixed = (words + key) * _ODD[0]  # arrays of unsigned integers wrap around without a warning
    mixed ^= mixed >> _SHIFT
    mixed *= _ODD[1]
    mixed ^= mixed >> _SHIFT
    return mixed
