"""Random draws of frames: which ones are legal, and which a step draws, as a function of (seed, step) alone."""

import zlib
from functools import lru_cache

import numpy as np
import torch

MIN_VIDEO_FRAMES = 3  # condition, reference, target


# Samples drawn in one call: enough to make the overhead small, and half a megabyte of numbers.
BLOCK_SAMPLES = 2**14


# Rounds in which targets move to the next video, before a binary search finds the video of the remaining ones.
_STEPS = 4


class LegalTargets:
    """All legal (video, target) pairs in order; a target is legal if at least two frames of its video precede it.

    Uses 12 bytes per video (plus 8 for the offsets, which the cache has anyway), and none per frame.

    Args:
        offsets: [videos + 1] int64, first frame of each video.
    """

    def __init__(self, offsets: np.ndarray) -> None:
        self._offsets = offsets
        self._starts = np.zeros_like(offsets)  # [videos + 1] legal targets before each video
        np.cumsum(np.maximum(np.diff(offsets) - (MIN_VIDEO_FRAMES - 1), 0), out=self._starts[1:])
        # Index: for each 2^shift targets, the video of the first of them, which is at most a few videos before the
        # right one. A binary search takes ten times longer, because of cache misses and branch mispredictions.
        self._shift = max(0, self.count // max(1, len(offsets) - 1)).bit_length()
        firsts = np.arange((self.count >> self._shift) + 1) << self._shift
        self._index = (np.searchsorted(self._starts, firsts, side="right") - 1).astype(np.int32)

    @property
    def count(self) -> int:
        """Number of legal pairs, which are the samples of an epoch."""
        return int(self._starts[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of the tables, without the offsets."""
        return self._starts.nbytes + self._index.nbytes

    def locate(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Locate legal pairs.

        Args:
            pairs: [n] int64 in 0 .. count - 1.
        Returns:
            [n] int64 frame number of the target in its video, >= 2; [n] int64 its frame number in the split.
        """
        video = self._index.take(pairs >> self._shift).astype(np.int64)
        ends = self._starts[1:]
        behind = np.flatnonzero(ends.take(video) <= pairs)
        for _ in range(_STEPS):
            video[behind] += 1
            behind = behind[ends[video[behind]] <= pairs[behind]]
            if not behind.size:
                break
        else:  # many short videos in a row
            video[behind] = np.searchsorted(self._starts, pairs[behind], side="right") - 1
        place_in_video = pairs - self._starts.take(video) + (MIN_VIDEO_FRAMES - 1)
        return place_in_video, place_in_video + self._offsets.take(video)

    def before(self, frames: np.ndarray) -> np.ndarray:
        """[n] int64 number of legal targets among the first `frames` ([n] int64) frames of the split."""
        video = np.searchsorted(self._offsets, frames, side="right") - 1
        return self._starts[video] + np.maximum(frames - self._offsets[video] - (MIN_VIDEO_FRAMES - 1), 0)


def draw_past(
    uniform_place: np.ndarray,
    uniform_condition: np.ndarray,
    place_in_video: np.ndarray,
    clip_frames: int,
    past_horizon: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the past that a target is predicted from: its place in a clip, and the condition's distance.

    The target's place in its clip is p ~ U{2 .. min(clip_frames - 1, place_in_video)}, and the condition is
    ~ U{target - p .. target - 2} (section 2 of the method, for videos of any length), or with a past horizon
    ~ U{target - min(p, past_horizon) .. target - 2}: the window of `stage2_flow.conditioning.past_window` in a rollout
    with p known frames.

    Args:
        uniform_place, uniform_condition: [n] float64 in [0, 1).
        place_in_video: [n] int64 >= 2, the target's frame number in its video.
        clip_frames: >= 3.
        past_horizon: >= 2; the condition is among this many frames before the target, the reference included. None: all
            frames of the clip. The place in the clip does not depend on it.
    Returns:
        [n] int64 place of the target in its clip, which is the number of known frames, 2 .. clip_frames - 1;
        [n] int64 distance, the index of the newest known frame minus that of the condition,
        1 .. min(clip_frames - 2, past_horizon - 1).
    """
    place_in_clip = 2 + to_integer(uniform_place, np.minimum(place_in_video, clip_frames - 1) - 1)
    known_frames = place_in_clip if past_horizon is None else np.minimum(place_in_clip, past_horizon)
    return place_in_clip, 1 + to_integer(uniform_condition, known_frames - 1)


def past_offsets(place_in_clip: np.ndarray, distance: np.ndarray, recent_frames: int) -> np.ndarray:
    """Where the frames of a sample are, relative to the target: itself, the newest frames, the condition.

    Before the first frame of a clip is that frame again, as in a rollout that begins there.

    Args:
        place_in_clip, distance: [n] int64, see `draw_past`.
        recent_frames: k >= 1.
    Returns:
        [k + 2, n] int64, at most 0.
    """
    newest = [-np.minimum(back, place_in_clip) for back in range(1, recent_frames + 1)]
    return np.stack([np.zeros_like(distance), *newest, -1 - distance])


def longest_distance(lengths: np.ndarray, clip_frames: int, past_horizon: int | None = None) -> int:
    """The largest distance that `draw_past` draws from videos of these lengths, one of which has 3 frames or more.

    Args:
        lengths: [videos] frames of each; the others as in `draw_past`.
    """
    last, largest = np.array([lengths.max() - 1]), np.nextafter([1.0], 0.0)
    return int(draw_past(largest, largest, last, clip_frames, past_horizon)[1][0])


def to_integer(uniform: np.ndarray, limit: np.ndarray | int) -> np.ndarray:
    """Map float64 in [0, 1) to int64 in 0 .. limit - 1; the bias is below limit / 2^53."""
    return (uniform * limit).astype(np.int64)


def uniform_block(seed: int, stream: str, block: int, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform random numbers for one block of steps.

    Philox is a function of a key and a counter, so block 10^9 costs as much as block 0.

    Args:
        seed: seed of the run, >= 0.
        stream: name of what is drawn; streams are independent.
        block: >= 0.
        shape: shape of the result.
    Returns:
        float64 in [0, 1) with 53 random bits; float32 has too few to choose one of 10^8 frames.
    Raises:
        ValueError: a negative seed or block.
    """
    if seed < 0 or block < 0:
        raise ValueError(f"seed = {seed}, block = {block}: both must be >= 0")
    key = np.random.SeedSequence([seed, zlib.crc32(stream.encode())]).generate_state(2, np.uint64)
    # The lowest word of the counter counts within a block.
    return np.random.Generator(np.random.Philox(key=key, counter=[0, block, 0, 0])).random(shape)


def steps_per_block(batch_size: int, most_samples: int = BLOCK_SAMPLES) -> int:
    """Number of steps whose draws are made together, at least 1."""
    return max(1, min(BLOCK_SAMPLES, most_samples) // batch_size)


def step_generator(seed: int, step: int, device: torch.device | str = "cpu", stream: str = "step") -> torch.Generator:
    """A random generator for one step, which depends only on the arguments.

    Args:
        seed: seed of the run, >= 0.
        step: >= 0.
        device: device of the draws; a CPU and a GPU draw different numbers.
        stream: name of what is drawn. Two draws of a step from one stream are the same numbers, so noise must not use
            the stream that chose the frames.
    Raises:
        ValueError: a negative seed or step.
    """
    if seed < 0 or step < 0:
        raise ValueError(f"seed = {seed}, step = {step}: both must be >= 0")
    # torch's CPU generator uses only the low 32 bits of a seed. If they were a hash of the step, two steps of a run
    # would have the same draws after some 10^5 steps (birthday paradox); with a bijection of the step, none have.
    tag = zlib.crc32(stream.encode())
    low = _scramble((step + _stream_offset(seed, tag)) % 2**32)
    high = int(np.random.SeedSequence([seed, tag, step]).generate_state(1)[0])
    return torch.Generator(device=device).manual_seed(high << 32 | low)


@lru_cache(maxsize=256)
def _stream_offset(seed: int, tag: int) -> int:
    return int(np.random.SeedSequence([seed, tag]).generate_state(1)[0])


def _scramble(word: int) -> int:
    """MurmurHash3's finalizer: a bijection of 32-bit words in which every bit depends on all bits."""
    word = ((word ^ word >> 16) * 0x85EBCA6B) % 2**32
    word = ((word ^ word >> 13) * 0xC2B2AE35) % 2**32
    return word ^ word >> 16
