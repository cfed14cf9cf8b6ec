"""Batches of single frames for training the autoencoder, from a bounded pool of decoded frames.

Decoding a video to use one of its frames would cost more than the training step. So training proceeds in rounds: a
round decodes frames of as many videos as fit into memory, once, and draws the batches of its steps from them.
Everything is a function of (seed, step), so that a resumed run sees the same batches.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from stage1_autoencoder.videos.source import BrokenVideoError, VideoError, VideoSource, VideoTable

# Largest mean number of times that a round uses a frame.
REPEATS = 4
# Fewer frames of more videos make better batches; more frames per video save decoding.
MIN_FRAMES_PER_VIDEO = 16
# Frames of a long video that one thread decodes at a time.
FRAMES_PER_PART = 4096


@dataclass(frozen=True)
class _Round:
    """Decoded frames [n, h, w, 3] uint8, and their origins (video, position) [n, 2]."""

    frames: np.ndarray
    origins: np.ndarray


class FramePool:
    """Serves uint8 batches [b, h, w, 3] of frames of one split, as a function of (seed, step)."""

    def __init__(
        self,
        source: VideoSource,
        *,
        batch_size: int,
        steps: int,
        memory: int,
        seed: int,
        on_broken: Callable[[BrokenVideoError], None],
    ) -> None:
        """Plan the rounds.

        Args:
            source: the videos of the split.
            steps: of the whole training; only frames that these need are decoded.
            memory: bytes of decoded frames, of the round in use and the next one, which is decoded meanwhile.
            on_broken: called with each video that cannot be decoded; frames of other videos replace its frames.
        """
        if not source.videos:
            raise ValueError("a frame pool needs at least one video")
        self.source, self.batch_size, self.seed, self.on_broken = source, batch_size, seed, on_broken
        self.lengths = VideoTable.of(source.videos).frames
        # Two rounds are in memory: the one in use and the one being decoded.
        self._fits = max(batch_size, memory // (2 * 3 * math.prod(source.dataset.frame_size)))
        self._executor = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1), thread_name_prefix="decode")
        self._next = ThreadPoolExecutor(max_workers=1, thread_name_prefix="round")
        self._rounds: dict[int, Future[_Round]] = {}
        self.set_steps(steps)

    def set_steps(self, steps: int) -> None:
        """Plan the rounds of a training of this many steps. What is decoded is kept if it is of use."""
        total, before = int(self.lengths.sum()), vars(self).get("frames_per_round")
        if total <= 2 * self._fits:
            self.frames_per_round, self.steps_per_round = min(total, steps * self.batch_size), steps
        else:
            self.frames_per_round = min(self._fits, steps * self.batch_size)
            self.steps_per_round = max(1, self.frames_per_round * REPEATS // self.batch_size)
        self.last_round = (steps - 1) // self.steps_per_round
        if self.frames_per_round != before:
            self._rounds.clear()

    def batch(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """The batch of a step, or some of its rows: [batch_size, h, w, 3] uint8."""
        pool = self._round(step)
        return pool.frames[self._chosen(step, pool)[rows]]

    def describe(self, step: int, most: int = 4) -> str:
        """The videos and frames in the batch of a step, for messages."""
        pool = self._round(step)
        origins = pool.origins[self._chosen(step, pool)]
        names = [f"{self.source.videos[video].id} frame {position}" for video, position in origins[:most]]
        more = f" and {len(origins) - most} more" if len(origins) > most else ""
        return f"a batch of {', '.join(names)}{more}"

    def _chosen(self, step: int, pool: "_Round") -> np.ndarray:
        # Sampling with replacement inside the pool keeps a batch a function of the step alone.
        return np.random.default_rng([self.seed, step, 1]).integers(len(pool.frames), size=self.batch_size)

    def _round(self, step: int) -> "_Round":
        """The round of a step; the next one is decoded meanwhile."""
        number = step // self.steps_per_round
        for wanted in (number, number + 1):
            if wanted not in self._rounds and wanted <= self.last_round:
                self._rounds[wanted] = self._next.submit(self._decode_round, wanted)
        for old in [n for n in self._rounds if n not in (number, number + 1)]:
            del self._rounds[old]
        return self._rounds[number].result()

    def close(self) -> None:
        self._next.shutdown(wait=False, cancel_futures=True)
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _decode_round(self, number: int) -> "_Round":
        """Decode the frames of a round: videos in random order, frames uniformly within each."""
        generator = np.random.default_rng([self.seed, number, 0])
        wanted = self.frames_per_round
        # The same fraction of each video, so that frames are uniform over the split.
        share = min(1.0, max(wanted / self.lengths.sum(), MIN_FRAMES_PER_VIDEO / self.lengths.mean()))
        order = generator.permutation(len(self.lengths))
        takes = np.ceil(self.lengths[order] * share).astype(np.int64)
        order = order[: int(np.searchsorted(takes.cumsum(), wanted)) + 1]
        # Of the last video only what fits, so that one long video among short ones stays within the memory.
        takes = np.diff(np.minimum(takes[: len(order)].cumsum(), wanted), prepend=0)
        picks = [
            (int(video), np.sort(generator.choice(self.lengths[video], take, replace=False)))
            for video, take in zip(order, takes, strict=True)
        ]
        picks = [(video, part) for video, positions in picks for part in self._parts(video, positions)]
        total = sum(len(positions) for _, positions in picks)
        pool, origins = np.empty((total, *self.source.dataset.frame_size, 3), np.uint8), np.empty((total, 2), np.int64)
        count = 0
        for (video, positions), result in zip(picks, self._executor.map(self._read, picks), strict=True):
            if isinstance(result, BrokenVideoError):
                self.on_broken(result)
            else:
                pool[count : count + len(result)] = result
                origins[count : count + len(result), 0], origins[count : count + len(result), 1] = video, positions
                count += len(result)
        if not count:
            raise VideoError(f"none of {len(picks)} training videos could be decoded")
        return _Round(pool[:count], origins[:count])

    def _parts(self, video: int, positions: np.ndarray) -> list[np.ndarray]:
        """Cut positions in a long video into parts that threads decode at the same time."""
        restarts = self.source.restarts(video)
        first_of_each = restarts[np.unique(restarts // FRAMES_PER_PART, return_index=True)[1]]
        return [part for part in np.split(positions, np.searchsorted(positions, first_of_each)) if len(part)]

    def _read(self, pick: tuple[int, np.ndarray]) -> np.ndarray | BrokenVideoError:
        try:
            return self.source.read(*pick)
        except BrokenVideoError as error:
            return error
