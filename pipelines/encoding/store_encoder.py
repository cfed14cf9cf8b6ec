"""From videos to a complete store: plans the chunks of all splits, has them encoded, summarizes the result."""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import RootModel

import latent_cache
from latent_cache import NoSpaceError, SplitPlan, StoreWriter
from latent_cache.schema import IDENTITY_VIEW, PROGRESS_FOLDER
from pipelines.config import RiverConfig
from pipelines.data.datasets import division_note, open_videos
from pipelines.encoding.chunk_encoder import BrokenVideosError, ChunkEncoder, EncodeJob, EncodingStopped
from pipelines.encoding.cluster import code_fingerprint, connect, run_here, run_on_cluster
from pipelines.encoding.store_checks import check_layout, check_sources, store_metadata, store_status
from pipelines.encoding.store_summary import perplexity
from pipelines.errors import InputUnreadable, StoppedBySignal, UserError
from pipelines.loading import load_trained_autoencoder
from pipelines.runtime.checkpoints import Checkpoint
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import read_json, size_text, write_json
from pipelines.runtime.progress import counted, duration, progress, say, warn
from pipelines.runtime.run_folder import write_run_files
from pipelines.runtime.signals import StopRequest
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.videos import dataset_root
from stage1_autoencoder.videos.source import VideoSource, VideoTable

# Warn when storing in `cache.dtype` changes the nearest code of more than this share of the latents.
MOST_CODES_CHANGED = 1e-3
# Every PSNR_STRIDE-th frame of a split is decoded again to measure the round trip, but at most PSNR_FRAMES of them.
PSNR_STRIDE = 64
PSNR_FRAMES = 32
# Encoding goes on without the chunks of this many videos that cannot be read.
MOST_UNREADABLE = 100
# Without a terminal, which has a bar, the rate is reported after this many seconds, then at twice that time, and so on.
REPORT_SECONDS = 20.0


def encode(config: RiverConfig, run_context: RunContext, checkpoint: Checkpoint) -> Path:
    """Encode every split into the store, or resume that; do nothing when the store is complete and the right one.

    Args:
        checkpoint: of the run's autoencoder.
    Returns:
        Path of the complete store.
    Raises:
        UserError: without `run_context.overwrite`: the store is of another autoencoder or other preprocessing, or is
            complete and has another layout or other videos.
        StoreError: an incomplete store of another layout; a store that another process writes; a full disk.
        StoppedBySignal: after a signal; finished chunks are kept.
        InputUnreadable: videos could not be read this time; finished chunks are kept.
    """
    path, status = config.store_path, store_status(config)
    if not run_context.overwrite and status.state == "conflicting":
        raise UserError(status.detail)
    if not run_context.overwrite and status.is_done:
        _check_complete(config, run_context)
        return path
    autoencoder = load_trained_autoencoder(checkpoint, run_context.device)
    splits = open_videos(config, run_context)
    write_run_files(config.shared, run_context.device)
    for summary in StoreEncoder(config, run_context, checkpoint, autoencoder, splits).run():
        say(summary.line())
        if (changed := summary.measured["codes_changed"]) > MOST_CODES_CHANGED:
            warn(
                f"store: {summary.split}: storing latents as {config.cache.dtype} changed the nearest code of "
                f"{changed:.2%} of them: set cache.dtype to float32 and encode again with --overwrite, "
                "or train an autoencoder with smaller latents"
            )
    say(f"store: complete, {path}")
    return path


def _check_complete(config: RiverConfig, run_context: RunContext) -> None:
    """Refuse a complete store of another layout or, where its videos are here, of other videos."""
    check_layout(config)
    here = config.dataset.source == "shapes" or dataset_root(config.dataset, config.data_root).exists()
    if here or run_context.mirror is not None:
        check_sources(config, open_videos(config, run_context))
    say(f"store: done, {config.store_path}" + ("" if here else " (not compared with its videos, which are not here)"))


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
    """

    def __init__(
        self,
        config: RiverConfig,
        run_context: RunContext,
        checkpoint: Checkpoint,
        autoencoder: Autoencoder,
        splits: dict[str, VideoSource],
    ) -> None:
        self.config, self.run_context, self.checkpoint, self.autoencoder = config, run_context, checkpoint, autoencoder
        self.splits, self.metadata = splits, store_metadata(config, autoencoder, splits)
        self.tables = {split: VideoTable.of(source.videos) for split, source in splits.items()}
        self.broken: dict[str, dict[str, str]] = {split: {} for split in splits}  # split -> id -> reason
        self.unreadable: dict[str, str] = {}  # id -> reason
        self.latent_shape = autoencoder.config.latent_shape(config.dataset.frame_size)

    def run(self) -> list[SplitSummary]:
        """Encode all pending chunks; with `run_context.overwrite` all chunks."""
        overwrite = self.run_context.overwrite
        if not overwrite:
            self._recall_broken()
        while True:
            try:
                return self._attempt(overwrite)
            except BrokenVideosError as error:
                # The plan had frames of these videos. Chunks before them stay, the others are planned again.
                self._skip(error.split, error.reasons)
                self._note_broken()
                # A store can lose videos, but no split: when a split lost its last video, start again.
                overwrite = not self._videos(error.split)

    def _attempt(self, overwrite: bool) -> list[SplitSummary]:
        plans = {split: self._plan(split) for split in self.splits if self._videos(split)}
        if "train" not in plans:
            raise UserError(f"{self.config.data_root}: no training video of {self.config.dataset.name} can be decoded")
        options = {"codes": self.config.cache.codes, "dtype": self.config.cache.dtype, "overwrite": overwrite}
        path, scheduler = self.config.store_path.absolute(), self.run_context.scheduler
        job, stop = self._job(plans), StopRequest()
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
            writer = stack.enter_context(StoreWriter.open(path, self.metadata, plans, **options))
            stack.enter_context(stop)
            writer.check_space()
            try:
                self._encode_pending(writer, encode_chunks)
                self._check_unreadable(at_most=0)
                summaries = [self._summary(writer, split) for split in plans]
                notes = {summary.split: summary.measured for summary in summaries}
                writer.finish(notes, {"skipped": self._skipped()} | division_note(self.config), self._codebook())
            except EncodingStopped:
                raise StoppedBySignal(
                    stop.signal_number, f"stopped; {self.config.store_path} keeps its finished chunks, `encode` resumes"
                ) from None
            except NoSpaceError as error:
                raise NoSpaceError(
                    f"{error}; {size_text(writer.bytes_needed())} of latents are not written yet: free that much, then "
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
                f"{counted(len(self.unreadable), 'video')} could not be read; {self.config.store_path} keeps its "
                f"finished chunks, and `encode` tries these videos again:{listed}"
            )

    @property
    def _broken_file(self) -> Path:
        return self.config.store_path / PROGRESS_FOLDER / "broken.json"

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

    def _views(self, split: str) -> Sequence[str]:
        return self.config.cache.views if split == "train" else [IDENTITY_VIEW]

    def _index_frames(self, split: str) -> int:
        """Frames of a split, broken videos included: so the number does not change when a video turns out broken.

        It decides the chunk size and which frames are measured, and finished chunks are kept.
        """
        return int(self.tables[split].frames.sum()) * len(self._views(split))

    def _plan(self, split: str) -> SplitPlan:
        cache = self.config.cache
        views = self._views(split)
        # Views of a video are adjacent, so that one pass over the video serves them all.
        videos = self._videos(split)
        each = np.repeat(np.arange(len(videos)), len(views)).tolist()
        frames = self._index_frames(split)
        chunk_frames = cache.chunk_frames or latent_cache.default_chunk_frames(self.latent_shape, frames)
        return SplitPlan(
            video_ids=[videos.ids[row] for row in each],
            video_views=list(views) * len(videos),
            lengths=np.repeat(videos.frames, len(views)),
            latent_shape=self.latent_shape,
            chunk_frames=chunk_frames,
            fingerprints=[videos.fingerprints[row] for row in each],
            fps=np.repeat(videos.fps, len(views)),
            sizes=np.repeat(videos.sizes, len(views), axis=0),
            shard_chunks=latent_cache.default_shard_chunks(frames, chunk_frames),
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
            psnr_stride={split: max(PSNR_STRIDE, -(-self._index_frames(split) // PSNR_FRAMES)) for split in plans},
            chunk_frames=max(plan.file_frames for plan in plans.values()),
            code=code_fingerprint(),
        )

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
        plan = writer.plans[split]
        markers = [marker.measured for marker in writer.markers(split)]
        counts = np.zeros(self.autoencoder.config.codes, np.int64)
        for measured in markers:
            counts[: len(measured["code_counts"])] += measured["code_counts"]
        latents = int(counts.sum())
        return SplitSummary(
            split=split,
            videos=len(set(plan.video_ids)),
            frames=plan.frames,
            megabytes=plan.frames * np.prod(self.latent_shape) * np.dtype(self.config.cache.dtype).itemsize / 1e6,
            codes=len(counts),
            measured={
                "codes_used": int((counts > 0).sum()),
                "code_perplexity": perplexity(counts),
                "round_trip_psnr": float(np.mean([value for measured in markers for value in measured["psnr"]])),
                "codes_changed": sum(measured["codes_changed"] for measured in markers) / latents,
                "codes_held": sum(measured["codes_held"] for measured in markers) / latents,
            },
        )
