"""From videos to a complete store: plans the chunks of all splits, has them encoded, summarizes the result."""

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import RootModel

import latent_cache
from latent_cache import LatentCache, NoSpaceError, SplitPlan, StoreWriter
from latent_cache.schema import ACTIONS, IDENTITY_VIEW, PREVIEW, PROGRESS_FOLDER
from latent_cache.writing.appending import next_generation
from pipelines.config import RiverConfig
from pipelines.data.datasets import division_note, open_raw_splits, open_videos
from pipelines.encoding.chunk_encoder import BrokenVideosError, ChunkEncoder, EncodeJob, EncodingStopped
from pipelines.encoding.cluster import code_fingerprint, connect, run_here, run_on_cluster
from pipelines.encoding.store_checks import added_videos, check_layout, preview_size, store_metadata, store_status
from pipelines.encoding.store_summary import perplexity
from pipelines.errors import InputUnreadable, StoppedBySignal, UserError
from pipelines.loading import find_autoencoder, load_trained_autoencoder
from pipelines.runtime.checkpoints import Checkpoint
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import free_bytes, read_json, size_text, write_json
from pipelines.runtime.progress import counted, duration, progress, say, warn
from pipelines.runtime.run_folder import write_run_files
from pipelines.runtime.signals import StopRequest
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.frame_encoder import FrameEncoder, exact_kernels
from stage1_autoencoder.videos import dataset_root
from stage1_autoencoder.videos.source import VideoSource, VideoTable
from stage1_autoencoder.views import ViewTransform

# Warn when storing in `cache.dtype` changes the nearest code of more than this share of the latents.
MOST_CODES_CHANGED = 1e-3
# Every PSNR_STRIDE-th frame of a split is decoded again to measure the round trip, but at most PSNR_FRAMES of them.
PSNR_STRIDE = 64
PSNR_FRAMES = 32
# Encoding goes on without the chunks of this many videos that cannot be read.
MOST_UNREADABLE = 100
# Without a terminal, which has a bar, the rate is reported after this many seconds, then at twice that time, and so on.
REPORT_SECONDS = 20.0


def encode(config: RiverConfig, run_context: RunContext, checkpoint: Checkpoint | None) -> Path:
    """Encode every split into the store, or resume that; append new videos to a complete store.

    Args:
        checkpoint: of the run's autoencoder; None if there is none, which is enough where nothing is encoded.
    Returns:
        Path of the complete store.
    Raises:
        UserError: without `run_context.overwrite`: the store is of another autoencoder or other preprocessing, or is
            complete with another layout or with videos that were removed or replaced, or cannot be appended to.
        StoreError: an incomplete store of another layout; a store that another process writes; a full disk.
        StoppedBySignal: after a signal; finished chunks are kept.
        InputUnreadable: videos could not be read this time; finished chunks are kept.
    """
    path, status = config.store_path, store_status(config)
    if not run_context.overwrite and status.state == "conflicting":
        raise UserError(status.detail)
    added: dict[str, set[str]] = {}
    if not run_context.overwrite and status.is_done:
        check_layout(config)
        here = _videos_are_here(config) or run_context.mirror is not None
        splits = open_videos(config, run_context) if here else {}
        added = added_videos(config, splits) if here else {}
        if not added:
            latent_cache.discard_generation(path.absolute())
            say(f"store: done, {path}" + ("" if here else " (not compared with its videos, which are not here)"))
            return path
        checkpoint = _check_appending(config, checkpoint)
        autoencoder = load_trained_autoencoder(checkpoint, run_context.device)
        number = counted(sum(map(len, added.values())), "new video")
        say(f"store: adding {number} to {path}; mean and std of its channels stay those of the first encoding")
    else:
        autoencoder = load_trained_autoencoder(checkpoint, run_context.device)
        splits = open_videos(config, run_context)
        latent_cache.discard_generation(path.absolute())
    write_run_files(config.shared, run_context.device)
    for summary in StoreEncoder(config, run_context, checkpoint, autoencoder, splits, added).run():
        say(summary.line())
        if (changed := summary.measured["codes_changed"]) > MOST_CODES_CHANGED:
            warn(
                f"store: {summary.split}: storing latents as {config.cache.dtype} changed the nearest code of "
                f"{changed:.2%} of them: set cache.dtype to float32 and encode again with --overwrite, "
                "or train an autoencoder with smaller latents"
            )
    say(f"store: complete, {path}")
    return path


def _videos_are_here(config: RiverConfig) -> bool:
    return config.dataset.source == "shapes" or dataset_root(config.dataset, config.data_root).exists()


def _check_appending(config: RiverConfig, checkpoint: Checkpoint | None) -> Checkpoint:
    """Refuse to append to a store without a manifest, or without the autoencoder that encoded it."""
    path = config.store_path
    if not latent_cache.is_sealed(path):
        raise UserError(
            f"{path} has no manifest, which new videos can be added to: write one with `inspect --seal {path}`, then "
            "encode again, or encode everything again with `encode --overwrite`"
        )
    if checkpoint is None:
        raise UserError(
            f"{config.training_folder('autoencoder')} has no checkpoint, and the new videos need the autoencoder that "
            f"encoded {path}: restore it, or remove the new videos"
        )
    return checkpoint


def preview_appending(config: RiverConfig, run_context: RunContext) -> str:
    """What `encode` would append to a complete store, and about how long that takes; empty if nothing. Writes nothing.

    Raises:
        UserError: videos were removed or replaced since they were encoded.
    """
    if not store_status(config).is_done or not _videos_are_here(config):
        return ""
    splits = open_raw_splits(config, remember=False)
    added = added_videos(config, splits)
    if not added:
        return ""
    checkpoint = _check_appending(config, find_autoencoder(config.shared.run_path))
    tables = _only(added, splits)
    frames = sum(int(table.frames.sum()) * len(_views(config, split)) for split, table in tables.items())
    autoencoder = load_trained_autoencoder(checkpoint, run_context.device)
    rate = _network_rate(config, autoencoder, run_context.device)
    counts = ", ".join(f"{counted(len(table), 'video')} to {split}" for split, table in tables.items())
    return f"store: would add {counts}: {frames} frames, in about {duration(frames / rate)}"


def _network_rate(config: RiverConfig, autoencoder: Autoencoder, device: torch.device) -> float:
    """Frames per second of the network, measured on one batch, on all cores of a CPU; decoding can be slower."""
    encoder = FrameEncoder(autoencoder, device, config.dataset.frame_size, precision=config.cache.precision)
    frames = np.zeros((encoder.frames, *config.dataset.frame_size, 3), np.uint8)
    with torch.inference_mode(), exact_kernels(config.cache.precision):
        for _ in range(2):  # the first one warms up
            started = time.monotonic()
            encoder.encode(frames, [ViewTransform()] * len(frames)).codes.cpu()
            seconds = time.monotonic() - started
    # Encoding has one thread per core, and this batch had all of them at most.
    cores = len(os.sched_getaffinity(0)) / torch.get_num_threads() if device.type == "cpu" else 1
    return len(frames) / seconds * max(1, cores)


def _only(added: Mapping[str, Set[str]], splits: Mapping[str, VideoSource]) -> dict[str, VideoTable]:
    """The added videos of each split."""
    tables = {split: VideoTable.of(splits[split].videos) for split in added}
    return {
        split: table.select(np.flatnonzero([video_id in added[split] for video_id in table.ids]))
        for split, table in tables.items()
    }


def _views(config: RiverConfig, split: str) -> Sequence[str]:
    return config.cache.views if split == "train" else [IDENTITY_VIEW]


@dataclass(frozen=True)
class SplitSummary:
    """Summary of an encoded split.

    Attributes:
        measured: what is also written to the store's notes. `codes_used`; `code_perplexity`: exp of the entropy of the
            code frequencies; `round_trip_psnr`: dB, mean over a sample of frames, of the decoded stored latent against
            the frame; `codes_changed`: share of latents whose nearest code changes when they are rounded to the store's
            type; `codes_held`: share that was moved by a few last places towards their code, so that it stays.
    """

    split: str
    videos: int
    frames: int
    megabytes: float
    codes: int
    measured: dict[str, float]

    def line(self) -> str:
        measured = self.measured
        return (
            f"store: {self.split}: {counted(self.videos, 'video')}, {counted(self.frames, 'frame')}, "
            f"{self.megabytes:.1f} MB of latents, "
            f"{measured['codes_used']} of {self.codes} codes used (perplexity {measured['code_perplexity']:.0f}), "
            f"round trip {measured['round_trip_psnr']:.2f} dB, {measured['codes_changed']:.3%} of codes changed by "
            f"rounding ({measured['codes_held']:.3%} held)"
        )


class BrokenVideos(RootModel[dict[str, dict[str, tuple[str, str]]]]):
    """`broken.json` beside the finished chunks of an incomplete store: split -> id -> (fingerprint, reason)."""


class StoreEncoder:
    """Plans the chunks of all splits and has them encoded, here or on a cluster, until the store is complete.

    Args:
        splits: videos of each split.
        added: ids of the videos, by split, to append to a complete store; empty: all are encoded into a new one.
    """

    def __init__(
        self,
        config: RiverConfig,
        run_context: RunContext,
        checkpoint: Checkpoint,
        autoencoder: Autoencoder,
        splits: dict[str, VideoSource],
        added: Mapping[str, Set[str]] | None = None,
    ) -> None:
        self.config, self.run_context, self.checkpoint, self.autoencoder = config, run_context, checkpoint, autoencoder
        self.splits, self.metadata = splits, store_metadata(config, autoencoder, splits)
        self.tables = {split: VideoTable.of(source.videos) for split, source in splits.items()}
        self.path = config.store_path
        self.before: dict[str, LatentCache] = {}  # splits of the store that is appended to
        if added:
            self.before = {split: latent_cache.open(self.path, split) for split in latent_cache.splits(self.path)}
            self.metadata = replace(latent_cache.open_metadata(self.path), software=self.metadata.software)
            self.tables = _only({split: added.get(split, set()) for split in splits}, splits)
            self.path = next_generation(self.path)
        self.broken: dict[str, dict[str, str]] = {split: {} for split in splits}  # split -> id -> reason
        self.unreadable: dict[str, str] = {}  # id -> reason
        self.latent_shape = autoencoder.config.latent_shape(config.dataset.frame_size)
        small = preview_size(config)
        self.extras: dict[str, tuple[int, ...]] = {} if small is None else {PREVIEW: (*small, 3)}
        if size := max(source.action_size for source in splits.values()):
            self.extras[ACTIONS] = (size,)

    def run(self) -> list[SplitSummary]:
        """Encode all pending chunks; with `run_context.overwrite` all chunks."""
        overwrite = self.run_context.overwrite
        if not overwrite:
            self._recall_broken()
        stop = StopRequest()  # one for all attempts: it may come in one that a broken video ends
        while True:
            try:
                return self._attempt(overwrite, stop)
            except BrokenVideosError as error:
                # The plan had frames of these videos. Chunks before them stay, the others are planned again.
                self._skip(error.split, error.reasons)
                self._note_broken()
                # A store can lose videos, but no split: when a split lost its last video, start again.
                overwrite = not self.before and not self._videos(error.split)

    def _attempt(self, overwrite: bool, stop: StopRequest) -> list[SplitSummary]:
        plans = {split: self._plan(split) for split in self.splits if self._videos(split) or split in self.before}
        if "train" not in plans:
            raise UserError(f"{self.config.data_root}: no training video of {self.config.dataset.name} can be decoded")
        cache = self.config.cache
        options = {"codes": cache.codes, "extras": self.extras, "dtype": cache.dtype, "overwrite": overwrite}
        scheduler = self.run_context.scheduler
        if self.before:
            options["before"] = self.config.store_path.absolute()
        job = self._job(plans)
        self.unreadable.clear()
        with contextlib.ExitStack() as stack:
            # Whatever refuses to encode must do so before an old store is deleted.
            if scheduler is None:
                encoder = ChunkEncoder(job, self.autoencoder, self.run_context.device, stop)
                stack.enter_context(contextlib.closing(encoder))
                encode_chunks = functools.partial(run_here, encoder)
            else:
                client = stack.enter_context(connect(scheduler))
                encode_chunks = functools.partial(run_on_cluster, client, job, stop)
            stack.enter_context(stop)
            if self.before:
                stack.enter_context(latent_cache.replacing_store(options["before"]))
            writer = stack.enter_context(StoreWriter.open(self.path.absolute(), self.metadata, plans, **options))
            writer.check_space()
            if writer.bytes_needed() + writer.bytes_needed(PREVIEW) > (free := free_bytes(self.path)):
                warn(
                    f"store: {_unwritten(writer)} are to be written, and the disk of {self.path} has {size_text(free)} "
                    "left: free some, or lower cache.preview; if it becomes full, finished chunks are kept"
                )
            try:
                self._encode_pending(writer, encode_chunks)
                self._check_unreadable(at_most=0)
                summaries = [self._summary(writer, split) for split in plans if writer.markers(split)]
                writer.finish(self._notes(summaries), self._store_notes(), self._codebook())
            except EncodingStopped:
                raise StoppedBySignal(
                    stop.signal_number, f"stopped; {self.path} keeps its finished chunks, `encode` resumes"
                ) from None
            except NoSpaceError as error:
                raise NoSpaceError(
                    f"{error}; {_unwritten(writer)} are not written yet: free that much, then "
                    "`encode` resumes after the finished chunks"
                ) from error
        if stop:
            raise StoppedBySignal(stop.signal_number, f"stopped; {self.config.store_path} is complete")
        return summaries

    def _note_unreadable(self, reasons: dict[str, str]) -> None:
        """Videos that could not be read; if they are many, the disk or the network is away and nothing else works."""
        self.unreadable |= reasons
        self._check_unreadable(MOST_UNREADABLE)

    def _check_unreadable(self, at_most: int) -> None:
        """Raises InputUnreadable if more videos than these could not be read."""
        if len(self.unreadable) > at_most:
            listed = "".join(
                f"\n  {video}: {reason}" for video, reason in itertools.islice(self.unreadable.items(), 20)
            )
            raise InputUnreadable(
                f"{counted(len(self.unreadable), 'video')} could not be read; {self.path} keeps its "
                f"finished chunks, and `encode` tries these videos again:{listed}"
            )

    def _notes(self, summaries: Sequence[SplitSummary]) -> dict[str, dict[str, Any]]:
        """Notes of each split: what was measured when it was first encoded, and how many videos came later."""
        notes: dict[str, dict[str, Any]] = {split: dict(cache.notes) for split, cache in self.before.items()}
        for summary in summaries:
            if summary.split in notes:
                count = notes[summary.split].get("appended_videos", 0) + summary.videos
                notes[summary.split] |= {"appended_videos": count}
            else:
                notes[summary.split] = dict(summary.measured)
        return notes

    def _store_notes(self) -> dict[str, Any]:
        skipped = self._skipped()
        if not self.before:
            return {"skipped": skipped} | division_note(self.config)
        notes = latent_cache.open_notes(self.config.store_path)
        known = notes.get("skipped", {})
        return notes | {"skipped": {split: known.get(split, {}) | skipped.get(split, {}) for split in known | skipped}}

    @property
    def _broken_file(self) -> Path:
        return self.path / PROGRESS_FOLDER / "broken.json"

    def _note_broken(self) -> None:
        """Remember broken videos beside the finished chunks, whose plan leaves them out."""
        noted = {
            split: {video_id: (fingerprint, self.broken[split][video_id]) for video_id, fingerprint in ids.items()}
            for split, ids in self._skipped().items()
        }
        write_json(self._broken_file, BrokenVideos(noted))

    def _recall_broken(self) -> None:
        """Leave out videos that an earlier command found broken, unless their files have changed."""
        noted: dict[str, dict[str, tuple[str, str]]] = {}
        with contextlib.suppress(UserError):  # without the file they are found broken again
            noted = read_json(self._broken_file, BrokenVideos, "").root
        for split, table in self.tables.items():
            now = dict(zip(table.ids, table.fingerprints, strict=True))
            broken = noted.get(split, {}).items()
            self._skip(split, {video: reason for video, (before, reason) in broken if now.get(video) == before})

    def _skip(self, split: str, reasons: dict[str, str]) -> None:
        self.broken[split] |= reasons
        for video_id, reason in reasons.items():
            self.run_context.skip(video_id, reason)

    def _videos(self, split: str) -> VideoTable:
        table = self.tables[split]
        return table.select(np.flatnonzero([video_id not in self.broken[split] for video_id in table.ids]))

    def _skipped(self) -> dict[str, dict[str, str]]:
        """Fingerprints of the videos that cannot be decoded, by split and id, in the order of the index."""
        return {
            split: {video.id: video.fingerprint for video in self.tables[split] if video.id in ids}
            for split, ids in self.broken.items()
            if ids
        }

    def _index_frames(self, split: str) -> int:
        """Frames of a split, broken videos included: so the number does not change when a video turns out broken.

        It decides the chunk size and which frames are measured, and finished chunks are kept.
        """
        return int(self.tables[split].frames.sum()) * len(_views(self.config, split))

    def _plan(self, split: str) -> SplitPlan:
        cache = self.config.cache
        views = _views(self.config, split)
        # Views of a video are adjacent, so that one pass over the video serves them all.
        videos = self._videos(split)
        each = np.repeat(np.arange(len(videos)), len(views)).tolist()
        before = self.before.get(split)
        if before is None:
            frames = self._index_frames(split)
            chunk_frames = cache.chunk_frames or latent_cache.default_chunk_frames(self.latent_shape, frames)
            shard_chunks = latent_cache.default_shard_chunks(frames, chunk_frames)
        else:
            chunk_frames = before.latents.chunks[0]
            shard_chunks = (before.latents.shards or before.latents.chunks)[0] // chunk_frames
        return SplitPlan(
            video_ids=[*(before.video_ids if before else ()), *(videos.ids[row] for row in each)],
            video_views=[*(before.video_views if before else ()), *(list(views) * len(videos))],
            lengths=_joined(before and before.lengths, np.repeat(videos.frames, len(views))),
            latent_shape=self.latent_shape,
            chunk_frames=chunk_frames,
            fingerprints=[*(before.fingerprints if before else ()), *(videos.fingerprints[row] for row in each)],
            fps=_joined(before and before.video_fps, np.repeat(videos.fps, len(views))),
            sizes=_joined(before and before.video_sizes, np.repeat(videos.sizes, len(views), axis=0)),
            shard_chunks=shard_chunks,
        )

    def _codebook(self) -> np.ndarray | None:
        """What codes stand for, if they are stored: [code, channel] float32."""
        codebook = self.autoencoder.quantizer.codebook
        return codebook.detach().float().cpu().numpy() if self.config.cache.codes else None

    def _job(self, plans: dict[str, SplitPlan]) -> EncodeJob:
        run_context = self.run_context
        return EncodeJob(
            splits=self.splits,
            cache=self.config.cache,
            checkpoint=replace(self.checkpoint, path=self.checkpoint.path.absolute()),
            digest=self.metadata.autoencoder["sha256"],
            # Each worker finds its own device, unless the user named one.
            device=str(run_context.device) if run_context.scheduler is None else run_context.asked_device,
            latent_shape=self.latent_shape,
            extras=self.extras,
            psnr_stride={split: self._psnr_stride(split) for split in plans},
            chunk_frames=max(plan.file_frames for plan in plans.values()),
            code=code_fingerprint(),
        )

    def _psnr_stride(self, split: str) -> int:
        """Of the few frames that are appended, some are measured wherever they begin."""
        stride = -(-self._index_frames(split) // PSNR_FRAMES)
        return max(1 if self.before else PSNR_STRIDE, stride)

    def _encode_pending(self, writer: StoreWriter, encode_chunks: Callable[..., None]) -> None:
        """Call `encode_chunks(writer, [(split, chunk), ...], on_frames, on_unreadable)` with the pending chunks."""
        tasks = []
        for split, plan in writer.plans.items():
            pending = writer.pending(split)
            tasks += [(split, chunk) for chunk in pending]
            if len(pending) < len(plan.chunks):
                finished = len(plan.chunks) - len(pending)
                say(f"store: {split}: {finished} of {len(plan.chunks)} chunks are already encoded")
        if not tasks:
            return
        total, frames = sum(plan.frames for plan in writer.plans.values()), sum(chunk.frames for _, chunk in tasks)
        say(f"store: encoding {frames} frames")
        started, done, next_report = time.monotonic(), 0, REPORT_SECONDS
        with progress(total=total, initial=total - frames, description="encode", unit="frame") as bar:

            def on_frames(count: int) -> None:
                nonlocal done, next_report
                done, seconds = done + count, time.monotonic() - started
                bar.update(count)
                if bar.disable and seconds >= next_report and done < frames:
                    next_report = 2 * seconds
                    left = duration(seconds * (frames - done) / done)
                    say(f"store: {done} of {frames} frames encoded, {done / seconds:.0f} frames/s, about {left} left")

            encode_chunks(writer, tasks, on_frames, self._note_unreadable)
        seconds = time.monotonic() - started
        say(f"store: {frames} frames encoded in {duration(seconds)}, {frames / seconds:.0f} frames/s")

    def _summary(self, writer: StoreWriter, split: str) -> SplitSummary:
        """Summary from the markers of all chunks."""
        videos = self._videos(split)
        frames = int(videos.frames.sum()) * len(_views(self.config, split))
        markers = [marker.measured for marker in writer.markers(split)]
        counts = np.zeros(self.autoencoder.config.codes, np.int64)
        for measured in markers:
            counts[: len(measured["code_counts"])] += measured["code_counts"]
        latents = int(counts.sum())
        return SplitSummary(
            split=split,
            videos=len(videos),
            frames=frames,
            megabytes=frames * np.prod(self.latent_shape) * np.dtype(self.config.cache.dtype).itemsize / 1e6,
            codes=len(counts),
            measured={
                "codes_used": int((counts > 0).sum()),
                "code_perplexity": perplexity(counts),
                "round_trip_psnr": float(np.mean([value for measured in markers for value in measured["psnr"]])),
                "codes_changed": sum(measured["codes_changed"] for measured in markers) / latents,
                "codes_held": sum(measured["codes_held"] for measured in markers) / latents,
            },
        )


def _unwritten(writer: StoreWriter) -> str:
    """Size of the pending chunks, without what is small."""
    previews = writer.bytes_needed(PREVIEW)
    more = f" and, before compression, {size_text(previews)} of previews" if previews else ""
    return f"{size_text(writer.bytes_needed())} of latents{more}"


def _joined(before: np.ndarray | None, new: np.ndarray) -> np.ndarray:
    return new if before is None else np.concatenate([before, new])
