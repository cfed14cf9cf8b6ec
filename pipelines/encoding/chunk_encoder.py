"""Encoding chunks in one process: one autoencoder, threads that decode, threads that encode, a memory budget."""

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from latent_cache import ChunkPlan, ChunkWriter
from latent_cache.schema import ACTIONS, FRAME_TYPES, PREVIEW
from latent_cache.writing.markers import ChunkMarker
from pipelines.config import CacheConfig
from pipelines.errors import UserError
from pipelines.runtime.checkpoints import Checkpoint
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.frame_encoder import FrameEncoder, exact_kernels
from stage1_autoencoder.videos.source import (
    RETRY_SECONDS,
    BrokenVideoError,
    UnreadableVideoError,
    VideoSource,
    VideoTable,
)
from stage1_autoencoder.views import ViewTransform, view_transform

# Encoding threads on a GPU: one copies and fetches while the other computes. On a CPU there is one per core.
GPU_ENCODERS = 2


@dataclass(frozen=True)
class EncodeJob:
    """All that a process needs to encode any chunk of a store. It is sent to each worker once.

    Attributes:
        splits: videos of each split.
        cache: settings of the store.
        checkpoint: of the autoencoder, with an absolute path.
        digest: of the autoencoder's weights.
        device: auto, cpu, cuda or cuda:1; each worker resolves it.
        latent_shape: (channels, height, width) of a frame's latent.
        extras: shape per frame of the arrays beside latents and codes.
        psnr_stride: by split, stride of the frames that are decoded again to measure round-trip PSNR.
        chunk_frames: frames of the largest chunk.
        code: fingerprint of the program that gives the job.
    """

    splits: dict[str, VideoSource]
    cache: CacheConfig
    checkpoint: Checkpoint
    digest: str
    device: str
    latent_shape: tuple[int, int, int]
    extras: dict[str, tuple[int, ...]]
    psnr_stride: dict[str, int]
    chunk_frames: int
    code: str


class BrokenVideosError(Exception):
    """Videos of a chunk cannot be decoded to the length in their index. Nothing of the chunk was written.

    Attributes:
        reasons: by id of the video.
    """

    def __init__(self, split: str, reasons: dict[str, str]) -> None:
        super().__init__(split, reasons)  # both arguments, so that the error can be pickled
        self.split, self.reasons = split, reasons


class UnreadableVideosError(Exception):
    """The file system or the network did not give videos of a chunk. Nothing of the chunk was written.

    Attributes:
        reasons: by id of the video.
    """

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons


class EncodingStopped(Exception):
    """Encoding was asked to stop. Unfinished chunks were not written, finished ones stay."""


class Threads(NamedTuple):
    """How many threads decode, how many encode, and how many chunks are in work at the same time."""

    decoders: int
    encoders: int
    chunks: int


class ChunkEncoder:
    """Encodes chunks. One per process, shared by all tasks in it.

    Args:
        stop_asked: all tasks stop when it becomes true.
    Attributes:
        threads: as many as cores, or as the memory budget allows.
        on_frames: called with the number of frames just encoded, from one thread at a time.
        closing: set it to stop all tasks.
    Raises:
        UserError: `cache.memory_budget` is too small for one chunk.
    """

    def __init__(
        self, job: EncodeJob, autoencoder: Autoencoder, device: torch.device, stop_asked: object = False
    ) -> None:
        self.job, self.device, self.stop_asked, self.closing = job, device, stop_asked, False
        self.on_frames: Callable[[int], object] = lambda frames: None
        self.rows = video_rows(job.splits)
        frame_size = next(iter(job.splits.values())).dataset.frame_size
        self.frame_encoder = FrameEncoder(
            autoencoder, device, frame_size, precision=job.cache.precision, compile=job.cache.compile
        )
        # Frames that one encoding thread takes at once: whole batches of the network.
        self.block_frames = -(-job.cache.batch_frames // self.frame_encoder.frames) * self.frame_encoder.frames
        self.threads = self._threads_in_budget(3 * math.prod(frame_size) * self.block_frames)
        self.slots = threading.Semaphore(self.threads.chunks)
        # Threads start with the first chunk.
        self.decoders = ThreadPoolExecutor(self.threads.decoders, "decode")
        self.encoders = ThreadPoolExecutor(
            self.threads.encoders, "encode", initializer=torch.set_num_threads, initargs=(1,)
        )
        self.waiting = threading.Semaphore(2 * self.threads.encoders)  # blocks that are decoded and not yet encoded
        self.progress = threading.Lock()
        self._threads_before = torch.get_num_threads()
        self._kernels = contextlib.ExitStack()
        self._kernels.enter_context(exact_kernels(job.cache.precision))

    def encode(self, writer: ChunkWriter, split: str, chunk: ChunkPlan) -> ChunkMarker:
        """Encode a chunk and write it.

        Raises:
            BrokenVideosError: names all videos of the chunk that cannot be decoded.
            UnreadableVideosError: names all that could not be read, if none is broken.
            EncodingStopped: `stop_asked` or `closing` became true.
            UserError: out of GPU memory.
            StoreError: latents that cannot be stored.
            NoSpaceError: the disk is full.
        """
        with self.slots:
            return ChunkTask(self, split, chunk).run(writer)

    def close(self) -> None:
        """Stop running tasks and end the threads."""
        self.closing = True
        self.decoders.shutdown(cancel_futures=True)
        self.encoders.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads_before)
        self._kernels.close()

    def _threads_in_budget(self, block: int) -> Threads:
        """One decoder and one encoder per core and two chunks at once, or as few of them as the budget allows.

        Two chunks, so that one is written while the next one is encoded; more where a chunk has fewer videos than there
        are decoders, each of which decodes another video.

        Args:
            block: bytes of `block_frames` frames.
        """
        cores = len(os.sched_getaffinity(0))
        budget, views = self.job.cache.memory_budget_bytes, len(self.job.cache.views)
        # Half of the budget is for encoders: each has one block in the network, one in hand and two waiting.
        encoder = self.frame_encoder.memory + 3 * block
        decoder = 2 * views * block  # a decoder fills at most two blocks per view at once
        # Bytes per value of a chunk: float32 from the network, the store's type, and two copies as bytes of the file.
        value = 4 + 3 * np.dtype(self.job.cache.dtype).itemsize
        chunk = value * math.prod(self.job.latent_shape) * self.job.chunk_frames
        # Of other values the array, a padded copy of it, and two of the file.
        chunk += (
            4
            * self.job.chunk_frames
            * sum(math.prod(shape) * FRAME_TYPES[name].itemsize for name, shape in self.job.extras.items())
        )
        most = cores if self.device.type == "cpu" else GPU_ENCODERS
        encoders = min(most, max(1, min(budget // 2, budget - chunk - decoder) // encoder))
        left = budget - encoders * encoder - chunk
        decoders = min(cores, left // decoder)
        if decoders < 1:
            needed, latents = (math.ceil(size / 2**20) for size in (encoder + chunk + decoder, chunk))
            raise UserError(
                f"cache.memory_budget: {self.job.cache.memory_budget} is too little for one chunk, which needs "
                f"{needed} MiB ({latents} MiB of them for its latents): raise it, or lower cache.batch_frames or "
                "cache.chunk_frames"
            )
        lengths = [VideoTable.of(source.videos).frames.mean() for source in self.job.splits.values() if source.videos]
        videos = max(1, int(self.job.chunk_frames / (max(lengths) * views)))  # of a chunk
        further = min(math.ceil(decoders / videos), (left - decoders * decoder) // chunk)
        return Threads(decoders, encoders, chunks=1 + further)


def video_rows(splits: Mapping[str, VideoSource]) -> dict[str, dict[str, int]]:
    """Index of a video in its source, by split and id."""
    tables = {split: VideoTable.of(source.videos) for split, source in splits.items()}
    return {split: {video_id: row for row, video_id in enumerate(table.ids)} for split, table in tables.items()}


class Target(NamedTuple):
    """Where frames `start` to `stop` (excluded) of one view of a video go: from `place` on in the chunk."""

    view: ViewTransform
    start: int
    stop: int
    place: int


@dataclass
class Block:
    """Consecutive frames of a chunk that one thread will encode, while they are being decoded.

    Attributes:
        start: place in the chunk.
        frames: [n, h, w, 3] uint8; `views`: [n].
        missing: frames that are not decoded yet.
    """

    start: int
    frames: np.ndarray
    views: list[ViewTransform]
    missing: int


class ChunkTask:
    """One chunk while the threads of a `ChunkEncoder` encode it."""

    def __init__(self, encoder: ChunkEncoder, split: str, chunk: ChunkPlan) -> None:
        self.encoder, self.split, self.chunk = encoder, split, chunk
        self.latents = np.empty((chunk.frames, *encoder.job.latent_shape), np.float32)
        self.codes = np.empty((chunk.frames, *encoder.job.latent_shape[1:]), np.int32)
        self.extras = {
            name: np.empty((chunk.frames, *shape), FRAME_TYPES[name]) for name, shape in encoder.job.extras.items()
        }
        self.codes_held, self.codes_changed = 0, 0
        self.psnr: dict[int, float] = {}
        self.broken: dict[str, str] = {}
        self.unreadable: dict[str, str] = {}
        self.cancelled = False
        self.lock = threading.Lock()
        self.blocks: dict[int, Block] = {}
        self.encoding: list[Future[None]] = []

    def run(self, writer: ChunkWriter) -> ChunkMarker:
        """Decode, encode and write the chunk. Errors as in `ChunkEncoder.encode`."""
        decoding = [self.encoder.decoders.submit(self.decode, *video) for video in self.targets().items()]
        try:
            for future in decoding:
                future.result()
            if self.broken:
                raise BrokenVideosError(self.split, self.broken)
            if self.unreadable:
                raise UnreadableVideosError(self.unreadable)
            for future in self.encoding:
                future.result()
        except BaseException as error:
            self.cancelled = True
            for future in decoding:
                future.cancel()
            # No thread works on this task after it has ended.
            _errors_of(decoding)
            # When encoding fails, decoding threads end with `EncodingStopped`.
            causes = [cause for cause in _errors_of(self.encoding) if not isinstance(cause, EncodingStopped)]
            if not causes or causes[0] is error:  # an error that is its own cause makes an endless chain
                raise
            raise causes[0] from error
        measured = {
            "code_counts": np.bincount(self.codes.ravel()).tolist(),
            "codes_held": self.codes_held,
            "codes_changed": self.codes_changed,
            "psnr": [self.psnr[position] for position in sorted(self.psnr)],
        }
        codes = self.codes if self.encoder.job.cache.codes else None
        return writer.write(self.split, self.chunk, self.latents, codes, measured, self.extras)

    def targets(self) -> dict[str, list[Target]]:
        """Where the frames of each video go. Its views are adjacent, so that one pass over it serves them all."""
        place = 0
        targets: dict[str, list[Target]] = {}
        for piece, video_id, view in zip(self.chunk.pieces, self.chunk.video_ids, self.chunk.video_views, strict=True):
            target = Target(view_transform(view, video_id), piece.start, piece.stop, place)
            targets.setdefault(video_id, []).append(target)
            place += piece.stop - piece.start
        return targets

    def check(self) -> None:
        if self.cancelled or self.encoder.closing or self.encoder.stop_asked:
            raise EncodingStopped

    def decode(self, video_id: str, targets: list[Target]) -> None:
        """Decode a video once, and put its frames into their places."""
        self.check()
        source = self.encoder.job.splits[self.split]
        index = self.encoder.rows[self.split][video_id]
        number, end = min(target.start for target in targets), max(target.stop for target in targets)
        for attempt in range(1 + len(RETRY_SECONDS)):
            try:
                if ACTIONS in self.extras:
                    told = source.actions(index)
                    for target in targets:
                        stop = target.place + target.stop - target.start
                        self.extras[ACTIONS][target.place : stop] = told[target.start : target.stop]
                for frame in source.iterate(index, number, end):
                    self.check()
                    for target in targets:
                        if target.start <= number < target.stop:
                            self.put(target.place + number - target.start, frame, target.view)
                    number += 1
                return
            except BrokenVideoError as error:
                unread = isinstance(error, UnreadableVideoError)
                # A verdict is asked for twice: what decodes then was a disturbance, and what lasts need not be awaited.
                if attempt >= (len(RETRY_SECONDS) if unread and error.may_pass else 1):
                    with self.lock:
                        (self.unreadable if unread else self.broken)[error.video_id] = error.reason
                    return
            until = time.monotonic() + RETRY_SECONDS[attempt]
            while time.monotonic() < until:
                self.check()
                time.sleep(0.05)

    def put(self, place: int, frame: np.ndarray, transform: ViewTransform) -> None:
        """Put a frame into its block, and send the block to an encoding thread when it is full."""
        size = self.encoder.block_frames
        number = place // size
        with self.lock:
            block = self.blocks.get(number)
            if block is None:
                count = min(size, self.chunk.frames - number * size)
                frames = np.empty((count, *frame.shape), np.uint8)
                block = self.blocks[number] = Block(number * size, frames, [transform] * count, missing=count)
        block.frames[place - block.start] = frame
        block.views[place - block.start] = transform
        with self.lock:
            block.missing -= 1
            if block.missing:
                return
            del self.blocks[number]
        if self.broken or self.unreadable:
            return  # the chunk will be encoded another time
        self.encoder.waiting.acquire()
        self.encoding.append(self.encoder.encoders.submit(self.encode, block))

    @torch.inference_mode()
    def encode(self, block: Block) -> None:
        """Encode the frames of a block in batches of the network."""
        try:
            self.check()
            size = self.encoder.frame_encoder.frames
            for start in range(0, len(block.frames), size):
                self.encode_batch(block.start + start, block.frames[start : start + size], block.views[start:][:size])
            with self.encoder.progress:
                self.encoder.on_frames(len(block.frames))
        except torch.OutOfMemoryError as error:
            self.cancelled = True
            raise UserError(f"{self.encoder.device}: out of memory while encoding ({error})") from error
        except BaseException:
            self.cancelled = True
            raise
        finally:
            self.encoder.waiting.release()

    def encode_batch(self, place: int, frames: np.ndarray, views: Sequence[ViewTransform]) -> None:
        """Encode one batch, and measure what rounding to the store's type costs."""
        frame_encoder, count, job = self.encoder.frame_encoder, len(frames), self.encoder.job
        encoded = frame_encoder.encode(frames, views)
        rounded = frame_encoder.rounded(encoded, getattr(torch, job.cache.dtype))
        # A value beyond the type's range stays as it is: the writer refuses it and names the value and its video.
        stored = torch.where(rounded.latents.isfinite(), rounded.latents.float(), encoded.latents)[:count]
        pulled, changed = (int(where[:count].sum()) for where in (rounded.pulled, rounded.changed))
        self.latents[place : place + count] = stored.cpu().numpy()
        self.codes[place : place + count] = encoded.codes[:count].to(torch.int32).cpu().numpy()
        if (pictures := self.extras.get(PREVIEW)) is not None:
            small = frame_encoder.preview(encoded.images[:count], pictures.shape[1:3])
            pictures[place : place + count] = small.cpu().numpy()
        psnr = {
            place + row: frame_encoder.round_trip_psnr(encoded.images[row], stored[row])
            for row in range(count)
            if (self.chunk.start + place + row) % job.psnr_stride[self.split] == 0
        }
        with self.lock:
            self.codes_held += pulled - changed
            self.codes_changed += changed
            self.psnr |= psnr


def _errors_of(futures: Sequence[Future[None]]) -> list[BaseException]:
    """Wait until all futures have ended; the errors of those that failed."""
    errors = []
    for future in futures:
        with contextlib.suppress(CancelledError):
            errors.append(future.exception())
    return [error for error in errors if error is not None]
