"""The frames of a split that can be a target, numbered from 0: what samplers draw from."""

import numpy as np

MIN_VIDEO_FRAMES = 3  # condition, reference, target
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
