"""What videos a folder holds: finding them, counting their frames and digesting them once, and remembering it."""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stage1_autoencoder.videos.base import BrokenVideoError, VideoError
from stage1_autoencoder.videos.files import VIDEO_EXTENSIONS, Keyframe, Probe, probe_video
from stage1_autoencoder.videos.frame_folders import IMAGE_EXTENSIONS, is_frame, list_frames, probe_folder
from stage1_autoencoder.videos.splits import join_names, natural_key

CACHE_NAME = ".river_index.json"
CACHE_VERSION = 2
_WORKERS = 8  # opening files is mostly waiting, and FFmpeg runs outside Python's lock


@dataclass(frozen=True)
class Stamp:
    """By what a change of a file is noticed; of a frame folder: all bytes of its frames, and the newest of them."""

    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Indexed:
    """One video of the index: what is in it with the digest of its content, or why it cannot be used."""

    stamp: Stamp
    probe: Probe | None = None
    digest: str | None = None
    reason: str | None = None


def find_videos(folder: Path) -> dict[str, Path]:
    """Find all video files and frame folders below a folder, in natural order of their ids.

    An id is the path relative to `folder` without the extension; files of which the ids would be equal keep theirs.
    Hidden files and unknown extensions are passed over, and so are pictures beside video files (thumbnails) or in
    `folder` itself.

    Returns:
        path a video id: a file, or a folder that has frames.
    Raises:
        VideoError: no folder; no videos in it; two videos that cannot be told apart.
    """
    if not folder.is_dir():
        raise VideoError(f"{folder}: there is no such folder")
    found: list[Path] = []
    others: set[str] = set()
    visited: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        # A link to a folder above would be walked forever.
        folders[:] = [] if real in visited else [name for name in folders if not name.startswith(".")]
        if real in visited:
            continue
        visited.add(real)
        names = [name for name in names if not name.startswith(".")]
        videos = [name for name in names if os.path.splitext(name)[1].lower() in VIDEO_EXTENSIONS]
        found += [Path(place, name) for name in videos]
        if not videos and Path(place) != folder and any(map(is_frame, names)):
            found.append(Path(place))
        others.update(os.path.splitext(name)[1].lower() or name for name in names)
    if not found:
        raise VideoError(_nothing_found(folder, others))
    return _name(folder, found)


def _nothing_found(folder: Path, extensions: set[str]) -> str:
    expected = f"expected {' '.join(sorted(VIDEO_EXTENSIONS))}, or a folder of .png or .jpg frames a video"
    if not extensions:
        return f"{folder}: the folder is empty; {expected}"
    if extensions & IMAGE_EXTENSIONS:
        return f"{folder}: pictures lie directly in it; move the frames of each video into a folder of its own"
    return f"{folder}: no videos in it, only {join_names(sorted(extensions))}; {expected}"


def _name(folder: Path, found: list[Path]) -> dict[str, Path]:
    # Names are bytes to the file system; what is no UTF-8 in them is written as \xe9, so that ids are text everywhere.
    full = {path: os.fsencode(path.relative_to(folder)).decode(errors="backslashreplace") for path in found}
    short = {path: name if path.is_dir() else os.path.splitext(name)[0] for path, name in full.items()}
    count: dict[str, int] = {}
    for name in short.values():
        count[name] = count.get(name, 0) + 1
    named: dict[str, Path] = {}
    for path in found:
        video_id = short[path] if count[short[path]] == 1 else full[path]
        if video_id in named:
            raise VideoError(f"{named[video_id]} and {path} would both be video {video_id!r}: rename one of them")
        named[video_id] = path
    return {video_id: named[video_id] for video_id in sorted(named, key=natural_key)}


def index_videos(root: Path, paths: Sequence[Path]) -> dict[Path, Indexed]:
    """Probe videos below `root`, or recall what an earlier call found out about them.

    Counts and digests are kept in `<root>/.river_index.json` and hold as long as a file's size and mtime do. Where the
    folder cannot be written to, videos are read each time. Unusable videos are looked at again each time.
    """
    remembered = _load_cache(root)

    def examine(path: Path) -> Indexed:
        name = path.relative_to(root).as_posix()
        seen = Stamp(0, 0)
        try:
            seen = stamp(path)
            if name in remembered and remembered[name].stamp == seen:
                return remembered[name]
            return examine_video(path, name, seen)
        except BrokenVideoError as error:
            return Indexed(seen, reason=error.reason)
        except OSError as error:
            return Indexed(seen, reason=f"cannot be read ({error.strerror})")

    executor = ThreadPoolExecutor(_WORKERS)
    try:
        # disable=None: no bar where nobody looks at a terminal
        bar = tqdm(
            executor.map(examine, paths), f"index {root.name}", len(paths), leave=False, unit="video", disable=None
        )
        indexed = dict(zip(paths, bar, strict=True))
    finally:
        executor.shutdown(cancel_futures=True)
    usable = {path.relative_to(root).as_posix(): entry for path, entry in indexed.items() if entry.probe}
    if usable != remembered:
        _save_cache(root, usable)
    return indexed


def examine_video(path: Path, video_id: str, seen: Stamp) -> Indexed:
    """Read a video file or frame folder through, whose stamp was `seen` before.

    Raises:
        BrokenVideoError: it cannot be used.
    """
    try:
        probe = probe_folder(path, video_id) if path.is_dir() else probe_video(path, video_id)
        return Indexed(seen, probe, digest(path))
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


def _load_cache(root: Path) -> dict[str, Indexed]:
    try:
        content = json.loads((root / CACHE_NAME).read_text())
        if content["version"] != CACHE_VERSION:
            return {}
        return {
            name: Indexed(Stamp(**entry["stamp"]), _load_probe(**entry["probe"]), str(entry["digest"]))
            for name, entry in content["videos"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # no cache, or not one of ours: count again


def _load_probe(keyframes: list[list[int]], **others: Any) -> Probe:
    return Probe(keyframes=tuple(Keyframe(*pair) for pair in keyframes), **others)


def _save_cache(root: Path, indexed: dict[str, Indexed]) -> None:
    videos = {
        name: {"stamp": asdict(entry.stamp), "probe": asdict(entry.probe), "digest": entry.digest}
        for name, entry in indexed.items()
    }
    # Written aside and renamed, so that no process ever reads half of it.
    aside = root / f"{CACHE_NAME}.{os.getpid()}"
    try:
        aside.write_text(json.dumps({"version": CACHE_VERSION, "videos": videos}))
        os.replace(aside, root / CACHE_NAME)
    except OSError:  # a folder that may only be read
        with contextlib.suppress(OSError):
            aside.unlink()
