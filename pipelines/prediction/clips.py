"""The clips that are predicted and measured: chosen by the protocol, or the end of a user's video."""

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.config import EvaluationConfig, RiverConfig
from pipelines.data.datasets import stored_splits
from pipelines.errors import UserError
from pipelines.runtime.context import RunContext
from pipelines.runtime.progress import say
from stage1_autoencoder.autoencoder import image_to_unit
from stage1_autoencoder.videos import open_source, open_video
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.source import BrokenVideoError, Recording, VideoSource, VideoTable

# Frames of a user's video that are held in memory and shown before the prediction.
MAX_FRAMES_SHOWN = 1000


@dataclass(frozen=True)
class Window:
    """Frames `start` to `start + context + horizon` of one video of a split."""

    video: int
    start: int


@dataclass(frozen=True)
class Clip:
    """One clip.

    Attributes:
        key: of its random draws.
        recording: what it was cut from; clips of one recording are not independent.
        fps: frames per second.
        frames: [context + horizon, 3, h, w] in [-1, 1].
    """

    name: str
    key: int
    recording: Recording
    fps: float
    frames: Tensor

    @property
    def video(self) -> int:
        """The number of its video in the split."""
        return self.key & 0xFFFFFFFF

    @property
    def start(self) -> int:
        """The number of its first frame in the video."""
        return self.key >> 32


def choose_windows(lengths: list[int], evaluation: EvaluationConfig, wanted: int) -> list[Window]:
    """Choose clips by the protocol.

    `window: first` takes the first frames of a video, each video once; fewer clips than videos are spread evenly over
    the split. `moving` does the same, but the start is decided when the video is read (`most_moving`). `random` draws
    an order of the videos and takes each once before any is taken again; the starts in a video are drawn from (seed,
    video) without repetition, uniformly over all that fit.

    Args:
        lengths: frames of the split's videos.
        wanted: number of clips; fewer are returned where there are fewer.
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

    # Lazily: there may be far more windows than are wanted.
    windows = (
        Window(video, int(starts(video)[number]))
        for number in range(rounds)
        for video in order
        if number < lengths[video] - needed + 1
    )
    return list(itertools.islice(windows, wanted))


def most_moving(pixels: Iterable[np.ndarray], context: int, needed: int) -> int:
    """The start of the clip whose given frames move most, whatever its other frames do.

    Args:
        pixels: frames [h, w, 3] uint8 of a whole video, one at a time.
        context: given frames of the clip.
        needed: all frames of the clip.
    Returns:
        The first start with the largest sum, over the given frames, of the mean absolute difference to the one before.
    """
    pairs = itertools.pairwise(pixels)
    changes = [float(np.abs(after.astype(np.int16) - before.astype(np.int16)).mean()) for before, after in pairs]
    # sums[i]: of the changes up to frame i, so that frames s .. s + context - 1 move by sums[s + context - 1] - sums[s]
    sums = np.cumsum([0.0, *changes])
    starts = len(sums) - needed + 1
    return int(np.argmax(sums[context - 1 : context - 1 + starts] - sums[:starts]))


@dataclass(frozen=True, eq=False)
class ClipReader:
    """The protocol's clips, read from the raw videos one at a time and not kept."""

    source: VideoSource
    windows: list[Window]
    evaluation: EvaluationConfig
    run_context: RunContext
    # Of moving windows, by number.
    _starts: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of clips, including those of broken videos, which are skipped when they are read."""
        return len(self.windows)

    def __iter__(self) -> Iterator[Clip]:
        """Read the clips; broken videos are skipped.

        Raises:
            UserError: at the end, if no video could be decoded.
        """
        found = False
        for number in range(len(self)):
            for clip in self.read([number]):
                found = True
                yield clip
        if not found:
            raise self.nothing_found()

    def read(self, numbers: Iterable[int]) -> list[Clip]:
        """The clips of these numbers; those of broken videos are reported and left out."""
        clips, needed = [], self.evaluation.context + self.evaluation.horizon
        for number in numbers:
            video = self.windows[number].video
            try:
                start = self._start(number)
                pixels = self.source.read(video, range(start, start + needed))
            except BrokenVideoError as error:
                self.run_context.skip(error.video_id, error.reason)
                continue
            # The same clip has the same key and so the same prediction, however many clips are asked for.
            key, recording, info = start << 32 | video, self.source.recording(video), self.source.videos[video]
            frames = image_to_unit(torch.from_numpy(pixels))
            clips.append(Clip(self.name(key), key, recording, info.fps, frames))
        return clips

    def key(self, number: int) -> int | None:
        """The key of a clip. Its video is read only if its start depends on that; None: it is broken, and reported."""
        try:
            return self._start(number) << 32 | self.windows[number].video
        except BrokenVideoError as error:
            self.run_context.skip(error.video_id, error.reason)
            return None

    def name(self, key: int) -> str:
        """The name of the clip of a key: its video's id, with `@` and its first frame if that is not frame 0."""
        start, video = divmod(key, 1 << 32)
        return self.source.videos[video].id + (f"@{start}" if start else "")

    def _start(self, number: int) -> int:
        window, context = self.windows[number], self.evaluation.context
        if self.evaluation.window != "moving":
            return window.start
        if number not in self._starts:
            needed = context + self.evaluation.horizon
            self._starts[number] = most_moving(self.source.iterate(window.video), context, needed)
        return self._starts[number]

    def nothing_found(self) -> UserError:
        """The error of videos of which none can be decoded."""
        return UserError(
            f"split {self.evaluation.split} of {self.source.dataset.name}: none of {len(self.windows)} videos can be "
            "decoded"
        )


def check_clips(config: RiverConfig) -> None:
    """Refuse videos without a clip of the protocol, before anything is trained for it. Raises as `open_clips`."""
    _open_windows(config, 1)


def open_clips(config: RiverConfig, run_context: RunContext, wanted: int) -> ClipReader:
    """Choose the clips of the protocol among the raw videos.

    Raises:
        UserError: no video is long enough; the message has the lengths of the videos.
        VideoError: no videos.
    """
    source, windows = _open_windows(config, wanted)
    for video in source.skipped:
        run_context.skip(video.id, video.reason)
    videos, needed = VideoTable.of(source.videos), config.evaluation.context + config.evaluation.horizon
    short = [videos.ids[row] for row in np.flatnonzero(videos.frames < needed)]
    if short:
        names = ", ".join(short[:3]) + (", ..." if len(short) > 3 else "")
        say(f"{len(short)} of {len(videos)} videos are shorter than the {needed} frames of a clip, skipped: {names}")
    return ClipReader(source, windows, config.evaluation, run_context)


def _open_windows(config: RiverConfig, wanted: int) -> tuple[VideoSource, list[Window]]:
    evaluation = config.evaluation
    dataset = _long_enough(config.dataset, evaluation.context + evaluation.horizon)
    source = open_source(dataset, config.data_root, evaluation.split, stored_splits(config))
    lengths = VideoTable.of(source.videos).frames
    windows = choose_windows(lengths.tolist(), evaluation, wanted)
    if not windows:
        found = "it is empty"
        if len(lengths):
            found = f"the {len(lengths)} videos have {lengths.min()} to {lengths.max()} frames"
        raise UserError(
            f"split {evaluation.split} of {config.dataset.name}: no video has the {evaluation.context} + "
            f"{evaluation.horizon} frames of evaluation.context + evaluation.horizon; {found}: lower evaluation.horizon"
        )
    return source, windows


def _long_enough(dataset: DatasetConfig, frames: int) -> DatasetConfig:
    """The data set, whose `shapes` are simulated for this many frames at least; the first ones stay the same."""
    simulated = max(dataset.shapes.frames, (frames - 1) * dataset.frame_step + 1)
    return dataset.model_copy(update={"shapes": dataset.shapes.model_copy(update={"frames": simulated})})


@dataclass(frozen=True, eq=False)
class GivenVideo:
    """A user's video, to be continued.

    Attributes:
        path: of the file or folder.
        frames: [n, h, w, 3] uint8, all frames or the last thousand.
        length: frames of the whole video.
        fps: frames per second.
        fingerprint: of its content.
    """

    path: Path
    frames: np.ndarray
    length: int
    fps: float
    fingerprint: str


def read_video(config: RiverConfig, path: Path) -> GivenVideo:
    """Read a video file or a folder of frames, preprocessed as the data set is.

    Raises:
        UserError: it is shorter than the context.
        VideoError: it does not exist, or cannot be decoded.
    """
    source, context = open_video(config.dataset, path), config.evaluation.context
    info = source.videos[0]
    length = info.frames
    if length < context:
        raise UserError(
            f"{path}: {length} frames after {config.dataset.sampling_text}, but evaluation.context is {context}: take "
            f"a longer video or --set evaluation.context={length}"
        )
    frames = source.read(0, range(max(0, length - MAX_FRAMES_SHOWN), length))
    return GivenVideo(path, frames, length, info.fps, info.fingerprint)
