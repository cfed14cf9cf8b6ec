"""HDF5 shards as the official code writes and reads them (`source: hdf5`)."""

import contextlib
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
from tqdm import tqdm

from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.folders import choose_fractions, split_folders, split_training
from stage1_autoencoder.videos.index import stamp
from stage1_autoencoder.videos.index_cache import Entry, IndexCache
from stage1_autoencoder.videos.preprocessing import FramePreprocessor
from stage1_autoencoder.videos.shards import list_shards
from stage1_autoencoder.videos.source import (
    BrokenVideoError,
    SkippedVideo,
    VideoError,
    VideoInfo,
    VideoSource,
    VideoTable,
)
from stage1_autoencoder.videos.splits import join_names, natural_order
from stage1_autoencoder.videos.video_files import UNKNOWN_FPS, Probe

EXTENSIONS = frozenset({".hdf5", ".h5"})
_NOT_VIDEOS = frozenset({"len", "videos"})
# What h5py raises where bytes of a file are damaged, by what they stand for; there are no checksums in it.
_DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError)


class _ShardError(Exception):
    """A shard, or a video of it, cannot be used; the message says why."""


@contextlib.contextmanager
def _damage_is_said() -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        errno = getattr(error, "errno", None)  # with it h5py's own text is a long one
        said = os.strerror(errno) if errno else str(error).strip("'\"")
        raise _ShardError(f"cannot be read as HDF5: {said}; copy or convert it again") from error


def _h5py() -> ModuleType:
    try:
        import h5py
    except ImportError as error:
        raise VideoError("dataset.source hdf5 needs h5py: pip install h5py (or 'river-two-stage[h5]')") from error
    return h5py


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    with _damage_is_said():
        shard = _h5py().File(path, "r")
    with contextlib.closing(shard):
        yield shard


class Hdf5Source(VideoSource):
    """Videos of shards that hold `len/<video>` and `<video>/<frame>`, uint8 [h, w, 3]; ids are <shard>/<video>.

    Shards are opened for each video that is read, and closed after it.
    """

    videos: VideoTable

    def __init__(self, dataset: DatasetConfig, folder: Path, files: list[str], cache: IndexCache | None = None) -> None:
        """Index shards. Of a video that `cache` does not know, the first, middle and last frame are read.

        Args:
            files: names in `folder`, in the order that the videos shall have.
        """
        self.dataset, self.folder, self.files = dataset, folder, files
        self.skipped = []
        self._names: list[str] = []  # of the videos in their shards
        numbers, native = array("i"), array("i")

        def infos() -> Iterator[VideoInfo]:
            # disable=None: no bar where nobody looks at a terminal
            for number, name in enumerate(tqdm(files, f"index {folder.name}", leave=False, unit="file", disable=None)):
                for video, entry in self._index_shard(folder / name, cache):
                    self._names.append(video)
                    numbers.append(number)
                    native.append(entry.probe.frames)
                    yield self._info(f"{Path(name).stem}/{video}", entry)

        self.videos = VideoTable(infos())
        self._file_of = np.array(numbers, np.int32)
        self._native = np.array(native, np.int32)  # frames before `frame_step`

    def _info(self, video_id: str, entry: Entry) -> VideoInfo:
        probe, step = entry.probe, self.dataset.frame_step
        size = probe.width, probe.height
        return VideoInfo(video_id, (probe.frames - 1) // step + 1, probe.fps / step, entry.digest, size)

    def _index_shard(self, path: Path, cache: IndexCache | None) -> Iterator[tuple[str, Entry]]:
        try:
            with _damage_is_said():  # looking at the file included
                seen = stamp(path)
            with _open(path) as shard:
                for name in _video_names(shard):
                    key = f"{path.parent.name}/{path.name}/{name}"
                    entry = cache.get(key) if cache else None
                    if entry is None or entry.stamp != seen:
                        try:
                            entry = Entry(seen, *_examine(shard, name))
                        except _ShardError as error:
                            self.skipped.append(SkippedVideo(f"{path.stem}/{name}", f"{error} (in {path.name})"))
                            continue
                        if cache:
                            cache.put(key, entry)
                    yield name, entry
        except _ShardError as error:
            self.skipped.append(SkippedVideo(path.stem, f"{path.name} {error}"))

    @property
    def native_frames(self) -> int:
        return int(self._native.sum())

    def select(self, rows: np.ndarray, skipped: Iterable[SkippedVideo] = ()) -> "Hdf5Source":
        """A source of some of the videos, by their positions [m] int64."""
        source = Hdf5Source(self.dataset, self.folder, [])
        source.files, source.skipped, source.videos = self.files, list(skipped), self.videos.select(rows)
        source._names = [self._names[row] for row in rows.tolist()]
        source._file_of, source._native = self._file_of[rows], self._native[rows]
        return source

    def iterate(self, index: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        start, stop = self.check_range(index, start, stop)
        if start == stop:
            return
        video, step = self.videos[index], self.dataset.frame_step
        path = self.folder / self.files[self._file_of[index]]
        preprocess = FramePreprocessor(self.dataset.image_size)
        try:
            with _open(path) as shard:
                group = _group(shard, self._names[index])
                frames = _frame_names(group, _length(shard, self._names[index]))
                if len(frames) != self._native[index]:
                    raise _ShardError(f"has {len(frames)} frames, but its index expects {self._native[index]}")
                for name in frames[start * step : (stop - 1) * step + 1 : step]:
                    yield preprocess(av.VideoFrame.from_ndarray(_picture(group, name, video.size), "rgb24"))
        except _ShardError as error:
            raise BrokenVideoError(video.id, f"{error} (in {path})") from error


@_damage_is_said()
def _video_names(shard: Any) -> list[str]:
    """Names of the videos that have a length, frames, or both, in natural order; the official converter leaves an
    empty shard at the end."""
    lengths = shard.get("len", {})
    if not hasattr(lengths, "keys"):
        raise _ShardError("has a 'len' that is no group of lengths, one a video")
    names = set(lengths)
    others = [name for name in shard if name not in names and name not in _NOT_VIDEOS]
    found = [*lengths, *(name for name in others if shard.get(name, getclass=True) is _h5py().Group)]
    return [found[at] for at in natural_order(found)]


@_damage_is_said()
def _length(shard: Any, video: str) -> int | None:
    """How many frames the shard says that a video has; None in a shard without lengths.

    Raises:
        _ShardError: it has lengths, but not of this video, or no number.
    """
    if "len" not in shard:
        return None
    if video not in shard["len"]:
        raise _ShardError(f"has frames, but no len/{video}")
    stored = shard["len"][video]
    if getattr(stored, "shape", None) not in ((), (1,)) or stored.dtype.kind not in "iu":
        raise _ShardError(f"len/{video} is no whole number")
    return int(stored[()].item())


@_damage_is_said()
def _group(shard: Any, video: str) -> Any:
    group = shard.get(video)
    if not hasattr(group, "keys"):
        raise _ShardError(f"has a length, but no group {video!r} of frames")
    return group


@_damage_is_said()
def _frame_names(group: Any, expected: int | None) -> list[str]:
    """Names of a video's frames in natural order.

    Raises:
        _ShardError: there are none; there are not as many as `expected`, or one in the middle lacks.
    """
    names = list(group)
    if not names:
        raise _ShardError("has no frames")
    names = [names[at] for at in natural_order(names)]
    if expected is None:
        return names
    if len(names) != expected:
        raise _ShardError(f"has {len(names)} frames, but len{group.name} says {expected}")
    if all(name.isdecimal() for name in names):
        first = int(names[0])
        for number, name in enumerate(names, first):
            if int(name) != number:
                raise _ShardError(f"lacks frame {number}")
    return names


@_damage_is_said()
def _picture(group: Any, name: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """[h, w, 3] uint8, of a (width, height) if that is given.

    Raises:
        _ShardError: it is something else, which is noticed before it is read.
    """
    stored = group[name]
    shape, kind = getattr(stored, "shape", ()), getattr(stored, "dtype", None)
    if kind != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise _ShardError(f"frame {name} is {kind} {list(shape)}, and uint8 [h, w, 3] is wanted")
    if size not in (None, (shape[1], shape[0])):
        raise _ShardError(
            f"frame {name} is {shape[1]}x{shape[0]}, the first one {size[0]}x{size[1]}; frames of one video must have "
            "one size"
        )
    return stored[()]


def _examine(shard: Any, video: str) -> tuple[Probe, str]:
    """Count a video's frames and digest the first, the middle and the last one, because all of them would take hours.

    Raises:
        _ShardError: it cannot be used.
    """
    group = _group(shard, video)
    names = _frame_names(group, _length(shard, video))
    first = _picture(group, names[0])
    height, width = first.shape[:2]
    pictures = [first, *(_picture(group, names[at], (width, height)) for at in (len(names) // 2, -1))]
    parts = [hashlib.sha256(picture).digest() for picture in pictures]
    described = json.dumps([names, *(picture.shape for picture in pictures)]).encode()
    digest = hashlib.sha256(hashlib.sha256(described).digest() + b"".join(parts)).hexdigest()
    return Probe(len(names), UNKNOWN_FPS, width, height), digest


def open_hdf5(dataset: DatasetConfig, root: Path, remember: bool = True) -> dict[Split, Hdf5Source]:
    """Index the shards below `root`, in folders `train`, `val` (or `validation`) and `test`, or directly in it.

    Splits that have no folder are taken of the training videos by fractions, as of a folder of videos (`open_folder`).

    Raises:
        VideoError: no folder, no shards, two of one name, none that can be used, nothing left to train on, h5py is not
            installed.
    """
    _h5py()
    if not root.is_dir():
        raise VideoError(
            f"{root}: there is no such folder; put the shards of {dataset.name!r} there, in folders train, val and "
            "test, or set dataset.root"
        )
    folders = split_folders(root) or {"train": root}
    fractions = choose_fractions(dataset, has_folders=folders["train"] != root)
    sources: dict[Split, Hdf5Source] = {}
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(IndexCache(root, remember))
        for split, folder in folders.items():
            shards = list_shards(folder, EXTENSIONS)
            if not shards.names:
                there = f"only {join_names(sorted(shards.passed_over))}" if shards.passed_over else "nothing"
                raise VideoError(f"{folder}: no shards in it, {there}; expected shard_0001.hdf5 and so on")
            source = Hdf5Source(dataset, folder, shards.names, cache)
            source.passed_over = shards.passed_over
            if not source.videos:
                reasons = join_names(f"{video.id}: {video.reason}" for video in source.skipped) or "all empty"
                raise VideoError(f"{folder}: no video in its {len(shards.names)} shards can be used: {reasons}")
            sources[split] = source
    return split_training(dataset, root, sources, fractions)
