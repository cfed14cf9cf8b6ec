"""The clips that predictions are made and measured on."""

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipelines.config import EvaluationConfig, RiverConfig
from pipelines.errors import UserError
from pipelines.runtime.context import RunContext
from pipelines.runtime.progress import say
from stage1_autoencoder.autoencoder import image_to_unit
from stage1_autoencoder.videos import open_source
from stage1_autoencoder.videos.source import BrokenVideoError, VideoSource, VideoTable


@dataclass(frozen=True)
class Window:
    """Frames `start` to `start + context + horizon` of one video of a split."""

    video: int
    start: int


@dataclass(frozen=True)
class Clip:
    """One clip: its name, the key of its random draws, and its frames [context + horizon, 3, h, w] in [-1, 1]."""

    name: str
    key: int
    frames: Tensor

    @property
    def video(self) -> int:
        """The number of its video in the split: clips of one video are no independent draws."""
        return self.key & 0xFFFFFFFF


def choose_windows(lengths: list[int], evaluation: EvaluationConfig, wanted: int) -> list[Window]:
    """Clips by the protocol.

    With `window: first` a video gives its first frames, so it is taken once, and fewer clips than videos are spread
    evenly over the split; with `moving` too, but where a clip starts is seen when its video is read (`most_moving`).
    With `random` the videos come in a drawn order, each once before any is taken again, and a video's starts are drawn
    from (seed, video) without repetition, uniformly over all that fit.

    Args:
        lengths: frames of the split's videos.
        wanted: how many clips; fewer come back when there are not as many.
    """
    needed = evaluation.context + evaluation.horizon
    fitting = [i for i, length in enumerate(lengths) if length >= needed]
    if evaluation.window in ("first", "moving"):
        spread = np.linspace(0, len(fitting) - 1, min(wanted, len(fitting))).round().astype(int)
        return [Window(fitting[i], 0) for i in spread]
    order = np.random.default_rng(evaluation.seed).permutation(fitting).tolist()
    rounds = max((lengths[video] - needed + 1 for video in order), default=0)

    @functools.cache
    def starts(video: int) -> np.ndarray:
        return np.random.default_rng([evaluation.seed, video]).permutation(lengths[video] - needed + 1)

    # Lazily, since there may be far more videos, and long ones hold far more windows, than are wanted.
    windows = (
        Window(video, int(starts(video)[number]))
        for number in range(rounds)
        for video in order
        if number < lengths[video] - needed + 1
    )
    return list(itertools.islice(windows, wanted))


def most_moving(pixels: Iterable[np.ndarray], context: int, needed: int) -> int:
    """Where a clip starts whose given frames move most; what comes after them is not looked at.

    Args:
        pixels: frames [h, w, 3] uint8 of a whole video, one at a time.
        context: frames that are given.
        needed: frames of the clip.
    Returns:
        The start, of several equal ones the first: that with the largest sum, over the given frames, of each one's mean
        absolute difference to the frame before it.
    """
    changes, before = [0.0], None
    for frame in pixels:
        frame = frame.astype(np.int16)
        if before is not None:
            changes.append(float(np.abs(frame - before).mean()))
        before = frame
    # sums[i]: of the changes up to frame i, so that frames s .. s + context - 1 move by sums[s + context - 1] - sums[s]
    sums = np.cumsum(changes)
    starts = len(sums) - needed + 1
    return int(np.argmax(sums[context - 1 : context - 1 + starts] - sums[:starts]))


class ClipReader:
    """The protocol's clips, read from the raw videos one by one as they are asked for: none is kept.

    Attributes:
        windows: where they lie.
    """

    def __init__(
        self, source: VideoSource, windows: list[Window], evaluation: EvaluationConfig, run_context: RunContext
    ) -> None:
        self.windows = windows
        self._source = source
        self._evaluation = evaluation
        self._session = run_context

    def __len__(self) -> int:
        """Clips at most: broken videos are left out when they are read."""
        return len(self.windows)

    def __iter__(self) -> Iterator[Clip]:
        """Read the clips; broken videos are skipped.

        Raises:
            UserError: at the end, where no video could be decoded.
        """
        needed, found = self._evaluation.context + self._evaluation.horizon, 0
        for window in self.windows:
            clip = _read_clip(self._source, window, needed, self._session, self._evaluation)
            if clip is not None:
                found += 1
                yield clip
        if not found:
            raise UserError(
                f"split {self._evaluation.split} of {self._source.dataset.name}: none of {len(self.windows)} videos "
                "can be decoded"
            )

    def batches(self, size: int) -> Iterator[list[Clip]]:
        """As many at once, the last time fewer; errors as of the iterator."""
        clips = iter(self)
        while batch := list(itertools.islice(clips, size)):
            yield batch


def load_clips(config: RiverConfig, run_context: RunContext, wanted: int) -> list[Clip]:
    """Read the protocol's clips from the raw videos, all at once; errors as of `open_clips` and its reader."""
    return list(open_clips(config, run_context, wanted))


def open_clips(config: RiverConfig, run_context: RunContext, wanted: int) -> ClipReader:
    """Choose the protocol's clips among the raw videos.

    Raises:
        UserError: no video is long enough; says which lengths there are.
        VideoError: no videos.
    """
    evaluation = config.evaluation
    source = open_source(config.dataset, config.data_root, evaluation.split)
    for video in source.skipped:
        run_context.skip(video.id, video.reason)
    videos = VideoTable.of(source.videos)
    lengths = videos.frames.tolist()
    needed = evaluation.context + evaluation.horizon
    short = [videos.ids[row] for row in np.flatnonzero(videos.frames < needed)]
    windows = choose_windows(lengths, evaluation, wanted)
    if not windows:
        spread = (
            f"the {len(lengths)} videos have {min(lengths)} to {max(lengths)} frames" if lengths else "it has no videos"
        )
        raise UserError(
            f"split {evaluation.split} of {config.dataset.name}: no video has the {evaluation.context} + "
            f"{evaluation.horizon} frames of evaluation.context + evaluation.horizon; {spread}: "
            "lower evaluation.horizon"
        )
    if short:
        say(f"{len(short)} of {len(lengths)} videos are shorter than the {needed} frames of a clip and left out: "
            f"{', '.join(short[:3])}{', ...' if len(short) > 3 else ''}")  # fmt: skip
    return ClipReader(source, windows, evaluation, run_context)


def _read_clip(
    source: VideoSource, window: Window, frames: int, run_context: RunContext, evaluation: EvaluationConfig
) -> Clip | None:
    video = source.videos[window.video]
    try:
        if evaluation.window == "moving":
            window = Window(window.video, most_moving(source.iterate(window.video), evaluation.context, frames))
        pixels = source.read(window.video, range(window.start, window.start + frames))
    except BrokenVideoError as error:
        run_context.skip(error.video_id, error.reason)
        return None
    name = video.id if window.start == 0 else f"{video.id}@{window.start}"
    # The same clip has the same key, hence the same prediction, however many others are asked for.
    return Clip(name=name, key=window.start << 32 | window.video, frames=image_to_unit(torch.from_numpy(pixels)))
