"""HDF5 shards in the format of the official code (`source: hdf5`)."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.division import choose_fractions, split_training
from stage1_autoencoder.videos.index import Entry, IndexCache, stamp
from stage1_autoencoder.videos.names import escaped, natural_order
from stage1_autoencoder.videos.shards import ShardError, ShardSource, open_shards
from stage1_autoencoder.videos.source import MOST_PIXELS, UNKNOWN_FPS, VideoError, VideoInfo, is_of_the_system
from stage1_autoencoder.videos.splits import skip_beside, split_folders
from stage1_autoencoder.videos.video_files import Probe

_NOT_VIDEOS = frozenset({"len", "videos"})
# What h5py raises for damaged bytes, depending on what they mean; the format has no checksums.
_DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError)


class Hdf5Source(ShardSource):
    """Videos of shards with `len/<video>` and `<video>/<frame>`, uint8 [h, w, 3].

    Of a video that the cache does not know, the first, middle and last frame are read for the index.
    """

    extensions = frozenset({".hdf5", ".h5"})
    way_out = "copy or convert it again"

    def index_shard(self, path: Path, cache: IndexCache | None) -> Iterator[tuple[str, int, VideoInfo]]:
        step, seen = self.dataset.frame_step, stamp(path)
        with _open(path) as shard:
            for name in _video_names(shard):
                video_id, key = f"{escaped(path.stem)}/{escaped(name)}", f"{path.parent.name}/{path.name}/{name}"
                (entry,) = cache.get([key]) if cache else (None,)
                if entry is None or entry.stamp != seen:
                    try:
                        entry = Entry(seen, *_examine(shard, name))
                    except ShardError as error:
                        self.skip(video_id, error, path)
                        continue
                    if cache:
                        cache.put(key, entry)
                probe = entry.probe
                frames, size = (probe.frames - 1) // step + 1, (probe.width, probe.height)
                yield name, probe.frames, VideoInfo(video_id, frames, probe.fps / step, entry.digest, size)

    def pack_places(self, places: list[str]) -> np.ndarray:
        return np.array(places, object)

    def read_pictures(
        self, path: Path, place: str, video: VideoInfo, frames: int, wanted: range
    ) -> Iterator[np.ndarray]:
        with _open(path) as shard:
            group = _group(shard, place)
            names = _frame_names(group, _length(shard, place))
            if len(names) != frames:
                raise ShardError(f"has {len(names)} frames, but its index expects {frames}")
            for number in wanted:
                yield _picture(group, names[number], video.size)


@contextlib.contextmanager
def _damage_is_reported() -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        if is_of_the_system(error):  # whose text is long
            raise OSError(error.errno, os.strerror(error.errno)) from error
        reason = str(error).strip("'\"")
        raise ShardError(f"cannot be read as HDF5: {reason}") from error


def _h5py() -> ModuleType:
    try:
        import h5py
    except ImportError as error:
        raise VideoError("dataset.source: hdf5 needs h5py: pip install h5py (or 'river-two-stage[h5]')") from error
    return h5py


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    with _damage_is_reported():
        shard = _h5py().File(path, "r")
    with contextlib.closing(shard):
        yield shard


def _member(group: Any, name: str) -> Any | None:
    """A group or data set by its name in a group; None if there is none.

    Raises:
        ShardError: its content is not in this file, or is compressed in blocks that are larger than any picture.
    """
    h5py = _h5py()
    link = group.get(name, getclass=True, getlink=True)
    if link is None:
        return None
    if link is not h5py.HardLink:
        raise ShardError(f"has a link instead of {group.name.rstrip('/')}/{name}, maybe to another file")
    found = group[name]
    if isinstance(found, h5py.Dataset):
        if found.external or found.is_virtual:
            raise ShardError(f"has its {found.name} in another file")
        if math.prod(found.chunks or ()) * found.dtype.itemsize > 3 * MOST_PIXELS:
            raise ShardError(f"has its {found.name} in blocks of {found.chunks}, more than {MOST_PIXELS} pixels")
    return found


@_damage_is_reported()
def _video_names(shard: Any) -> list[str]:
    """Names of the videos that have a length, frames, or both, in natural order.

    There may be none: the official converter leaves an empty shard at the end.
    """
    lengths = _member(shard, "len")
    if lengths is not None and not hasattr(lengths, "keys"):
        raise ShardError("has a 'len' that is not a group with one length per video")
    names = set(lengths or ())
    others = [name for name in shard if name not in names and name not in _NOT_VIDEOS]
    if odd := next((name for name in (*names, *others) if not isinstance(name, str)), None):
        raise ShardError(f"has a name that is not UTF-8: {odd!r}")
    kinds = {name: shard.get(name, getclass=True, getlink=True) for name in others}
    inside = (name for name in others if kinds[name] is _h5py().HardLink)
    found = [*(lengths or ()), *(name for name in inside if shard.get(name, getclass=True) is _h5py().Group)]
    return [found[row] for row in natural_order(found)]


@_damage_is_reported()
def _length(shard: Any, video: str) -> int | None:
    """Number of frames of a video according to the shard; None in a shard without lengths.

    Raises:
        ShardError: the shard has lengths, but not this one, or it is not a number.
    """
    lengths = _member(shard, "len")
    if lengths is None:
        return None
    stored = _member(lengths, video)
    if stored is None:
        raise ShardError(f"has frames, but no len/{video}")
    if getattr(stored, "shape", None) not in ((), (1,)) or stored.dtype.kind not in "iu":
        raise ShardError(f"len/{video} is not an integer")
    return int(stored[()].item())


@_damage_is_reported()
def _group(shard: Any, video: str) -> Any:
    group = _member(shard, video)
    if not hasattr(group, "keys"):
        raise ShardError(f"has a length, but no group {video!r} of frames")
    return group


@_damage_is_reported()
def _frame_names(group: Any, expected: int | None) -> list[str]:
    """Names of a video's frames in natural order.

    Raises:
        ShardError: there are none, not as many as `expected`, or one is missing in between.
    """
    names = list(group)
    if not names:
        raise ShardError("has no frames")
    names = [names[row] for row in natural_order(names)]
    if expected is None:
        return names
    if len(names) != expected:
        raise ShardError(f"has {len(names)} frames, but len{group.name} says {expected}")
    if all(name.isdecimal() for name in names):
        first = int(names[0])
        for number, name in enumerate(names, first):
            if int(name) != number:
                raise ShardError(f"is missing frame {number}")
    return names


@_damage_is_reported()
def _picture(group: Any, name: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read a frame [h, w, 3] uint8, of a given (width, height) if any.

    Raises:
        ShardError: type or shape differ, which is checked before reading.
    """
    stored = _member(group, name)
    shape, kind = getattr(stored, "shape", ()), getattr(stored, "dtype", None)
    if kind != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise ShardError(f"frame {name} is {kind} {list(shape)}, expected uint8 [h, w, 3]")
    if math.prod(shape) > 3 * MOST_PIXELS:
        raise ShardError(f"frame {name} is {shape[1]}x{shape[0]}, more than {MOST_PIXELS} pixels")
    if size not in (None, (shape[1], shape[0])):
        raise ShardError(
            f"frame {name} is {shape[1]}x{shape[0]}, the first one {size[0]}x{size[1]}; "
            "all frames of a video must have one size"
        )
    return stored[()]


def _examine(shard: Any, video: str) -> tuple[Probe, str]:
    """Count a video's frames and digest the first, the middle and the last one; all of them would take hours.

    Raises:
        ShardError: the video cannot be used.
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


def open_hdf5(
    dataset: DatasetConfig, root: Path, remember: bool, stored: Mapping[str, Split]
) -> dict[Split, Hdf5Source]:
    """Index the shards below `root`, in folders `train`, `val` (or `validation`) and `test`, or directly in it.

    Splits without a folder are taken out of the training videos by fractions, as in `open_folder`.

    Raises:
        VideoError: no folder, no shards, two with one name, none that can be used, no video left to train on, or h5py
            is not installed.
    """
    _h5py()
    way_out = f"put the shards of {dataset.name!r} there, in folders train, val and test, or set dataset.root"
    if not root.is_dir():
        raise VideoError(f"{root}: no such folder; {way_out}")
    named = split_folders(root)
    fractions = choose_fractions(dataset, has_folders=bool(named))
    with IndexCache(root, remember) as cache:
        sources = open_shards(Hdf5Source, dataset, named or {"train": root}, way_out, cache)
    beside = skip_beside(root, named, lambda path: int(path.suffix.lower() in Hdf5Source.extensions))
    sources["train"].skipped.extend(beside)
    return split_training(dataset, root, sources, fractions, stored, remember)
