"""Writing videos as folders of pictures, by many threads: each in a hidden folder first, then whole at its place."""

import io
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import av
import numpy as np
from PIL import Image

from latent_cache import NoSpaceError
from latent_cache.disk import is_full
from pipelines.convert_record import Entry, Record
from pipelines.errors import UserError
from stage1_autoencoder.videos.base import BrokenVideoError, VideoSource
from stage1_autoencoder.videos.config import Split

ImageFormat = Literal["png", "jpg"]

# Of zlib. Measured at 128x128: 1.4 ms and 21 kB a frame; level 6 takes 5.0 ms for 10 % less.
PNG_LEVEL = 1


@dataclass(frozen=True)
class Job:
    """One video to write: `split/folder`, its place in its source, and what is recorded of it."""

    split: Split
    name: str
    index: int
    entry: Entry


class Stopped(Exception):
    """The command is ending; this video stays unfinished."""


@dataclass
class Writer:
    """Writes videos, by many threads.

    Attributes:
        stopping: ends all threads at their next frame.
        frames: that were written, or given up with their video.
        written: bytes of each video that was finished.
    """

    record: Record
    sources: dict[Split, VideoSource]
    image_format: ImageFormat
    quality: int
    stopping: threading.Event = field(default_factory=threading.Event)
    frames: int = 0
    written: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, job: Job) -> None:
        """Write one video, a frame at a time, and put it to its place.

        Raises:
            BrokenVideoError: nothing is left of it.
        """
        folder = self.record.unfinished / f"{job.split}-{job.index}"
        digits = max(5, len(str(job.entry.frames - 1)))
        size = frames = 0
        try:
            with output_errors(folder):
                folder.mkdir()
            for number, frame in enumerate(self._frames(job)):
                if self.stopping.is_set():
                    raise Stopped
                content = self.encode(frame)
                with output_errors(self.record.out):
                    (folder / f"{number:0{digits}d}.{self.image_format}").write_bytes(content)
                size, frames = size + len(content), frames + 1
                with self._lock:
                    self.frames += 1
            assert frames == job.entry.frames, f"{frames} frames of {job.name}, which has {job.entry.frames}"
            with self._lock, output_errors(self.record.out):
                self.record.put(folder, job.name, job.entry)
                self.written[job.name] = size
        except BrokenVideoError:
            with self._lock:
                self.frames += job.entry.frames - frames
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _frames(self, job: Job) -> Iterator[np.ndarray]:
        try:
            yield from self.sources[job.split].iterate(job.index)
        except av.error.FFmpegError as error:  # of a colour space that FFmpeg cannot convert, and the like
            raise BrokenVideoError(job.entry.id, f"its frames cannot be converted ({error.strerror})") from error

    def encode(self, frame: np.ndarray) -> bytes:
        """A picture's file."""
        content = io.BytesIO()
        if self.image_format == "png":
            Image.fromarray(frame).save(content, "PNG", compress_level=PNG_LEVEL)
        else:
            Image.fromarray(frame).save(content, "JPEG", quality=self.quality, subsampling=0)
        return content.getvalue()

    def picture_bytes(self, pending: list[Job]) -> int:
        """About how many bytes a picture takes: as many as the first one of a video that can be read."""
        for job in pending[:5]:
            try:
                return len(self.encode(next(self._frames(job))))
            except BrokenVideoError:
                continue
        side = next(iter(self.sources.values())).dataset.image_size
        return 3 * side * side


@contextmanager
def output_errors(place: Path) -> Iterator[None]:
    """Turn errors of writing, which are not those of a source, into words."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise NoSpaceError(
                f"{place}: the disk is full; what is there is whole: free some room, and the same command goes on"
            ) from error
        raise UserError(f"{place}: cannot be written to ({error})") from error
