"""Making one chunk of the store: decoding threads fill batches, encoding threads empty them, then it is written."""

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from latent_cache import ChunkPlan
from latent_cache.progress import ChunkMarker
from pipelines.errors import UserError
from stage1_autoencoder.videos.base import BrokenVideoError
from stage1_autoencoder.views import ViewTransform, view_transform

if TYPE_CHECKING:  # the encoder makes the tasks
    from pipelines.encode_chunks import ChunkEncoder

# Most frames of a split that are decoded again for the round-trip PSNR; and of a small split one in so many.
PSNR_FRAMES, PSNR_EVERY = 32, 64


class BrokenVideosError(Exception):
    """Videos of a chunk cannot be decoded as far as their index promised. Nothing of the chunk was written."""

    def __init__(self, split: str, reasons: dict[str, str]) -> None:
        super().__init__(split, reasons)  # both arguments, so that the error can be sent between processes
        self.split, self.reasons = split, reasons


class EncodingStopped(Exception):
    """The task was asked to stop. Nothing of its chunk was written."""


@dataclass(frozen=True)
class _Visit:
    """One pass over a video, and where its frames go: (view, first frame, one past the last, place in the chunk)."""

    video_id: str
    targets: list[tuple[str, int, int, int]]

    @property
    def start(self) -> int:
        return min(start for _, start, _, _ in self.targets)

    @property
    def stop(self) -> int:
        return max(stop for _, _, stop, _ in self.targets)


@dataclass
class _Batch:
    """Frames of a chunk that are encoded together, while they are being decoded."""

    start: int
    frames: np.ndarray  # [n, h, w, 3] uint8
    views: list[ViewTransform] = field(default_factory=list)
    missing: int = 0


class ChunkTask:
    """One chunk in the making.

    Args:
        encoder: whose threads make it.
        split: of the chunk.
        chunk: from `StoreWriter.pending`.
    """

    def __init__(self, encoder: "ChunkEncoder", split: str, chunk: ChunkPlan) -> None:
        self.encoder, self.split, self.chunk = encoder, split, chunk
        self.latents = np.empty((chunk.frames, *encoder.latent_shape), np.float32)
        self.codes = np.empty((chunk.frames, *encoder.latent_shape[1:]), np.int32)
        self.codes_held, self.codes_changed = 0, 0
        self.psnr: dict[int, float] = {}
        self.broken: dict[str, str] = {}
        self.cancelled = False
        self.started = math.inf  # once the threads have come to its first video
        self.lock = threading.Lock()
        self.batches: dict[int, _Batch] = {}
        self.encoding: list[Future[None]] = []

    def run(self) -> ChunkMarker:
        """Decode, encode and write it. Errors as in `ChunkEncoder.encode`."""
        decoding = [self.encoder.decoders.submit(self.decode, visit) for visit in self.visits()]
        try:
            for future in decoding:
                future.result()
            if self.broken:
                raise BrokenVideosError(self.split, self.broken)
            for future in self.encoding:
                future.result()
        except BaseException as error:
            self.cancelled = True
            for future in decoding:
                future.cancel()
            settle(decoding)  # nothing of this task runs on when it has ended
            settle(self.encoding)
            cause = self.cause_of(error)
            if cause is error:  # not `from` itself: whoever follows the chain of causes would never end
                raise
            raise cause from error
        measured = {
            "code_counts": np.bincount(self.codes.ravel()).tolist(),
            "codes_held": self.codes_held,
            "codes_changed": self.codes_changed,
            "psnr": [self.psnr[position] for position in sorted(self.psnr)],
        }
        codes = self.codes if self.encoder.job.cache.codes else None
        return self.encoder.job.writer.write(self.split, self.chunk, self.latents, codes, measured)

    def cause_of(self, error: BaseException) -> BaseException:
        """What made the task fail: an encoding thread that fails makes the decoding ones stop."""
        found = [future.exception() for future in self.encoding]
        return next((cause for cause in found if cause and not isinstance(cause, EncodingStopped)), error)

    def visits(self) -> Iterator[_Visit]:
        """The pieces of the chunk; views of one video, which lie side by side, in one visit."""
        place, visit = 0, None
        named = zip(self.chunk.pieces, self.chunk.video_ids, self.chunk.video_views, strict=True)
        for piece, video_id, view in named:
            target = (view, piece.start, piece.stop, place)
            if visit is not None and visit.video_id == video_id:
                visit.targets.append(target)
            else:
                if visit is not None:
                    yield visit
                visit = _Visit(video_id, [target])
            place += piece.stop - piece.start
        assert visit is not None
        yield visit

    def check(self) -> None:
        if self.cancelled or self.encoder.closing or self.encoder.stop_asked:
            raise EncodingStopped

    def decode(self, visit: _Visit) -> None:
        """Decode a video once, and put its frames to their places."""
        self.check()
        self.started = min(self.started, time.time())
        source = self.encoder.job.splits[self.split]
        index = self.encoder.rows[self.split][visit.video_id]
        transforms = [view_transform(view, visit.video_id) for view, *_ in visit.targets]
        try:
            for number, frame in enumerate(source.iterate(index, visit.start, visit.stop), visit.start):
                self.check()
                for (_, start, stop, place), transform in zip(visit.targets, transforms, strict=True):
                    if start <= number < stop:
                        self.put(place + number - start, frame, transform)
        except BrokenVideoError as error:
            with self.lock:
                self.broken[error.video_id] = error.reason

    def put(self, place: int, frame: np.ndarray, transform: ViewTransform) -> None:
        """Put a frame into its batch; the last one of a batch sends it to be encoded."""
        size = self.encoder.frames_a_batch
        number = place // size
        with self.lock:
            batch = self.batches.get(number)
            if batch is None:
                count = min(size, self.chunk.frames - number * size)
                batch = _Batch(number * size, np.empty((count, *frame.shape), np.uint8), missing=count)
                batch.views = [transform] * count
                self.batches[number] = batch
        batch.frames[place - batch.start] = frame
        batch.views[place - batch.start] = transform
        with self.lock:
            batch.missing -= 1
            if batch.missing:
                return
            del self.batches[number]
        if self.broken:
            return  # the chunk will be planned anew
        self.encoder.waiting.acquire()
        self.encoding.append(self.encoder.encoders.submit(self.encode, batch))

    @torch.inference_mode()
    def encode(self, batch: _Batch) -> None:
        """Encode the frames of a batch, and measure what storing them costs."""
        try:
            self.check()
            size = self.encoder.frame_encoder.frames
            for start in range(0, len(batch.frames), size):
                self.encode_pass(batch.start + start, batch.frames[start : start + size], batch.views[start:][:size])
            with self.encoder.progress:
                self.encoder.on_frames(len(batch.frames))
        except torch.OutOfMemoryError as error:
            self.cancelled = True
            raise UserError(f"{self.encoder.device}: no memory left to encode: free some of it ({error})") from error
        except BaseException:
            self.cancelled = True
            raise
        finally:
            self.encoder.waiting.release()

    def encode_pass(self, place: int, frames: np.ndarray, views: Sequence[ViewTransform]) -> None:
        frame_encoder, count, job = self.encoder.frame_encoder, len(frames), self.encoder.job
        encoded = frame_encoder.encode(frames, views)
        rounded = frame_encoder.rounded(encoded, getattr(torch, job.cache.dtype))
        # What the type cannot hold goes on as it is, and is refused by the writer, which names its value and its video.
        stored = torch.where(rounded.latents.isfinite(), rounded.latents.float(), encoded.latents)[:count]
        pulled, changed = (int(where[:count].sum()) for where in (rounded.pulled, rounded.changed))
        self.latents[place : place + count] = stored.cpu().numpy()
        self.codes[place : place + count] = encoded.codes[:count].to(torch.int32).cpu().numpy()
        psnr = {
            place + row: frame_encoder.round_trip_psnr(encoded.images[row], stored[row])
            for row in range(count)
            if (self.chunk.start + place + row) % job.psnr_stride[self.split] == 0
        }
        with self.lock:
            self.codes_held += pulled - changed
            self.codes_changed += changed
            self.psnr |= psnr


def psnr_stride(frames: int) -> int:
    """Of a split of so many frames, every how many one is decoded again."""
    return max(PSNR_EVERY, -(-frames // PSNR_FRAMES))


def settle(futures: Sequence[Future[None]]) -> None:
    """Wait until none of some futures runs, whatever became of it."""
    for future in futures:
        with contextlib.suppress(CancelledError):
            future.exception()
