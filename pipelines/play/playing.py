"""What is played: clips to start from, and a prediction that goes on until it is stopped."""

import base64
import io
import threading
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.prediction.clips import open_clips, read_video
from pipelines.prediction.pictures import to_video
from pipelines.predictor import VideoPredictor
from pipelines.runtime.context import RunContext
from stage1_autoencoder.autoencoder import image_to_unit
from stage1_autoencoder.videos import VideoError

# Frames that a prediction may be ahead of the page: it waits there, so its memory is bounded.
AHEAD = 8
# Frames given to a prediction that continues from a predicted frame: that one and those before it.
PAST = 16
SPLIT_CLIPS = 8
# Of an upload, and how many are kept.
MOST_BYTES, MOST_FRAMES, KEPT_UPLOADS = 64 * 2**20, 20_000, 8
THUMBNAIL_SIDE = 96


@dataclass(frozen=True, eq=False)
class Past:
    """Frames to continue.

    Attributes:
        name: for people.
        key: of its random draws.
        fps: frames per second.
        frames: [n, h, w, 3] uint8.
    """

    name: str
    key: int
    fps: float
    frames: np.ndarray

    @cached_property
    def thumbnail(self) -> str:
        """The last frame as the address of a small picture."""
        picture, file = Image.fromarray(self.frames[-1]), io.BytesIO()
        picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        picture.save(file, "png")
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


class Clips:
    """Clips to start from, by number: some of the run's split, and the newest uploads.

    Attributes:
        missing: why there are none of the split; empty: there are.
    """

    def __init__(self, config: RiverConfig, run_context: RunContext) -> None:
        self._config = config
        self._uploads = 0
        self.missing, self.by_number = "", dict[int, Past]()
        try:
            clips = list(open_clips(config, run_context, SPLIT_CLIPS))
        except (UserError, VideoError) as error:  # the raw videos need not be on this machine
            self.missing = str(error)
            return
        for number, clip in enumerate(clips):
            given = to_video(clip.frames[: config.evaluation.context])
            self.by_number[number] = Past(clip.name, clip.key, clip.fps, given)

    def read(self, file: Path) -> Past:
        """The end of an uploaded video file.

        Raises:
            UserError: it cannot be used; the message names the file without its folder.
        """
        context = self._config.evaluation.context
        try:
            video = read_video(self._config, file, held=context, longest=MOST_FRAMES)
        except (UserError, VideoError) as error:
            raise UserError(str(error).replace(f"{file.parent}/", "")) from None
        return Past(file.name, 0, video.fps, video.frames)

    def add(self, clip: Past) -> int:
        """Number an uploaded clip, and drop the oldest one beyond `KEPT_UPLOADS`."""
        number = SPLIT_CLIPS + self._uploads
        self._uploads += 1
        self.by_number[number] = clip
        if self._uploads > KEPT_UPLOADS:
            del self.by_number[number - KEPT_UPLOADS]
        return number


class Prediction:
    """A prediction that goes on until it is stopped; it is at most `AHEAD` frames before the one that is shown.

    `run` is for a thread of its own, the other methods are for all threads. Frames are counted from the
    first given one.

    Args:
        past: what is given.
        samples: predictions side by side.
        sampling: options that differ from the run's.
        first: number of the first predicted frame.
        is_new: the given frames are sent before the predicted ones.
    """

    def __init__(self, past: Past, samples: int, sampling: dict[str, Any], first: int, is_new: bool) -> None:
        self._given, self._samples, self._sampling = past, samples, sampling
        begin = [np.broadcast_to(frame, (samples, *frame.shape)) for frame in past.frames]
        self._frames = deque([] if is_new else begin, maxlen=PAST + AHEAD)
        self._unsent = begin if is_new else []
        self._next = first - len(self._unsent)  # number of the next frame
        self._shown = self._next - 1
        self._stopped = False
        self._changed = threading.Condition()

    def run(self, predictor: VideoPredictor, send: Callable[[int, bool, np.ndarray], None]) -> None:
        """Predict, until `stop`.

        Args:
            send: called with each frame's number, whether it was given, and its pixels [samples, h, w, 3] uint8.
        Raises:
            UserError: the sampling options do not fit, or the prediction is not finite.
        """
        for frame in self._unsent:
            if not self._add(frame):
                return
            send(self._next - 1, True, frame)
        images = image_to_unit(torch.from_numpy(np.ascontiguousarray(self._given.frames)))[None]
        stream = predictor.stream(images, sampling=self._sampling, keys=[(self._given.key, 0)], samples=self._samples)
        with closing(stream):
            for predicted in stream:
                frame = to_video(predicted)
                if not self._add(frame):
                    return
                send(self._next - 1, False, frame)

    def _add(self, frame: np.ndarray) -> bool:
        """Wait until a further frame may be sent, and keep it; False: the prediction was stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._next <= self._shown + AHEAD)
            self._frames.append(frame)
            self._next += 1
            return not self._stopped

    def has_shown(self, number: int) -> None:
        """The page shows this frame."""
        with self._changed:
            self._shown = min(max(self._shown, number), self._next - 1)
            self._changed.notify()

    def stop(self) -> None:
        """Let `run` return after the frame that it computes."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def past(self, number: int, sample: int) -> Past:
        """One sample's frame, and those before it.

        Raises:
            UserError: no such sample, or a frame that is not kept.
        """
        with self._changed:
            kept = len(self._frames) - (self._next - 1 - number)
            if not 0 < kept <= len(self._frames) or sample >= self._samples:
                raise UserError(f"frame {number} of future {sample + 1} is not there any more: start again")
            frames = [frame[sample] for frame in self._frames][:kept]
        return Past(self._given.name, self._given.key, self._given.fps, np.stack(frames[-PAST:]))
