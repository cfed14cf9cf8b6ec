"""HDF5 shards as the official code writes and reads them (`source: hdf5`)."""

import contextlib
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
from tqdm import tqdm

from stage1_autoencoder.videos.base import BrokenVideoError, SkippedVideo, VideoError, VideoInfo, VideoSource
from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.files import UNKNOWN_FPS, Probe
from stage1_autoencoder.videos.folders import choose_fractions, split_folders, split_training
from stage1_autoencoder.videos.index import stamp
from stage1_autoencoder.videos.index_cache import Entry, IndexCache
from stage1_autoencoder.videos.preprocessing import FramePreprocessor
from stage1_autoencoder.videos.splits import join_names, natural_order
from stage1_autoencoder.videos.table import VideoTable

EXTENSIONS = frozenset({".hdf5", ".h5"})
_NOT_VIDEOS = frozenset({"len", "videos"})


class _ShardError(Exception):
    """A video of a shard cannot be used; the message says why."""


def _h5py() -> ModuleType:
    try:
        import h5py
    except ImportError as error:
        raise VideoError("dataset.source hdf5 needs h5py: pip install h5py (or 'river-two-stage[h5]')") from error
    return h5py


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
            seen = stamp(path)
            with _h5py().File(path, "r") as shard:
                lengths = shard.get("len", {})  # the official converter leaves an empty shard at the end
                names = list(lengths) or [name for name in shard if name not in _NOT_VIDEOS]
                for name in (names[at] for at in natural_order(names)):
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
        except OSError as error:  # what h5py raises for files of another format, and for damaged ones
            self.skipped.append(SkippedVideo(path.stem, f"{path.name} cannot be read as HDF5 ({error})"))

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
            with _h5py().File(path, "r") as shard:
                frames = _frames(shard, self._names[index])
                if len(frames) != self._native[index]:
                    raise _ShardError(f"has {len(frames)} frames, but its index expects {self._native[index]}")
                for name in frames[start * step : (stop - 1) * step + 1 : step]:
                    pixels = _picture(shard, self._names[index], name)
                    if pixels.shape != (video.size[1], video.size[0], 3):
                        raise _ShardError(
                            f"frame {name} is {pixels.shape[1]}x{pixels.shape[0]}, the first one {video.size[0]}x"
                            f"{video.size[1]}; frames of one video must have one size"
                        )
                    yield preprocess(av.VideoFrame.from_ndarray(pixels, "rgb24"))
        except _ShardError as error:
            raise BrokenVideoError(video.id, f"{error} (in {path})") from error
        except OSError as error:
            raise BrokenVideoError(video.id, f"cannot be read from {path} ({error})") from error


def _frames(shard: Any, name: str) -> list[str]:
    """Names of a video's frames in natural order, as many as the shard says that it has.

    Raises:
        _ShardError: no such video, no frames, or another number of them.
    """
    group = shard.get(name)
    if group is None or not hasattr(group, "keys"):
        raise _ShardError(f"has a length, but no group {name!r} of frames")
    names = list(group)
    if not names:
        raise _ShardError("has no frames")
    expected = shard["len"][name][()] if "len" in shard else len(names)
    if len(names) != expected:
        raise _ShardError(f"has {len(names)} frames, but len/{name} says {expected}")
    return [names[at] for at in natural_order(names)]


def _picture(shard: Any, video: str, name: str) -> np.ndarray:
    dataset = shard[video][name]
    shape, kind = getattr(dataset, "shape", ()), getattr(dataset, "dtype", None)
    if kind != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise _ShardError(f"frame {name} is {kind} {list(shape)}, and uint8 [h, w, 3] is wanted")
    return dataset[()]


def _examine(shard: Any, video: str) -> tuple[Probe, str]:
    """Count a video's frames and digest the first, the middle and the last one, because all of them would take hours.

    Raises:
        _ShardError: it cannot be used.
    """
    names = _frames(shard, video)
    pictures = [_picture(shard, video, names[at]) for at in (0, len(names) // 2, -1)]
    height, width = pictures[0].shape[:2]
    parts = [hashlib.sha256(picture.tobytes()).digest() for picture in pictures]
    described = json.dumps([names, *(picture.shape for picture in pictures)]).encode()
    digest = hashlib.sha256(hashlib.sha256(described).digest() + b"".join(parts)).hexdigest()
    return Probe(len(names), UNKNOWN_FPS, width, height), digest


def open_hdf5(dataset: DatasetConfig, root: Path, remember: bool = True) -> dict[Split, Hdf5Source]:
    """Index the shards below `root`, in folders `train`, `val` (or `validation`) and `test`, or directly in it.

    Splits that have no folder are taken of the training videos by fractions, as of a folder of videos (`open_folder`).

    Raises:
        VideoError: no folder, no shards or none that can be used, nothing left to train on, h5py is not installed.
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
            names = [path.name for path in folder.iterdir() if path.suffix in EXTENSIONS and path.name[0] != "."]
            if not names:
                raise VideoError(f"{folder}: no shards in it; expected shard_0001.hdf5 and so on")
            source = Hdf5Source(dataset, folder, [names[at] for at in natural_order(names)], cache)
            if not source.videos:
                reasons = join_names(f"{video.id}: {video.reason}" for video in source.skipped)
                raise VideoError(f"{folder}: no video in its {len(names)} shards can be used: {reasons or 'all empty'}")
            sources[split] = source
    return split_training(dataset, root, sources, fractions)
