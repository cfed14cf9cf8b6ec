"""What a process needs to make chunks of a store: the autoencoder, threads to decode and to encode, room for both."""

import contextlib
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from latent_cache import ChunkPlan, ChunkWriter
from latent_cache.progress import ChunkMarker
from pipelines.chunk_task import ChunkTask
from pipelines.config import CacheConfig
from pipelines.errors import UserError
from pipelines.frame_encoder import FrameEncoder, exact_kernels
from pipelines.runtime.checkpoints import Checkpoint
from pipelines.runtime.session import resolve_device
from pipelines.train_autoencoder import load_trained_autoencoder, weights_digest
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.videos.base import VideoSource
from stage1_autoencoder.videos.table import VideoTable

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
