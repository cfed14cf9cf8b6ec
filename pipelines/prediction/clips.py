"""The clips that are predicted and measured: chosen by the protocol, or the end of a user's video."""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
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


# A clip's key: its video in the low 32 bits, its start in the next 24, then which of several equal clips it is.
_START_BIT, _REPEAT_BIT = 32, 56


@dataclass(frozen=True)
class Window:
    """Frames `start` to `start + context + horizon` of one video of a split.

    Attributes:
        repeat: how often these frames were taken before, each time with other random draws.
    """

    video: int
    start: int
    repeat: int = 0


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
        return self.key >> _START_BIT & 0xFFFFFF


def choose_windows(videos: VideoTable, evaluation: EvaluationConfig, wanted: int) -> list[Window]:
    """Choose clips by the protocol.

    `window: first` takes the first frames of a video, each video once; fewer clips than videos are spread evenly over
    the split. `moving` does the same, but the start is decided when the video is read (`most_moving`). `random` draws
    an order of the videos and takes each once before any is taken again; the starts in a video are drawn from (seed,
    video) without repetition, uniformly over all that fit. Others choose as the code of a paper does:

    - `srvp`: action, person, take and start are drawn in turn by NumPy's old generator, which on the whole of KTH are
      the test clips of SRVP;
    - `mcvd`: clip i of n is of video round(i / (n - 1) * (videos - 1)), its start is drawn, and is never the last;
    - `extdm`: the same videos, from frame 0;
    - `stdiff`: whole videos, cut into clips that do not overlap, in the middle of the video.

    Args:
        videos: of the split.
        wanted: number of clips; fewer are returned where there are fewer.
    Raises:
        UserError: `srvp` of other videos than KTH's.
    """
    needed, lengths = evaluation.context + evaluation.horizon, videos.frames.tolist()
    fitting = [i for i, length in enumerate(lengths) if length >= needed]
    if not fitting:
        return []
    match evaluation.window:
        case "random":
            return _random_windows(fitting, lengths, needed, evaluation.seed, wanted)
        case "srvp":
            windows = _srvp_windows(videos, needed, evaluation.seed, wanted)
        case "mcvd" | "extdm":
            draw = np.random.default_rng(evaluation.seed)
            chosen = [fitting[round(i / max(wanted - 1, 1) * (len(fitting) - 1))] for i in range(wanted)]
            starts = [int(draw.integers(max(lengths[video] - needed, 1))) for video in chosen]
            drawn = evaluation.window == "mcvd"
            windows = [Window(video, start if drawn else 0) for video, start in zip(chosen, starts, strict=True)]
        case "stdiff":
            cut = [
                Window(video, lengths[video] % needed // 2 + number * needed)
                for video in fitting
                for number in range(lengths[video] // needed)
            ]
            windows = [cut[i] for i in _spread(len(cut), wanted)]
        case _:
            windows = [Window(fitting[i], 0) for i in _spread(len(fitting), wanted)]
    taken: Counter[Window] = Counter()
    for number, window in enumerate(windows):
        windows[number] = replace(window, repeat=taken[window])
        taken[window] += 1
    return windows


def _spread(count: int, wanted: int) -> list[int]:
    """Numbers below `count`, evenly spread: `wanted` of them, or all."""
    return np.linspace(0, count - 1, min(wanted, count)).round().astype(int).tolist()


def _random_windows(fitting: list[int], lengths: list[int], needed: int, seed: int, wanted: int) -> list[Window]:
    order = np.random.default_rng(seed).permutation(fitting).tolist()
    rounds = max(lengths[video] - needed + 1 for video in order)

    @functools.cache
    def starts(video: int) -> np.ndarray:
        return np.random.default_rng([seed, video]).permutation(lengths[video] - needed + 1)

    # Lazily: there may be far more windows than are wanted.
    windows = (
        Window(video, int(starts(video)[number]))
        for number in range(rounds)
        for video in order
        if number < lengths[video] - needed + 1
    )
    return list(itertools.islice(windows, wanted))


def _srvp_windows(videos: VideoTable, needed: int, seed: int, wanted: int) -> list[Window]:
    found = {}
    for number, video_id in enumerate(videos.ids):
        match = re.fullmatch(r"person(\d+)_([a-z]+)_d(\d+)", video_id)
        if match is None:
            raise UserError(
                f"evaluation.window: srvp draws whole videos of KTH, and {video_id} is none: use dataset.source: kth "
                "with dataset.sequences: false, or another evaluation.window"
            )
        found[match[2], int(match[1]), int(match[3])] = number
    actions, persons, takes = (sorted({name[part] for name in found}) for part in range(3))
    draw = np.random.RandomState(seed % 2**32)
    windows = []
    for _ in range(wanted):
        action, person, take = (names[draw.randint(len(names))] for names in (actions, persons, takes))
        number = found.get((action, person, take))
        length = 0 if number is None else int(videos.frames[number])
        if number is None or length < needed:
            raise UserError(
                f"evaluation.window: srvp drew person{person:02d}_{action}_d{take}, of which there are {length} "
                f"frames, and a clip has {needed}: restore this video, or use another evaluation.window"
            )
        windows.append(Window(number, int(draw.randint(length - needed + 1))))
    return windows


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
            recording, info = self.source.recording(video), self.source.videos[video]
            frames, key = image_to_unit(torch.from_numpy(pixels)), self._key(number, start)
            clips.append(Clip(self.name(key), key, recording, info.fps, frames))
        return clips

    def key(self, number: int) -> int | None:
        """The key of a clip. Its video is read only if its start depends on that; None: it is broken, and reported."""
        try:
            return self._key(number, self._start(number))
        except BrokenVideoError as error:
            self.run_context.skip(error.video_id, error.reason)
            return None

    def name(self, key: int) -> str:
        """The name of the clip of a key: its video's id, `@` and its first frame if that is not frame 0, and `-2` if it
        is the second of equal clips."""
        start, repeat = key >> _START_BIT & 0xFFFFFF, key >> _REPEAT_BIT
        video = self.source.videos[key & 0xFFFFFFFF]
        return video.id + (f"@{start}" if start else "") + (f"-{repeat + 1}" if repeat else "")

    def _key(self, number: int, start: int) -> int:
        window = self.windows[number]
        return window.repeat % 128 << _REPEAT_BIT | start << _START_BIT | window.video

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
    open_windows(config, 1)


def open_clips(config: RiverConfig, run_context: RunContext, wanted: int) -> ClipReader:
    """Choose the clips of the protocol among the raw videos.

    Raises:
        UserError: no video is long enough; the message has the lengths of the videos.
        VideoError: no videos.
    """
    source, windows = open_windows(config, wanted)
    for video in source.skipped:
        run_context.skip(video.id, video.reason)
    videos, needed = VideoTable.of(source.videos), config.evaluation.context + config.evaluation.horizon
    short = [videos.ids[row] for row in np.flatnonzero(videos.frames < needed)]
    if short:
        names = ", ".join(short[:3]) + (", ..." if len(short) > 3 else "")
        say(f"{len(short)} of {len(videos)} videos are shorter than the {needed} frames of a clip, skipped: {names}")
    return ClipReader(source, windows, config.evaluation, run_context)


def open_windows(config: RiverConfig, wanted: int) -> tuple[VideoSource, list[Window]]:
    """The videos of the protocol's split, and its clips. Raises as `open_clips`."""
    evaluation = config.evaluation
    dataset = _long_enough(config.dataset, evaluation.context + evaluation.horizon)
    source = open_source(dataset, config.data_root, evaluation.split, stored_splits(config))
    videos = VideoTable.of(source.videos)
    windows = choose_windows(videos, evaluation, wanted)
    if not windows:
        found, lengths = "it is empty", videos.frames
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
        frames: [n, h, w, 3] uint8, all frames or the last ones.
        length: frames of the whole video.
        fps: frames per second.
        fingerprint: of its content.
    """

    path: Path
    frames: np.ndarray
    length: int
    fps: float
    fingerprint: str


def read_video(config: RiverConfig, path: Path, held: int = MAX_FRAMES_SHOWN, longest: int | None = None) -> GivenVideo:
    """Read a video file or a folder of frames, preprocessed as the data set is.

    Args:
        held: frames to read, the last ones.
        longest: refuse a video of more frames than this.
    Raises:
        UserError: it is shorter than the context, or longer than `longest`.
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
    if longest is not None and length > longest:
        raise UserError(f"{path}: {length} frames, expected at most {longest}: cut out the part to continue")
    frames = source.read(0, range(max(0, length - held), length))
    return GivenVideo(path, frames, length, info.fps, info.fingerprint)
