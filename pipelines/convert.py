"""`convert`: the frames of any source as folders of pictures, `<out>/<split>/<video>/<frame>.png`."""

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from latent_cache import NoSpaceError
from latent_cache.disk import is_full, write_json
from pipelines.config import RiverConfig
from pipelines.errors import StoppedBySignal, UserError
from pipelines.fetch import size_text
from pipelines.prepare import open_videos
from pipelines.runtime.progress import progress, say
from pipelines.runtime.session import Session
from pipelines.runtime.signals import StopRequest
from stage1_autoencoder.videos import dataset_root
from stage1_autoencoder.videos.base import BrokenVideoError, VideoSource
from stage1_autoencoder.videos.config import Split
from stage1_autoencoder.videos.preprocessing import preprocessing_description
from stage1_autoencoder.videos.table import VideoTable

MANIFEST = ".river_convert.json"  # in the folder that is written to: what its pictures are
MARK = ".river_video.json"  # in each video's folder: which video it is
_PARTIAL = ".partial"
# On some file systems no name may have these; % because it begins what stands for them.
_RESERVED = frozenset('<>:"\\|?*%') | {chr(code) for code in range(32)}
_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{name}{i}" for name in ("com", "lpt") for i in range(1, 10))})


class _Stopped(Exception):
    """The user wants to stop; the video that is being written is left out."""


@dataclass(frozen=True)
class _Task:
    """One video to write.

    Attributes:
        folder: of its pictures.
        mark: what is left in the folder: the video's id, fingerprint and number of frames.
    """

    source: VideoSource
    index: int
    folder: Path
    mark: dict[str, Any]

    @property
    def is_done(self) -> bool:
        try:
            return json.loads((self.folder / MARK).read_text()) == self.mark
        except (OSError, ValueError):
            return False

    def write(self, save: Callable[[np.ndarray, Path], None], suffix: str, advance: Callable[[], None]) -> None:
        """Write the pictures into a folder aside, which then gets its name.

        Args:
            save: writes a picture.
            suffix: of the pictures' names.
            advance: called after each frame; may raise.
        """
        aside = self.folder.with_name(f".{self.folder.name}{_PARTIAL}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            digits = max(5, len(str(self.mark["frames"] - 1)))
            for number, frame in enumerate(self.source.iterate(self.index)):
                save(frame, aside / f"{number:0{digits}}{suffix}")
                advance()
            (aside / MARK).write_text(json.dumps(self.mark))
            if self.folder.exists():  # of an earlier conversion, or there because videos lie in folders of it
                for path in self.folder.iterdir():
                    if path.is_file():
                        path.unlink()
                for path in aside.iterdir():
                    os.replace(path, self.folder / path.name)
            else:
                os.rename(aside, self.folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def convert(
    config: RiverConfig,
    session: Session,
    out: Path,
    *,
    image_format: Literal["png", "jpg"] = "png",
    splits: Sequence[Split] | None = None,
    quality: int = 95,
    videos: int | None = None,
) -> Path:
    """Write the frames of a data set, as they are trained on, into folders of pictures.

    Each video's folder is there whole or not at all; what is there already is left, and what was stopped is gone on
    from.

    Args:
        image_format: png keeps every pixel; jpg is smaller.
        splits: only these.
        quality: of jpg, 1 to 100.
        videos: so many of each split alone.
    Raises:
        UserError: `out` is in use for something else, or has other pictures in it; no such split; two videos that
            would have one folder.
        NoSpaceError: the disk is full.
        StoppedBySignal: by the user; finished videos are kept.
    """
    if not 1 <= quality <= 100:
        raise UserError(f"convert: --quality {quality}: 1 to 100 is wanted")
    sources = open_videos(config, session)
    if missing := [split for split in splits or () if split not in sources]:
        raise UserError(f"convert: {config.dataset.name} has no {missing[0]} split; it has {', '.join(sources)}")
    out = out.expanduser().absolute()
    _check_place(out, dataset_root(config.dataset, config.data_root).absolute())
    pictures = {"format": image_format} | ({"quality": quality} if image_format == "jpg" else {})
    preprocessing = preprocessing_description(config.dataset)
    about = {"format": "river-frames", "dataset": config.dataset.name, "frames": preprocessing, "pictures": pictures}
    _check_manifest(out, about, session.overwrite)
    tasks = [task for split in splits or sources for task in _tasks(sources[split], out / split, videos)]
    changed = [task for task in tasks if (task.folder / MARK).exists() and not task.is_done]
    if changed and not session.overwrite:
        raise UserError(
            f"{changed[0].folder}: holds another version of {changed[0].mark['id']} ({len(changed)} such videos): "
            "replace them with --overwrite, or name another folder"
        )
    todo = [task for task in tasks if not task.is_done]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / MANIFEST, about)
    if len(todo) < len(tasks):
        say(f"convert: {len(tasks) - len(todo)} of {len(tasks)} videos are there already")
    frames = sum(task.mark["frames"] for task in todo)
    most, free = size_text(frames * 3 * config.dataset.image_size**2), size_text(shutil.disk_usage(out).free)
    say(f"convert: {len(todo)} videos, {frames} frames -> {out}, at most about {most} ({free} free)")
    _write_all(todo, frames, _saver(image_format, quality), f".{image_format}", session, out)
    say(f"convert: done, {out}")
    return out


def _write_all(
    todo: Iterable[_Task],
    frames: int,
    save: Callable[[np.ndarray, Path], None],
    suffix: str,
    session: Session,
    out: Path,
) -> None:
    """Write videos on all cores: decoding and compressing run outside Python's lock."""
    cores = len(os.sched_getaffinity(0))
    with StopRequest() as stop, progress(total=frames, description="convert", unit="frame") as bar:

        def advance() -> None:
            if stop:
                raise _Stopped
            bar.update()

        executor = ThreadPoolExecutor(cores)
        running: deque[Future] = deque()

        def finish_one() -> None:
            try:
                running.popleft().result()
            except BrokenVideoError as error:
                session.skip(error.video_id, error.reason)

        try:
            for task in todo:
                while len(running) >= 2 * cores:
                    finish_one()
                running.append(executor.submit(task.write, save, suffix, advance))
            while running:
                finish_one()
        except _Stopped:
            raise StoppedBySignal(
                stop.signal_number, f"stopped; {out} keeps its finished videos, the same command goes on"
            ) from None
        except OSError as error:
            if is_full(error):
                raise NoSpaceError(
                    f"{out}: no space left; finished videos are kept: free some, and the same command goes on"
                ) from error
            raise
        finally:
            executor.shutdown(cancel_futures=True)


def _saver(image_format: str, quality: int) -> Callable[[np.ndarray, Path], None]:
    # Compressing as hard as Pillow does by itself takes two to four times as long and saves 6 to 10 % (film clips).
    options = {"compress_level": 1} if image_format == "png" else {"quality": quality, "subsampling": 0}
    return lambda frame, path: Image.fromarray(frame).save(path, **options)


def _tasks(source: VideoSource, folder: Path, most: int | None) -> list[_Task]:
    """Tasks of a split.

    Raises:
        UserError: two videos would have one folder on a file system that does not tell upper from lower case.
    """
    table = VideoTable.of(source.videos)
    taken: dict[str, str] = {}
    tasks = []
    for index in range(len(table) if most is None else min(most, len(table))):
        video = table[index]
        name = folder_name(video.id)
        if (other := taken.setdefault(name.casefold(), video.id)) != video.id:
            raise UserError(f"videos {other!r} and {video.id!r} would both be in {folder / name}: rename one of them")
        mark = {"id": video.id, "fingerprint": video.fingerprint, "frames": video.frames}
        tasks.append(_Task(source, index, folder / name, mark))
    return tasks


def folder_name(video_id: str) -> str:
    """The path of a video's folder below its split's: its id, of which what some file system refuses is written as %3A.

    Parts between slashes stay folders; names of devices, and a dot or space at an end, are changed too.
    """
    return "/".join(map(_safe, video_id.split("/")))


def _safe(part: str) -> str:
    letters = [f"%{ord(letter):02X}" if letter in _RESERVED else letter for letter in part]
    if letters and letters[0] == ".":  # hidden, or a way up
        letters[0] = "%2E"
    if letters and letters[-1] in (" ", "."):
        letters[-1] = f"%{ord(letters[-1]):02X}"
    if part.split(".")[0].casefold() in _DEVICES:
        letters[0] = f"%{ord(part[0]):02X}"
    return "".join(letters) or "%"


def _check_place(out: Path, root: Path) -> None:
    """Refuse a place in which the pictures would be taken for videos of the source, or the source's for ours."""
    if out.exists() and not out.is_dir():
        raise UserError(f"convert: --out {out} is a file; a folder is wanted")
    if out == root or root in out.parents or out in root.parents:
        raise UserError(f"convert: --out {out} and the raw videos in {root} lie in each other: name another folder")
    if out.is_dir() and not (out / MANIFEST).exists() and any(out.iterdir()):
        raise UserError(f"convert: --out {out} has files in it that are not of a conversion: name an empty folder")


def _check_manifest(out: Path, about: dict[str, Any], overwrite: bool) -> None:
    try:
        before = json.loads((out / MANIFEST).read_text())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{out / MANIFEST}: cannot be read ({error}): name another folder") from None
    if before == about:
        return
    keys = [key for key in about if before.get(key) != about[key]]
    if not overwrite or before.get("format") != about["format"]:
        there = "; ".join(f"{key} {before.get(key)} there, {about[key]} wanted" for key in keys)
        raise UserError(f"{out}: holds other pictures ({there}): replace them with --overwrite, or name another folder")
    for split in out.iterdir():
        if split.is_dir():
            shutil.rmtree(split)
