"""`convert`: the frames of any source as folders of pictures, `<out>/<split>/<video>/<frame>.png`.

They are the frames that are trained on: cropped, resized, every `frame_step`-th. The official code makes its HDF5
shards of such folders, and `source: videos` reads them back: from PNG the same pixels, bit for bit.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config import RiverConfig
from pipelines.data.datasets import open_videos
from pipelines.data.frame_writer import Entry, ImageFormat, Job, Record, Writer, check_place, folder_names, open_record
from pipelines.errors import StoppedBySignal, UserError
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import size_text
from pipelines.runtime.progress import progress, say, warn
from pipelines.runtime.signals import StopRequest
from stage1_autoencoder.videos import dataset_root, preprocessing_description
from stage1_autoencoder.videos.config import Split
from stage1_autoencoder.videos.source import BrokenVideoError, VideoSource
from stage1_autoencoder.videos.splits import join_names


@dataclass(frozen=True)
class ConvertedSplit:
    """What converting one split came to.

    Attributes:
        videos, frames: that are there now, of those that were asked for.
        written: videos among them that this command wrote.
        written_bytes: of its pictures.
    """

    split: Split
    videos: int
    frames: int
    written: int
    written_bytes: int


def convert(
    config: RiverConfig,
    run_context: RunContext,
    out: Path,
    *,
    image_format: ImageFormat = "png",
    splits: Sequence[Split] | None = None,
    quality: int = 95,
    videos: int | None = None,
) -> list[ConvertedSplit]:
    """Write what is not there yet; a video is there whole or not at all.

    Args:
        out: the folder to write to.
        splits: only these.
        quality: of jpg pictures, 1 to 100.
        videos: of each split, only the first so many.
    Raises:
        UserError: a folder that is not ours to write to, pictures in it that contradict, ids that make equal names.
        VideoError: no videos.
        NoSpaceError: the disk is full.
        StoppedBySignal: what was finished is kept.
    """
    if not 1 <= quality <= 100:
        raise UserError(f"--quality {quality}: allowed are 1 to 100")
    out = out.expanduser()
    _check_apart(config, out)
    check_place(out)
    sources = open_videos(config, run_context)
    chosen = list(dict.fromkeys(splits or sources))
    if missing := [split for split in chosen if split not in sources]:
        raise UserError(f"--split {missing[0]}: {config.dataset.name} has {', '.join(sources)}")
    settings = preprocessing_description(config.dataset) | {"format": image_format}
    if image_format == "jpg":
        settings["quality"] = quality
    jobs = {split: list(_jobs(split, source)) for split, source in sources.items()}
    with open_record(out, settings, run_context.overwrite) as record:
        _refuse_others(record, list(itertools.chain(*jobs.values())), run_context.overwrite)
        asked = [job for split in chosen for job in jobs[split][:videos]]
        pending = [job for job in asked if not record.is_whole(job.name, f".{image_format}")]
        _refuse_foreign(record, pending)
        writer = Writer(record, sources, image_format, quality)
        _announce(config, out, asked, pending, writer)
        if pending:
            _write_all(pending, writer, run_context)
        lacking = {job.name for job in pending} - writer.written.keys()
        there = [job for job in asked if job.name not in lacking]
        reports = [_report(split, [job for job in there if job.split == split], writer) for split in chosen]
        for report in reports:
            new = f", {report.written} of them new ({size_text(report.written_bytes)})" if report.written else ""
            say(f"convert: {report.split}: {report.videos} videos, {report.frames} frames in {out / report.split}{new}")
        say(_way_back(out, record))
    return reports


def _check_apart(config: RiverConfig, out: Path) -> None:
    if config.dataset.source == "shapes":
        return
    root = dataset_root(config.dataset, config.data_root)
    if out.resolve().is_relative_to(root.resolve()):
        raise UserError(f"--out {out}: lies in {root}, where the videos are read from; name a folder elsewhere")


def _jobs(split: Split, source: VideoSource) -> Iterator[Job]:
    videos = list(source.videos)
    try:
        names = folder_names([video.id for video in videos])
    except UserError as error:
        raise UserError(f"{split}: {error}") from None
    for index, (video, name) in enumerate(zip(videos, names, strict=True)):
        yield Job(split, f"{split}/{name}", index, Entry(video.id, video.fingerprint, video.frames))


def _refuse_others(record: Record, jobs: list[Job], overwrite: bool) -> None:
    """What was written of other videos than those of the source: remove it, or refuse to add to it."""
    entries = {job.name: job.entry for job in jobs}
    others = sorted(name for name, entry in record.entries.items() if entries.get(name) != entry)
    if not others:
        return
    if overwrite:
        record.remove(others)
        return
    kind = "has changed in the source" if others[0] in entries else "is not among its videos now"
    raise UserError(
        f"--out {record.out}: {len(others)} of its {len(record.entries)} videos are from another source: {others[0]} "
        f"{kind}; name another folder, or replace them with --overwrite"
    )


def _refuse_foreign(record: Record, pending: list[Job]) -> None:
    for job in pending:
        if job.name not in record.entries and (record.out / job.name).exists():
            raise UserError(
                f"{record.out / job.name}: is there, and was not written by convert; remove it, or name another --out"
            )


def _announce(config: RiverConfig, out: Path, asked: list[Job], pending: list[Job], writer: Writer) -> None:
    """Say what there is to do, and about how much room it takes."""
    side, frames = config.dataset.image_size, sum(job.entry.frames for job in pending)
    done = f", {len(asked) - len(pending)} of them are there" if len(pending) < len(asked) else ""
    counts = f"{len(asked)} videos, {sum(job.entry.frames for job in asked)} frames"
    say(f"convert: {config.dataset.name} -> {out}: {counts} of {side}x{side} as {writer.image_format}{done}")
    renamed = [job for job in pending if job.name != f"{job.split}/{job.entry.id}"]
    if renamed:
        example = f"{renamed[0].entry.id!r} is in {renamed[0].name}"
        say(f"convert: {len(renamed)} ids are no safe names of folders and were changed: {example}")
    if not pending:
        return
    disk = os.statvfs(out)
    free = disk.f_bavail * disk.f_frsize
    room = frames * -(-writer.picture_bytes(pending) // disk.f_frsize) * disk.f_frsize
    say(f"convert: {frames} files, about {size_text(room)} on the disk, which has {size_text(free)} free")
    if room > free:
        warn(f"{out}: this is more than the disk has left; where it ends, the same command goes on later")
    if 0 < disk.f_files and disk.f_favail < frames:
        warn(f"{out}: its file system takes {disk.f_favail} more files only")


def _write_all(pending: list[Job], writer: Writer, run_context: RunContext) -> None:
    cores = len(os.sched_getaffinity(0))
    waiting, running = iter(pending), dict[Future, Job]()
    frames = sum(job.entry.frames for job in pending)
    finished = 0
    with (
        StopRequest() as stop,
        progress(total=frames, description="convert", unit="frame") as bar,
        ThreadPoolExecutor(cores) as pool,
    ):
        try:
            while not stop:
                for job in itertools.islice(waiting, 2 * cores - len(running)):
                    running[pool.submit(writer.write, job)] = job
                if not running:
                    return
                done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                bar.update(writer.frames - bar.n)
                for future in done:
                    job = running.pop(future)
                    finished += 1
                    bar.set_postfix_str(f"{finished}/{len(pending)} videos", refresh=False)
                    try:
                        future.result()
                    except BrokenVideoError as error:
                        run_context.skip(job.entry.id, error.reason)
        finally:
            writer.stopping.set()
            for future in running:
                future.cancel()
    raise StoppedBySignal(
        stop.signal_number, f"stopped; {writer.record.out} keeps its whole videos, the same command goes on from there"
    )


def _report(split: Split, there: list[Job], writer: Writer) -> ConvertedSplit:
    written = [writer.written[job.name] for job in there if job.name in writer.written]
    return ConvertedSplit(split, len(there), sum(job.entry.frames for job in there), len(written), sum(written))


def _way_back(out: Path, record: Record) -> str:
    splits = {name.partition("/")[0] for name in record.entries}
    if "train" not in splits:
        there = join_names(sorted(splits)) or "nothing"
        return f"convert: there is {there}; to train on {out} (dataset.source=videos), convert the train split too"
    sets: dict[str, Any] = {"source": "videos", "root": out, "frame_step": 1}
    if "val" not in splits:
        sets["splits"] = "'{val: 0}'"  # or a tenth of the training videos is taken
    words = " ".join(f"--set dataset.{key}={value}" for key, value in sets.items())
    return f"convert: to read them: {words}"
