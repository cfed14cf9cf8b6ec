"""What chance decides about a batch, as a function of the seed and the step, and of nothing that went before."""

import zlib
from functools import lru_cache

import numpy as np
import torch

MIN_VIDEO_FRAMES = 3  # condition, reference, target


# Samples that are drawn at once: so many that the cost a call is spread thin, so few that they take half a megabyte.
BLOCK_SAMPLES = 2**14


# Rounds in which targets step to the next video, before those that still have not arrived are searched for.
_STEPS = 4


class LegalTargets:
    """All legal (video, target) pairs in order, legal meaning that two frames of the video come before the target.

    Takes 12 bytes a video (8 more are the offsets, which the cache has anyway), and none a frame.

    Args:
        offsets: [videos + 1] int64, first frame of each video.
    """

    def __init__(self, offsets: np.ndarray) -> None:
        self._offsets = offsets
        self._starts = np.zeros_like(offsets)  # [videos + 1] legal targets before each video
        np.cumsum(np.maximum(np.diff(offsets) - (MIN_VIDEO_FRAMES - 1), 0), out=self._starts[1:])
        # A guide: for each 2^shift targets, the video of the first of them. From there it is a step or none to the
        # right video; a binary search takes ten times longer, for it misses the cache and the branch predictor.
        self._shift = max(0, self.count // max(1, len(offsets) - 1)).bit_length()
        firsts = np.arange((self.count >> self._shift) + 1) << self._shift
        self._guide = (np.searchsorted(self._starts, firsts, side="right") - 1).astype(np.int32)

    @property
    def count(self) -> int:
        """Legal pairs: samples in an epoch."""
        return int(self._starts[-1])

    @property
    def nbytes(self) -> int:
        """Memory of the tables, without the offsets."""
        return self._starts.nbytes + self._guide.nbytes

    def locate(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find legal pairs.

        Args:
            pairs: [n] int64 in 0 .. count - 1.
        Returns:
            [n] int64 the target's frame number in its video, >= 2; [n] int64 its frame number in the split.
        """
        video = self._guide.take(pairs >> self._shift).astype(np.int64)
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
        """[n] int64 legal targets among the first `frames` ([n] int64) frames of the split."""
        video = np.searchsorted(self._offsets, frames, side="right") - 1
        return self._starts[video] + np.maximum(frames - self._offsets[video] - (MIN_VIDEO_FRAMES - 1), 0)


def draw_distance(
    uniform_place: np.ndarray,
    uniform_condition: np.ndarray,
    place_in_video: np.ndarray,
    clip_frames: int,
    past_horizon: int | None = None,
) -> np.ndarray:
    """How far the condition lies before the reference, given the target.

    The target's place in its clip p ~ U{2 .. min(clip_frames - 1, place_in_video)}, the condition
    ~ U{target - p .. target - 2} (section 2 of the method, for videos of any length), or with a past horizon
    ~ U{target - min(p, past_horizon) .. target - 2}: what `stage2_flow.conditioning.past_window` is in a rollout that
    knows p frames.

    Args:
        uniform_place, uniform_condition: [n] float64 in [0, 1).
        place_in_video: [n] int64 >= 2, the target's frame number in its video.
        clip_frames: >= 3.
        past_horizon: >= 2, frames before the target, the reference among them, that the condition is one of; None: all
            of its clip. The place in the clip is drawn alike for any horizon.
    Returns:
        [n] int64, index of the reference minus that of the condition, 1 .. min(clip_frames - 2, past_horizon - 1).
    """
    place_in_clip = 2 + to_integer(uniform_place, np.minimum(place_in_video, clip_frames - 1) - 1)
    known_frames = place_in_clip if past_horizon is None else np.minimum(place_in_clip, past_horizon)
    return 1 + to_integer(uniform_condition, known_frames - 1)


def to_integer(uniform: np.ndarray, limit: np.ndarray | int) -> np.ndarray:
    """Map float64 in [0, 1) to int64 in 0 .. limit - 1; the bias is below limit / 2^53."""
    return (uniform * limit).astype(np.int64)


def uniform_block(seed: int, stream: str, block: int, shape: tuple[int, ...]) -> np.ndarray:
    """The uniform numbers of one block of steps.

    Philox is a function of a key and a counter, so that block 10^9 costs as much as block 0 does.

    Args:
        seed: >= 0, of the run.
        stream: what is drawn; other streams have nothing in common with it.
        block: >= 0.
    Returns:
        `shape` float64 in [0, 1), with 53 random bits: float32 could not name one of 10^8 frames.
    Raises:
        ValueError: a negative seed or block.
    """
    if seed < 0 or block < 0:
        raise ValueError(f"seed = {seed}, block = {block}: both must be >= 0")
    key = np.random.SeedSequence([seed, zlib.crc32(stream.encode())]).generate_state(2, np.uint64)
    # The lowest word of the counter counts the numbers within a block.
    return np.random.Generator(np.random.Philox(key=key, counter=[0, block, 0, 0])).random(shape)


def steps_per_block(batch_size: int, most_samples: int = BLOCK_SAMPLES) -> int:
    """Steps whose draws are made together, at least 1."""
    return max(1, min(BLOCK_SAMPLES, most_samples) // batch_size)


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
