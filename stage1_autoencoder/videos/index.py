"""What videos a folder holds: finding them, counting their frames and digesting them once, and remembering it.

All of it streams: of a million videos only their names and some numbers are ever in memory at once.
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from stage1_autoencoder.videos.index_cache import Entry, IndexCache, Stamp
from stage1_autoencoder.videos.source import BrokenVideoError, SkippedVideo, VideoError
from stage1_autoencoder.videos.splits import join_names, natural_order
from stage1_autoencoder.videos.video_files import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    Probe,
    is_frame,
    list_frames,
    probe_folder,
    probe_video,
)

_WORKERS = 8  # opening files is mostly waiting, and FFmpeg runs outside Python's lock
_AHEAD = 16 * _WORKERS  # videos that are looked at before the results of earlier ones are taken
_MOST_KINDS = 100  # of files that are passed over: so many are told apart


@dataclass(frozen=True)
class Indexed:
    """One video of the index: what is in it with the digest of its content, or why it cannot be used."""

    probe: Probe | None = None
    digest: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Listing:
    """The videos below a folder, in natural order of their ids.

    Attributes:
        ids: the path relative to `folder` without the extension; files of which the ids would be equal keep theirs.
        names: the path relative to `folder` of each, of a file or of a folder that has frames.
        unreadable: folders that could not be looked into.
        passed_over: how many other files there are, by extension (by name where they have none).
    """

    folder: Path
    ids: list[str]
    names: list[str]
    unreadable: list[SkippedVideo] = field(default_factory=list)
    passed_over: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


def find_videos(folder: Path) -> Listing:
    """Find all video files and frame folders below a folder.

    Hidden files and unknown extensions are passed over, and so are pictures beside video files (thumbnails) or in
    `folder` itself.

    Raises:
        VideoError: no folder; no videos in it; two videos that cannot be told apart, or only by upper and lower case.
    """
    if not folder.is_dir():
        raise VideoError(f"{folder}: there is no such folder")
    found: list[str] = []
    folders_of_frames: set[str] = set()
    others: Counter[str] = Counter()
    unreadable: list[SkippedVideo] = []

    def note_unreadable(error: OSError) -> None:
        name = os.path.relpath(error.filename, folder)
        unreadable.append(SkippedVideo(_text(name), f"cannot be looked into ({error.strerror})"))

    visited: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=note_unreadable, followlinks=True):
        real = os.path.realpath(place)
        # A link to a folder above would be walked forever.
        folders[:] = [] if real in visited else [name for name in folders if not name.startswith(".")]
        if real in visited:
            continue
        visited.add(real)
        here = os.path.relpath(place, folder)
        inside = "" if here == os.curdir else here + os.sep
        names = [name for name in names if not name.startswith(".")]
        videos = [name for name in names if os.path.splitext(name)[1].lower() in VIDEO_EXTENSIONS]
        found += [inside + name for name in videos]
        if not videos and inside and any(map(is_frame, names)):
            found.append(here)
            folders_of_frames.add(here)
            names = [name for name in names if not is_frame(name)]
        for name in names:
            extension = os.path.splitext(name)[1].lower()
            if extension not in VIDEO_EXTENSIONS:
                kind = extension or name
                others[kind if kind in others or len(others) < _MOST_KINDS else "others"] += 1
    if not found:
        for video in unreadable:
            raise VideoError(f"{folder / video.id}: {video.reason}")
        raise VideoError(_nothing_found(folder, others))
    ids = _ids(folder, found, folders_of_frames)
    order = natural_order(ids)
    return Listing(folder, [ids[row] for row in order], [found[row] for row in order], unreadable, dict(others))


def _nothing_found(folder: Path, extensions: Iterable[str]) -> str:
    expected = f"expected {' '.join(sorted(VIDEO_EXTENSIONS))}, or a folder of .png or .jpg frames a video"
    if not extensions:
        return f"{folder}: the folder is empty; {expected}"
    if not IMAGE_EXTENSIONS.isdisjoint(extensions):
        return f"{folder}: pictures lie directly in it; move the frames of each video into a folder of its own"
    return f"{folder}: no videos in it, only {join_names(sorted(extensions))}; {expected}"


def _text(name: str) -> str:
    """Names are bytes to the file system; what is no UTF-8 in them is written as \\xe9, so that ids are text."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _ids(folder: Path, found: list[str], folders_of_frames: set[str]) -> list[str]:
    ids = [_text(name if name in folders_of_frames else os.path.splitext(name)[0]) for name in found]
    if repeated := _repeated(ids):
        ids = [_text(name) if video_id in repeated else video_id for video_id, name in zip(ids, found, strict=True)]
        if repeated := _repeated(ids):
            video_id = min(repeated)
            one, other, *_ = (folder / name for this, name in zip(ids, found, strict=True) if this == video_id)
            raise VideoError(f"{one} and {other} would both be video {video_id!r}: rename one of them")
    if repeated := _repeated(map(str.casefold, ids)):
        folded = min(repeated)
        one, other, *_ = (folder / name for this, name in zip(ids, found, strict=True) if this.casefold() == folded)
        raise VideoError(
            f"{one} and {other} differ only by upper and lower case, which not every file system keeps apart: "
            "rename one of them"
        )
    return ids


def _repeated(names: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    return {name for name in names if name in seen or seen.add(name)}


def index_videos(root: Path, names: Sequence[str], remember: bool = True) -> Iterator[Indexed]:
    """Probe videos below `root`, or recall what an earlier call found out about them.

    What is found out is kept in the folder (see `IndexCache`) and holds as long as a file's size and mtime do; a call
    that was stopped is gone on from. Where the folder cannot be written to, videos are read each time. Unusable videos
    are looked at again each time.

    Args:
        names: paths relative to `root`.
        remember: without it, nothing is written.
    Yields:
        what is known about each, in the order of `names`.
    """

    def examine(name: str, known: Entry | None) -> tuple[Stamp, Indexed, bool]:
        """Stamp, result, and whether it is new."""
        path, seen = root / name, Stamp(0, 0)
        try:
            seen = stamp(path)
            if known is not None and known.stamp == seen:
                return seen, Indexed(known.probe, known.digest), False
            return seen, examine_video(path, name), True
        except BrokenVideoError as error:
            return seen, Indexed(reason=error.reason), True
        except OSError as error:
            return seen, Indexed(reason=f"cannot be read ({error.strerror})"), True

    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(IndexCache(root, remember))
        cache.forget_others(names)
        executor = ThreadPoolExecutor(_WORKERS)
        stack.callback(executor.shutdown, cancel_futures=True)
        # disable=None: no bar where nobody looks at a terminal
        bar = stack.enter_context(
            tqdm(total=len(names), desc=f"index {root.name}", leave=False, unit="video", disable=None)
        )
        running: deque[tuple[str, Future]] = deque()
        waiting = iter(names)
        while True:
            for name in itertools.islice(waiting, _AHEAD - len(running)):
                running.append((name, executor.submit(examine, name, cache.get(name))))
            if not running:
                break
            name, future = running.popleft()
            seen, indexed, new = future.result()
            if new and indexed.probe is not None and indexed.digest is not None:
                cache.put(name, Entry(seen, indexed.probe, indexed.digest))
            bar.update()
            yield indexed


def examine_video(path: Path, video_id: str) -> Indexed:
    """Read a video file or frame folder through.

    Raises:
        BrokenVideoError: it cannot be used.
    """
    try:
        probe = probe_folder(path, video_id) if path.is_dir() else probe_video(path, video_id)
        return Indexed(probe, digest(path))
    except OSError as error:
        raise BrokenVideoError(video_id, f"cannot be read ({error.strerror})") from error


def digest(path: Path) -> str:
    """sha256 (hexadecimal) of what a video holds, wherever it lies and whenever it was written.

    Of a file: all its bytes. Of a frame folder: the names and sizes of its frames, and the bytes of the first, middle
    and last one, because opening every picture of a large data set takes hours.
    """
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    frames = list_frames(path)
    listed = json.dumps([(frame.name, frame.stat().st_size) for frame in frames])
    opened = [frames[i].read_bytes() for i in (0, len(frames) // 2, -1)]
    # Digests of digests, so that no byte can pass from one part to the next.
    parts = [hashlib.sha256(part).digest() for part in (listed.encode(), *opened)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def stamp(path: Path) -> Stamp:
    """Look at the size and the time of a file, or of the frames of a folder."""
    if path.is_dir():
        stats = [frame.stat() for frame in list_frames(path)]
        return Stamp(sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats))
    return Stamp(path.stat().st_size, path.stat().st_mtime_ns)
