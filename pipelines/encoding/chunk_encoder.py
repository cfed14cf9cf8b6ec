"""What a process needs to make chunks of a store: the autoencoder, threads to decode and to encode, room for both."""

import contextlib
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from latent_cache import ChunkPlan, ChunkWriter
from latent_cache.writing.markers import ChunkMarker
from pipelines.config import CacheConfig
from pipelines.errors import UserError
from pipelines.loading import load_trained_autoencoder, weights_digest
from pipelines.runtime.checkpoints import Checkpoint
from pipelines.runtime.context import resolve_device
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.frame_encoder import FrameEncoder, exact_kernels
from stage1_autoencoder.videos.source import BrokenVideoError, VideoSource, VideoTable
from stage1_autoencoder.views import ViewTransform, view_transform

# Encoding threads: on a CPU one a core; on a GPU a second one fetches and copies while the first computes.
GPU_ENCODERS = 2


@dataclass(frozen=True)
class EncodeJob:
    """All that a task needs to make any chunk of a store; sent to each worker once.

    Args:
        splits: where frames come from.
        cache: settings of the store.
        checkpoint: of the autoencoder, by its absolute path; `digest`: what its weights must be.
        device: auto, cpu, cuda, cuda:1; found out by each worker.
        writer: of the store.
        psnr_stride: by split; every so many frames one is decoded again.
        chunk_frames: most frames in a chunk.
    """

    splits: dict[str, VideoSource]
    cache: CacheConfig
    checkpoint: Checkpoint
    digest: str
    device: str
    writer: ChunkWriter
    psnr_stride: dict[str, int]
    chunk_frames: int


@dataclass(frozen=True)
class EncodedChunk:
    """A chunk that was written, and when (seconds of the wall clock)."""

    split: str
    chunk: ChunkPlan
    marker: ChunkMarker
    started: float
    ended: float


class ChunkEncoder:
    """An autoencoder, decoding threads and encoding threads: one a process, whatever the number of tasks in it."""

    def __init__(
        self,
        job: EncodeJob,
        autoencoder: Autoencoder,
        device: torch.device,
        on_done: Callable[[EncodedChunk], object] = lambda encoded: None,
        on_frames: Callable[[int], object] = lambda frames: None,
        stop_asked: object = False,
    ) -> None:
        """Start no thread yet.

        Args:
            on_done: called with each chunk once it is written, from any thread.
            on_frames: called with the number of frames that were encoded, by one thread at a time.
            stop_asked: once it is true all tasks stop.
        Raises:
            UserError: `cache.memory_budget` is too small for one chunk.
        """
        self.job, self.device, self.on_done, self.on_frames = job, device, on_done, on_frames
        self.autoencoder = autoencoder
        self.stop_asked, self.closing = stop_asked, False
        side = next(iter(job.splits.values())).dataset.image_size
        self.frame_encoder = FrameEncoder(
            autoencoder, device, side, precision=job.cache.precision, compile=job.cache.compile
        )
        passes = -(-job.cache.batch_frames // self.frame_encoder.frames)
        self.frames_a_batch = passes * self.frame_encoder.frames
        crew = self._crew_in_budget(3 * side**2 * self.frames_a_batch)
        self.tasks = crew.tasks
        self.slots = threading.Semaphore(crew.tasks)
        self.decoders = ThreadPoolExecutor(crew.decoders, "decode")
        self.encoders = ThreadPoolExecutor(crew.encoders, "encode", initializer=torch.set_num_threads, initargs=(1,))
        self.waiting = threading.Semaphore(2 * crew.encoders)  # batches that are decoded and not yet encoded
        self.progress = threading.Lock()
        self._threads = torch.get_num_threads()
        self._kernels = contextlib.ExitStack()
        self._kernels.enter_context(exact_kernels(job.cache.precision))

    def encode(self, split: str, chunk: ChunkPlan) -> EncodedChunk:
        """Make a chunk and write it.

        Raises:
            BrokenVideosError: names all videos of the chunk that cannot be decoded.
            EncodingStopped: `stop_asked` or `close` on the way.
            StoreError: latents that cannot be stored.
            NoSpaceError: the disk is full.
        """
        with self.slots:
            task = ChunkTask(self, split, chunk)
            encoded = EncodedChunk(split, chunk, task.run(), task.started, time.time())
            self.on_done(encoded)
            return encoded

    def close(self) -> None:
        """End the threads; tasks that still run stop."""
        self.closing = True
        self.decoders.shutdown(cancel_futures=True)
        self.encoders.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)
        self._kernels.close()

    @cached_property
    def rows(self) -> dict[str, dict[str, int]]:
        """Where a video is in its source, by split and id."""
        tables = {split: VideoTable.of(source.videos) for split, source in self.job.splits.items()}
        return {split: {video_id: row for row, video_id in enumerate(table.ids)} for split, table in tables.items()}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a frame's latent."""
        model = self.autoencoder
        side = next(iter(self.job.splits.values())).dataset.image_size // model.downsampling
        return (model.config.latent_channels, side, side)

    def _crew_in_budget(self, batch: int) -> "_Crew":
        """As many threads as there are cores, and two chunks at once so that one is written while the next is encoded,
        or as few as the budget allows.

        Args:
            batch: bytes of a batch of frames.
        """
        cores = len(os.sched_getaffinity(0))
        budget, views = self.job.cache.memory_budget_bytes, len(self.job.cache.views)
        # Half of the memory is for computing: each encoder has a batch in the network, one in hand and two that wait.
        encoder = self.frame_encoder.memory + 3 * batch
        encoders = min(cores if self.device.type == "cpu" else GPU_ENCODERS, max(1, budget // 2 // encoder))
        decoder = 2 * views * batch  # each fills at most so many batches at once
        # In float32 as they come, in the store's type, and twice as bytes of the file.
        value = 4 + 3 * np.dtype(self.job.cache.dtype).itemsize
        chunk = value * math.prod(self.latent_shape) * self.job.chunk_frames
        left = budget - encoders * encoder - chunk
        decoders = min(cores, left // decoder)
        if decoders < 1:
            needed, computing, frames, latents = (
                f"{math.ceil(size / 2**20)} MiB"
                for size in (encoder + chunk + decoder, self.frame_encoder.memory, 3 * batch + decoder, chunk)
            )
            raise UserError(
                f"cache.memory_budget: {self.job.cache.memory_budget} is too little to make a chunk of the store: "
                f"{needed} are needed ({computing} to compute, {frames} of frames, {latents} of latents): raise it, or "
                "lower cache.batch_frames or cache.chunk_frames"
            )
        return _Crew(decoders=decoders, encoders=encoders, tasks=2 if left - decoders * decoder >= chunk else 1)


@dataclass(frozen=True)
class _Crew:
    """Threads that decode and encode, and chunks that are in the making at once."""

    decoders: int
    encoders: int
    tasks: int


_encoders: dict[ChunkWriter, ChunkEncoder] = {}  # of this process, by the encoding that they belong to
_running: Counter[ChunkWriter] = Counter()
_encoders_lock = threading.Lock()


def encode_chunk(job: EncodeJob, split: str, chunk: ChunkPlan) -> EncodedChunk:
    """The task of the graph: make one chunk, in whatever process it was sent to. Safe to run twice.

    Raises:
        As `ChunkEncoder.encode`, and UserError where the autoencoder is not the one that the job wants.
    """
    with _encoder_for(job) as encoder:
        return encoder.encode(split, chunk)


def install_encoder(encoder: ChunkEncoder) -> None:
    """Let the tasks of this process use an encoder that is there already."""
    with _encoders_lock:
        _encoders[encoder.job.writer] = encoder


def remove_encoder(encoder: ChunkEncoder) -> None:
    """Undo `install_encoder`."""
    with _encoders_lock:
        _encoders.pop(encoder.job.writer, None)


@contextlib.contextmanager
def _encoder_for(job: EncodeJob) -> Iterator[ChunkEncoder]:
    """This process's encoder for a job. Those of other encodings are closed, unless tasks of theirs are running."""
    with _encoders_lock:
        for other in [writer for writer in _encoders if writer != job.writer and not _running[writer]]:
            _encoders.pop(other).close()
        if job.writer not in _encoders:
            _encoders[job.writer] = _make_encoder(job)
        encoder = _encoders[job.writer]
        _running[job.writer] += 1
    try:
        yield encoder
    finally:
        with _encoders_lock:
            _running[job.writer] -= 1


def _make_encoder(job: EncodeJob) -> ChunkEncoder:
    device = resolve_device(job.device)
    autoencoder = load_trained_autoencoder(job.checkpoint, device)
    digest = weights_digest(autoencoder)
    if digest != job.digest:
        raise UserError(
            f"{job.checkpoint.path} holds autoencoder {digest[:12]}... here, and {job.digest[:12]}... is "
            "wanted: workers must see the same run as the command"
        )
    return ChunkEncoder(job, autoencoder, device)


if TYPE_CHECKING:  # the encoder makes the tasks
    pass

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
