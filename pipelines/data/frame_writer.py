"""Writing videos as folders of pictures, by many threads: each in a hidden folder first, then whole at its place."""

import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import threading
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import av
import numpy as np
from PIL import Image

from latent_cache import NoSpaceError
from latent_cache.writing.disk import is_full
from pipelines.errors import UserError
from stage1_autoencoder.videos.config import Split
from stage1_autoencoder.videos.source import BrokenVideoError, VideoSource

RECORD = ".river_convert.jsonl"
UNFINISHED = ".river_convert.unfinished"
_FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """A video that was written: its id, the fingerprint of what it was made of, and the number of its frames."""

    id: str
    fingerprint: str
    frames: int


class Record:
    """The videos of an output folder by their folders' names (`train/clip`); see `open_record`.

    A video is made in `unfinished`, recorded, and then renamed to its place. So a folder at its place that is recorded
    is whole, whenever the process was killed; and one that is not recorded is none of ours.

    Attributes:
        entries: also those whose folder somebody removed.
        unfinished: a hidden folder on the same disk.
    """

    def __init__(self, out: Path, file: BinaryIO) -> None:
        self.out = out
        self.unfinished = out / UNFINISHED
        self.entries: dict[str, Entry] = {}
        self._file = file

    def is_whole(self, name: str, extension: str) -> bool:
        """Tell whether a recorded video is there, with as many frames as it had."""
        if name not in self.entries:
            return False
        try:
            files = os.listdir(self.out / name)
        except OSError:
            return False
        return sum(file.endswith(extension) for file in files) == self.entries[name].frames

    def put(self, made: Path, name: str, entry: Entry) -> None:
        """Record a video and rename its finished folder to its place, which a damaged older one has to leave."""
        self._discard(name)
        self._append({"folder": name} | asdict(entry))
        self.entries[name] = entry
        place = self.out / name
        place.parent.mkdir(parents=True, exist_ok=True)
        made.rename(place)

    def remove(self, names: list[str]) -> None:
        """Delete recorded videos and forget them."""
        for name in names:
            self._discard(name)
            self._append({"removed": name})
            del self.entries[name]
            with suppress(OSError):  # other videos lie in them
                for parent in Path(name).parents[:-1]:
                    (self.out / parent).rmdir()

    def _discard(self, name: str) -> None:
        if (place := self.out / name).exists():
            aside = self.unfinished / "removed"
            shutil.rmtree(aside, ignore_errors=True)
            place.rename(aside)  # so that no half of it is ever at its place
            shutil.rmtree(aside)

    def start(self, settings: Mapping[str, Any]) -> None:
        """Note what the pictures that follow are made by."""
        self._append({"convert": _FORMAT, "settings": dict(settings)})

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(f"{json.dumps(line)}\n".encode())
        self._file.flush()

    def load(self) -> dict[str, Any] | None:
        """Read the file; the settings that its pictures were made by, None where there are no pictures.

        Raises:
            UserError: it is damaged.
        """
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1  # a process may have been killed within the last line
        self._file.truncate(whole)
        settings = None
        try:
            for line in map(json.loads, content[:whole].splitlines()):
                if "convert" in line:
                    if line["convert"] != _FORMAT:
                        raise ValueError(f"format {line['convert']}")
                    settings = line["settings"]
                elif "removed" in line:
                    del self.entries[line["removed"]]
                else:
                    name = line.pop("folder")
                    self.entries[name] = Entry(**line)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.out / RECORD} cannot be read ({error}): remove {self.out}, or choose another folder"
            ) from error
        return settings if self.entries else None


def check_place(out: Path) -> None:
    """Find out, writing nothing, whether a folder is one to write into.

    Raises:
        UserError: it is a file, cannot be looked into, or has something in it that `convert` did not write.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out}: this is a file; name a folder")
    try:
        names = sorted(name for name in os.listdir(out) if not name.startswith("."))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be looked into ({error.strerror})") from error
    if names and not (out / RECORD).exists():
        raise UserError(
            f"--out {out}: has {names[0]} in it, which was not written by convert; name a new folder, or an empty one"
        )


@contextmanager
def open_record(out: Path, settings: Mapping[str, Any], overwrite: bool) -> Iterator[Record]:
    """Hold an output folder, made where it lacks, for one process; the kernel lets go of it when the process dies.

    Args:
        settings: all that pictures depend on besides the videos.
        overwrite: where they contradict those of an earlier command, remove what it wrote.
    Raises:
        UserError: contradicting settings, a damaged record, another process, a folder that cannot be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / RECORD).open("a+b")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written to ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out}: another process converts into it; wait for it, or stop it") from None
        record = Record(out, file)
        found = record.load()
        shutil.rmtree(record.unfinished, ignore_errors=True)
        record.unfinished.mkdir()
        try:
            if found is not None and found != settings:
                if not overwrite:
                    raise UserError(_contradiction(out, found, settings))
                record.remove(list(record.entries))
                found = None
            if found is None:
                record.start(settings)
            yield record
        finally:
            shutil.rmtree(record.unfinished, ignore_errors=True)


def _contradiction(out: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    differing = [key for key in found if found[key] != wanted.get(key)]
    listed = ", ".join(f"{key} {found.get(key)!r} (now {wanted.get(key)!r})" for key in differing)
    return f"--out {out}: its pictures were made with {listed}; name another folder, or replace them with --overwrite"


_MOST_BYTES = 200  # of one name; file systems take 255, and readers may want to add something

# What Windows, and by way of it many network drives, refuse in names; % would make two ids one.
_RESERVED = re.compile(r'[<>:"\\|?*\x00-\x1f\x7f]|%(?=[0-9A-Fa-f]{2})')
_HIDDEN_OR_CUT = re.compile(r"^\.|[. ]$")
_DEVICES = re.compile(r"(conin\$|conout\$|con|prn|aux|nul|com\d|lpt\d)(?=\.|$)", re.IGNORECASE)


def folder_names(ids: Sequence[str]) -> list[str]:
    """Name the folder of each video of a split.

    A `/` in an id stands for folders in folders. Characters that some file systems refuse become %3A and the like;
    names of Windows' devices, and folders that other videos would lie in, get a `_`; long names are cut and end in a
    digest.

    Raises:
        UserError: two that are the same, or differ by upper and lower case alone, which many file systems do not tell.
    """
    names = ["/".join(map(_name, video_id.split("/"))) for video_id in ids]
    folders = {parent for name in names for parent in _parents(_folded(name))}
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
    name = _RESERVED.sub(_encoded, part.encode(errors="backslashreplace").decode())
    name = _DEVICES.sub(r"\1_", name, count=1) if _DEVICES.match(name) else name
    name = _HIDDEN_OR_CUT.sub(_encoded, name) or "_"
    if len(name.encode()) > _MOST_BYTES:
        start = name.encode()[: _MOST_BYTES - 13].decode(errors="ignore")
        name = f"{start}~{hashlib.sha256(part.encode(errors='backslashreplace')).hexdigest()[:12]}"
    return name


def _encoded(character: re.Match) -> str:
    return f"%{ord(character[0]):02X}"


def _folded(name: str) -> str:
    """What a file system that tells neither case nor the two ways to write an accent apart makes of a name."""
    return unicodedata.normalize("NFC", name.casefold())


def _parents(name: str) -> Iterator[str]:
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name


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
