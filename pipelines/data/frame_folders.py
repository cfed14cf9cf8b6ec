"""Any video source as folders of pictures, `<out>/<split>/<video>/<frame>.png`.

The frames are those that the autoencoder is trained on: cropped, resized, every `frame_step`-th. The official code
makes its HDF5 shards of such folders, and `source: videos` reads them back: from PNG the same pixels, bit for bit.

A video is written into a hidden folder and renamed when it is complete, so a video's folder is complete whenever the
process was killed. `.river_convert.json` says which folders are ours, and what they were made of.
"""

import hashlib
import io
import itertools
import os
import re
import shlex
import shutil
import threading
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from PIL import Image
from pydantic import AfterValidator, BaseModel

from latent_cache import NoSpaceError
from pipelines.config import RiverConfig
from pipelines.data.datasets import open_videos
from pipelines.errors import StoppedBySignal, UserError
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import flush_tree, free_bytes, is_full, locked, read_json, size_text, write_json
from pipelines.runtime.progress import counted, progress, say, warn
from pipelines.runtime.signals import StopRequest
from stage1_autoencoder.videos import dataset_root, preprocessing_description
from stage1_autoencoder.videos.config import Split
from stage1_autoencoder.videos.source import BrokenVideoError, VideoSource

ImageFormat = Literal["png", "jpg"]

RECORD_NAME = ".river_convert.json"
LOCK_NAME = ".river_convert.lock"
UNFINISHED_NAME = ".river_convert.unfinished"

PNG_LEVEL = 1  # of zlib. Measured at 128x128: 1.4 ms and 21 kB per frame; level 6 takes 5.0 ms for 10 % less.


class RecordedVideo(BaseModel, frozen=True):
    """A video as its source has it: its id, the fingerprint of its content, and its number of frames."""

    id: str
    fingerprint: str
    frames: int


def _inside(folder: str) -> str:
    path = PurePosixPath(folder)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError("expected a folder inside, such as train/clip")
    return folder


class ConvertRecord(BaseModel):
    """`.river_convert.json` of an output folder, written before its videos.

    Attributes:
        settings: everything but the videos that pictures depend on.
        videos: by folder (`train/clip`). Those whose folder exists are complete, unless files were removed.
    """

    settings: dict[str, str | int | float | list[int]]
    videos: dict[Annotated[str, AfterValidator(_inside)], RecordedVideo]


@dataclass(frozen=True)
class _Job:
    """One video to write to `folder` (`train/clip`), and its place in its source."""

    split: Split
    index: int
    folder: str
    video: RecordedVideo


def convert(
    config: RiverConfig,
    run_context: RunContext,
    out: Path,
    *,
    image_format: ImageFormat = "png",
    splits: Sequence[Split] | None = None,
    quality: int = 95,
    videos: int | None = None,
) -> None:
    """Write the videos that are not there yet. Each is there completely or not at all.

    Args:
        out: the folder to write to.
        splits: only these.
        quality: of jpg pictures, 1 to 100.
        videos: limit per split.
    Raises:
        UserError: `out` has files of others, or pictures that contradict; ids that give equal folder names.
        VideoError: no videos.
        NoSpaceError: the disk is full.
        StoppedBySignal: complete videos are kept.
    """
    if not 1 <= quality <= 100:
        raise UserError(f"--quality {quality}: allowed are 1 to 100")
    _check_out(config, out)
    sources = open_videos(config, run_context)
    chosen = list(dict.fromkeys(splits or sources))
    if missing := [split for split in chosen if split not in sources]:
        raise UserError(f"--split {missing[0]}: {config.dataset.name} has {', '.join(sources)}")
    jobs = {split: list(_jobs(split, source)) for split, source in sources.items()}
    asked = [job for split in chosen for job in jobs[split][:videos]]
    settings = preprocessing_description(config.dataset) | {"format": image_format}
    if image_format == "jpg":
        settings["quality"] = quality
    busy = f"--out {out}: process {{pid}} converts into it; wait for it, or stop it"
    unfinished = out / UNFINISHED_NAME
    with _output_errors(out), locked(out / LOCK_NAME, busy):
        shutil.rmtree(unfinished, ignore_errors=True)  # of a killed process
        unfinished.mkdir()
        try:
            _record(out, settings, list(itertools.chain(*jobs.values())), asked, run_context.overwrite)
            pictures = {job: _count_pictures(out / job.folder, image_format) for job in asked}
            pending = [job for job, count in pictures.items() if count != job.video.frames]
            writer = _Writer(out, sources, image_format, quality)
            _announce(config, asked, pending, writer)
            written = _write_all(pending, writer, run_context)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    failed = {job.folder for job in pending} - written
    for split in chosen:
        there = [job for job in asked if job.split == split and job.folder not in failed]
        frames = sum(job.video.frames for job in there)
        say(f"convert: {split}: {counted(len(there), 'video')}, {frames} frames in {out / split}")
    say(_reading_back(config, out, sorted(split for split in sources if (out / split).is_dir())))


def _check_out(config: RiverConfig, out: Path) -> None:
    """Raises UserError if `out` is no folder to write to. Writes nothing."""
    root = dataset_root(config.dataset, config.data_root)
    if config.dataset.source != "shapes" and out.resolve().is_relative_to(root.resolve()):
        raise UserError(f"--out {out}: is inside {root}, from which the videos are read; name a folder elsewhere")
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    with _output_errors(out):
        names = sorted(name for name in os.listdir(out) if not name.startswith("."))
    if names and not (out / RECORD_NAME).exists():
        raise UserError(f"--out {out}: contains {names[0]}, which convert did not write; name a new or empty folder")


def _jobs(split: Split, source: VideoSource) -> Iterator[_Job]:
    videos = list(source.videos)
    try:
        names = folder_names([video.id for video in videos])
    except UserError as error:
        raise UserError(f"{split}: {error}") from None
    for index, (video, name) in enumerate(zip(videos, names, strict=True)):
        recorded = RecordedVideo(id=video.id, fingerprint=video.fingerprint, frames=video.frames)
        yield _Job(split, index, f"{split}/{name}", recorded)


def _record(
    out: Path,
    settings: dict[str, str | int | float | list[int]],
    jobs: Sequence[_Job],
    asked: Sequence[_Job],
    overwrite: bool,
) -> None:
    """Record what is going to be written. Pictures of other settings or videos are removed with `overwrite`.

    Raises:
        UserError: such pictures without `overwrite`; a folder that is not ours in the way; a damaged record.
    """
    path = out / RECORD_NAME
    old = ConvertRecord(settings=settings, videos={})
    if path.exists():
        old = read_json(path, ConvertRecord, f"remove {out}, or name another folder")
    ours = {folder: video for folder, video in old.videos.items() if (out / folder).exists()}
    current = {job.folder: job.video for job in jobs}
    changed = [
        f"{key} {old.settings.get(key)!r} (now {settings.get(key)!r})"
        for key in old.settings | settings
        if old.settings.get(key) != settings.get(key)
    ]
    stale = {folder: video for folder, video in ours.items() if changed or current.get(folder) != video}
    if stale and not overwrite:
        why = f"made with {', '.join(changed)}"
        if not changed:
            example = min(stale)
            why = f"{example} {'has changed in the source' if example in current else 'is no longer in the source'}"
        raise UserError(
            f"--out {out}: {len(stale)} of its {len(ours)} videos are from other settings or videos: {why}; name "
            "another folder, or replace them with --overwrite"
        )
    for job in asked:
        if job.folder not in ours and (out / job.folder).exists():
            raise UserError(f"{out / job.folder}: convert did not write it; remove it, or name another --out")
    for folder in stale:
        _remove(out / folder, out / UNFINISHED_NAME / "removed")
        with suppress(OSError):  # other videos are in them
            for parent in Path(folder).parents[:-1]:
                (out / parent).rmdir()
    videos = {folder: video for folder, video in ours.items() if folder not in stale}
    videos |= {job.folder: job.video for job in asked}
    write_json(path, ConvertRecord(settings=settings, videos=dict(sorted(videos.items()))))


def _count_pictures(folder: Path, image_format: ImageFormat) -> int:
    """The pictures of a video's folder that are not empty."""
    return sum(1 for picture in folder.glob(f"*.{image_format}") if picture.stat().st_size)


def _remove(folder: Path, temporary: Path) -> None:
    """Remove a video's folder, if there is one. It is renamed first, so that no part of it is ever at its place."""
    if folder.exists():
        if not folder.resolve().is_relative_to(temporary.parents[1].resolve()):
            raise UserError(f"{folder}: leads out of {temporary.parents[1]} by a link; remove the link")
        folder.rename(temporary)
        shutil.rmtree(temporary)


@dataclass(frozen=True)
class _Writer:
    """Encodes and writes videos; used by many threads."""

    out: Path
    sources: Mapping[Split, VideoSource]
    image_format: ImageFormat
    quality: int

    def write(self, job: _Job, advance: Callable[[], bool]) -> None:
        """Write one video and move it into place.

        Args:
            advance: called after each frame; whether to continue. If not, nothing of the video is left.
        Raises:
            BrokenVideoError: nothing of it is left.
        """
        folder = self.out / UNFINISHED_NAME / f"{job.split}-{job.index}"
        digits = max(5, len(str(job.video.frames - 1)))
        count = 0
        try:
            folder.mkdir()
            for count, content in enumerate(self.pictures(job), start=1):
                (folder / f"{count - 1:0{digits}d}.{self.image_format}").write_bytes(content)
                if not advance():
                    return
            assert count == job.video.frames, f"{count} frames of {job.folder}, which has {job.video.frames}"
            _remove(self.out / job.folder, folder.with_suffix(".removed"))  # an incomplete one
            (self.out / job.folder).parent.mkdir(parents=True, exist_ok=True)
            flush_tree(folder)
            folder.rename(self.out / job.folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def pictures(self, job: _Job) -> Iterator[bytes]:
        """The files of a video's frames."""
        options = {"format": "PNG", "compress_level": PNG_LEVEL}
        if self.image_format == "jpg":
            options = {"format": "JPEG", "quality": self.quality, "subsampling": 0}
        for frame in self.sources[job.split].iterate(job.index):
            content = io.BytesIO()
            Image.fromarray(frame).save(content, **options)
            yield content.getvalue()


def _announce(config: RiverConfig, asked: Sequence[_Job], pending: Sequence[_Job], writer: _Writer) -> None:
    """Print what there is to do, and warn if the disk is too small for it."""
    out, (height, width) = writer.out, config.dataset.frame_size
    done = f", {len(asked) - len(pending)} of them are there" if len(pending) < len(asked) else ""
    counts = f"{counted(len(asked), 'video')}, {sum(job.video.frames for job in asked)} frames"
    say(f"convert: {config.dataset.name} -> {out}: {counts} of {width}x{height} as {writer.image_format}{done}")
    if renamed := [job for job in pending if job.folder != f"{job.split}/{job.video.id}"]:
        example = f"{renamed[0].video.id!r} is in {renamed[0].folder}"
        say(f"convert: {len(renamed)} ids are no safe folder names and were changed: {example}")
    if pending:
        with suppress(BrokenVideoError):
            typical, files = len(next(writer.pictures(pending[0]))), sum(job.video.frames for job in pending)
            needed, free = files * typical, free_bytes(out)
            say(f"convert: {files} files, about {size_text(needed)} on the disk, which has {size_text(free)} free")
            if needed > free:
                warn(f"{out}: the disk may be too small; if it fills up, free space: the same command resumes")


def _write_all(pending: Sequence[_Job], writer: _Writer, run_context: RunContext) -> set[str]:
    """Write videos in parallel. Returns the folders that were written; broken videos are skipped."""
    frames = sum(job.video.frames for job in pending)
    lock, failed, written = threading.Lock(), threading.Event(), set[str]()
    with (
        StopRequest() as stop,
        progress(total=frames, description="convert", unit="frame") as bar,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
    ):

        def advance() -> bool:
            with lock:
                bar.update()
            return not (stop or failed.is_set())

        futures = {pool.submit(writer.write, job, advance): job for job in pending}
        try:
            for future in as_completed(futures):
                if stop:
                    break
                job = futures[future]
                try:
                    future.result()
                    written.add(job.folder)
                except BrokenVideoError as error:
                    run_context.skip(job.video.id, error.reason)
        except BaseException:
            failed.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    if stop:
        raise StoppedBySignal(
            stop.signal_number, f"stopped; {writer.out} keeps complete videos, the same command resumes from there"
        )
    return written


@contextmanager
def _output_errors(out: Path) -> Iterator[None]:
    """Turn errors of the output folder into messages; those of videos are no OSError."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise NoSpaceError(
                f"{out}: the disk is full; complete videos are kept: free some space, and the same command resumes"
            ) from error
        raise UserError(f"--out {out}: cannot be used ({error})") from error


def _reading_back(config: RiverConfig, out: Path, splits: Sequence[Split]) -> str:
    if "train" not in splits:
        return f"convert: to train on {out} (dataset.source=videos), convert the train split too"
    held_out = "" if "val" in splits else " --set dataset.splits='{val: 0}'"  # or a tenth of the training videos is
    root = shlex.quote(str(out))
    as_they_are = "" if config.dataset.fps is None else " --set dataset.fps=null"
    return (
        f"convert: to read them: --set dataset.source=videos --set dataset.root={root} --set dataset.frame_step=1"
        f"{as_they_are}{held_out}"
    )


_MAX_NAME_BYTES = 200  # file systems allow 255, and readers may want to add something

# A dot at the beginning hides a name. The rest is what Windows and many network drives refuse. A % would make two
# ids equal.
_RESERVED = re.compile(r'^\.|[<>:"\\|?*\x00-\x1f\x7f]|%(?=[0-9A-Fa-f]{2})|[. ]$')


def folder_names(ids: Sequence[str]) -> list[str]:
    """The folder of each video of a split.

    A `/` in an id means folders in folders. Characters that some file systems refuse become %3A and the like; folders
    that would contain other videos get a `_`; long names are cut and end in a digest.

    Raises:
        UserError: two that are equal, or differ by case alone, which many file systems ignore.
    """
    names = ["/".join(map(_name, video_id.split("/"))) for video_id in ids]
    folders = {str(parent) for name in names for parent in Path(_folded(name)).parents}
    names = [f"{name}_" if _folded(name) in folders else name for name in names]
    seen: dict[str, int] = {}
    for row, name in enumerate(names):
        if (other := seen.setdefault(_folded(name), row)) != row:
            raise UserError(
                f"videos {ids[other]!r} and {ids[row]!r} would be the folders {names[other]} and {name}, which not "
                "every file system tells apart: rename one of them"
            )
    return names


def _name(part: str) -> str:
    readable = part.encode(errors="backslashreplace").decode()
    name = _RESERVED.sub(lambda character: f"%{ord(character[0]):02X}", readable) or "_"
    if len(name.encode()) > _MAX_NAME_BYTES:
        start = name.encode()[: _MAX_NAME_BYTES - 13].decode(errors="ignore")
        name = f"{start}~{hashlib.sha256(readable.encode()).hexdigest()[:12]}"
    return name


def _folded(name: str) -> str:
    """A name as a file system has it that ignores case and the two ways to write an accent."""
    return unicodedata.normalize("NFC", name.casefold())
