"""`encode`: all splits through the autoencoder into the store of latents."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import latent_cache
from latent_cache import ChunkPlan, SplitPlan, StoreMetadata, StoreWriter
from pipelines.config import RiverConfig
from pipelines.errors import StoppedBySignal, UserError
from pipelines.prepare import open_videos
from pipelines.runtime.progress import progress, say
from pipelines.runtime.runs import software_versions, write_run_files
from pipelines.runtime.session import Session, image_memory_format
from pipelines.runtime.signals import StopRequest
from pipelines.train_autoencoder import (
    find_autoencoder,
    load_trained_autoencoder,
    train_autoencoder,
    weights_digest,
)
from stage1_autoencoder.videos.base import BrokenVideoError, VideoSource
from stage1_autoencoder.videos.preprocessing import preprocessing_description
from stage1_autoencoder.vqgan import VQGAN, image_to_unit


def encode(config: RiverConfig, session: Session) -> Path:
    """Encode every split, or recognise that this was done; trains the autoencoder first when there is none.

    Returns:
        The store's path.
    Raises:
        UserError: a complete store of another autoencoder or other preprocessing, without --overwrite.
        StoppedBySignal: after SIGINT or SIGTERM; finished chunks are kept.
    """
    checkpoint = train_autoencoder(config, session.for_prerequisites())
    autoencoder = load_trained_autoencoder(checkpoint, session.device)
    path = config.store_path
    if not session.overwrite and store_is_complete(path):
        check_store(config, weights_digest(autoencoder))
        say(f"store: done, {path}")
        return path

    splits = open_videos(config, session)
    write_run_files(config, session.device)
    metadata = store_metadata(config, autoencoder, splits)
    encoder = StoreEncoder(config, session, autoencoder, splits, metadata)
    reports = encoder.run(overwrite=session.overwrite)
    for report in reports:
        say(report.line())
    say(f"store: complete, {path}")
    return path


def store_is_complete(path: Path) -> bool:
    """Whether there is a whole store at a path; an incomplete or missing one is not."""
    return path.exists() and latent_cache.is_complete(path)


def store_metadata(config: RiverConfig, autoencoder: VQGAN, splits: dict[str, VideoSource]) -> StoreMetadata:
    """What the store says about itself."""
    fps = next(iter(splits.values())).videos[0].fps
    return StoreMetadata(
        dataset=config.dataset.name,
        fps=fps,
        preprocessing=preprocessing_description(config.dataset),
        autoencoder={
            "architecture": autoencoder.config.architecture,
            "sha256": weights_digest(autoencoder),
            "downsampling": autoencoder.downsampling,
            "latent_channels": autoencoder.config.latent_channels,
            "codes": autoencoder.config.codes,
        },
        software=software_versions(),
    )


def check_store(config: RiverConfig, autoencoder_digest: str) -> None:
    """Refuse a store that was made otherwise than this configuration would.

    Raises:
        UserError: another autoencoder, or other preprocessing; both sides are shown.
    """
    metadata = latent_cache.open_metadata(config.store_path)
    stored = metadata.autoencoder["sha256"]
    if stored != autoencoder_digest:
        raise UserError(
            f"{config.store_path} was encoded by autoencoder {stored[:12]}..., but {config.run_path}/autoencoder holds "
            f"{autoencoder_digest[:12]}...: encode again with `encode --overwrite`, or bring the autoencoder back"
        )
    wanted = preprocessing_description(config.dataset)
    changed = [
        f"{key}: {metadata.preprocessing.get(key)!r} in the store, {value!r} in the configuration"
        for key, value in wanted.items()
        if metadata.preprocessing.get(key) != value
    ]
    if changed:
        raise UserError(
            f"{config.store_path} was made with other preprocessing:\n  " + "\n  ".join(changed)
            + "\nencode again with `encode --overwrite`, or go back to the old values"
        )  # fmt: skip


def ensure_store(config: RiverConfig, session: Session) -> Path:
    """The complete store of this configuration; encodes (and trains the autoencoder) only when it is missing."""
    if store_is_complete(config.store_path):
        checkpoint = find_autoencoder(config.run_path)
        if checkpoint is not None:  # a store alone is enough to train on
            check_store(config, weights_digest(load_trained_autoencoder(checkpoint, torch.device("cpu"))))
        return config.store_path
    return encode(config, session.for_prerequisites())


@dataclass(frozen=True)
class SplitReport:
    """What encoding one split came to."""

    split: str
    videos: int
    frames: int
    megabytes: float
    frames_per_second: float
    codes_used: int
    codes: int

    def line(self) -> str:
        return (
            f"store: {self.split}: {self.videos} videos, {self.frames} frames, {self.megabytes:.1f} MB of latents, "
            f"{self.frames_per_second:.0f} frames/s, {self.codes_used} of {self.codes} codes used"
        )


class StoreEncoder:
    """Decodes with threads, encodes in batches on the device, and writes whole chunks."""

    def __init__(
        self,
        config: RiverConfig,
        session: Session,
        autoencoder: VQGAN,
        splits: dict[str, VideoSource],
        metadata: StoreMetadata,
    ) -> None:
        self.config, self.session, self.autoencoder, self.metadata = config, session, autoencoder, metadata
        self.splits = splits
        self.broken: dict[str, set[int]] = {split: set() for split in splits}
        side = config.dataset.image_size // autoencoder.downsampling
        self.latent_shape = (autoencoder.config.latent_channels, side, side)

    def run(self, overwrite: bool) -> list[SplitReport]:
        """Encode what is pending until the store is complete."""
        while True:
            try:
                return self._attempt(overwrite)
            except _VideoDropped as dropped:
                # Its frames were planned for; the chunks before it stay as they are, the others are laid out anew.
                self.broken[dropped.split].add(dropped.index)
                self.session.skip(dropped.error.video_id, dropped.error.reason)
                # A store can lose videos, but no split: without its last video the whole store is laid out anew.
                overwrite = len(self.broken[dropped.split]) == len(self.splits[dropped.split].videos)

    def _attempt(self, overwrite: bool) -> list[SplitReport]:
        rows = {
            name: [i for i in range(len(s.videos)) if i not in self.broken[name]] for name, s in self.splits.items()
        }
        rows = {name: kept for name, kept in rows.items() if kept}
        if "train" not in rows:
            raise UserError(f"{self.config.data_root}: no training video of {self.config.dataset.name} can be decoded")
        plans = {name: self._plan(self.splits[name], kept) for name, kept in rows.items()}
        options = {"codes": self.config.cache.codes, "dtype": self.config.cache.dtype, "overwrite": overwrite}
        with StoreWriter.open(self.config.store_path, self.metadata, plans, **options) as writer, StopRequest() as stop:
            reports = [self._encode_split(writer, name, plans[name], rows[name], stop) for name in plans]
            writer.finish()
            if stop:
                raise StoppedBySignal(stop.signal_number, f"stopped; {writer.path} is complete")
        return reports

    def _plan(self, source: VideoSource, rows: list[int]) -> SplitPlan:
        # The whole index decides the chunks' size: a video dropped later must not change the chunks that are kept.
        frames = sum(video.frames for video in source.videos)
        chunk_frames = self.config.cache.chunk_frames or latent_cache.default_chunk_frames(self.latent_shape, frames)
        return SplitPlan(
            video_ids=[source.videos[i].id for i in rows],
            video_views=["identity"] * len(rows),
            lengths=[source.videos[i].frames for i in rows],
            latent_shape=self.latent_shape,
            chunk_frames=chunk_frames,
        )

    def _encode_split(
        self, writer: StoreWriter, split: str, plan: SplitPlan, rows: list[int], stop: StopRequest
    ) -> SplitReport:
        pending = writer.pending(split)
        if len(pending) < len(plan.chunks):
            say(f"store: {split}: {len(plan.chunks) - len(pending)} of {len(plan.chunks)} chunks are there already")
        started, encoded = time.perf_counter(), 0
        used = torch.zeros(self.autoencoder.config.codes, dtype=torch.bool)
        with progress(total=plan.frames, initial=plan.frames - sum(chunk.frames for chunk in pending),
                      description=f"encode {split}", unit="frame") as bar:  # fmt: skip
            for chunk in pending:
                latents, codes = [], []
                for batch in self._batches(split, chunk, rows):
                    batch_latents, batch_codes = self._encode_batch(batch)
                    latents.append(batch_latents)
                    codes.append(batch_codes)
                    bar.update(len(batch))
                    if stop:
                        raise StoppedBySignal(
                            stop.signal_number,
                            f"stopped; {writer.path} keeps its finished chunks, `encode` goes on from there",
                        )
                chunk_codes = np.concatenate(codes)
                used[torch.from_numpy(chunk_codes).flatten().long()] = True
                writer.write_chunk(
                    split, chunk, np.concatenate(latents), chunk_codes if self.config.cache.codes else None
                )
                encoded += chunk.frames
        return SplitReport(
            split=split,
            videos=len(rows),
            frames=plan.frames,
            megabytes=plan.frames * np.prod(self.latent_shape) * np.dtype(self.config.cache.dtype).itemsize / 1e6,
            frames_per_second=encoded / max(time.perf_counter() - started, 1e-9),
            codes_used=int(used.sum()),
            codes=len(used),
        )

    def _batches(self, split: str, chunk: ChunkPlan, rows: list[int]) -> Iterator[np.ndarray]:
        """The chunk's frames [n, h, w, 3] uint8 in batches that depend on the chunk alone, decoded ahead by threads."""
        source = self.splits[split]

        def read(piece: latent_cache.plan.Piece) -> np.ndarray:
            index = rows[piece.video]
            try:
                return source.read(index, range(piece.start, piece.stop))
            except BrokenVideoError as error:
                raise _VideoDropped(split, index, error) from error

        size = self.config.cache.batch_frames
        waiting: list[np.ndarray] = []
        count = 0
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="decode") as decoders:
            for frames in decoders.map(read, chunk.pieces):
                waiting.append(frames)
                count += len(frames)
                if count >= size:
                    joined = np.concatenate(waiting)
                    whole = count - count % size
                    yield from np.split(joined[:whole], whole // size)
                    waiting, count = [joined[whole:]], count - whole
        if count:
            yield np.concatenate(waiting)

    @torch.inference_mode()
    def _encode_batch(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = image_to_unit(torch.from_numpy(frames).to(self.session.device))
        latents = self.autoencoder.encode(images.contiguous(memory_format=image_memory_format(self.session.device)))
        codes = self.autoencoder.quantizer.nearest(latents)
        return latents.cpu().numpy(), codes.to(torch.int32).cpu().numpy()


class _VideoDropped(Exception):
    def __init__(self, split: str, index: int, error: BrokenVideoError) -> None:
        super().__init__(str(error))
        self.split, self.index, self.error = split, index, error
