"""Reading a store: latents, videos, fingerprint and metadata of a complete one, progress of an incomplete one."""

import difflib
import hashlib
import itertools
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
import zarr
from zarr.core.sync import sync
from zarr.errors import ZarrUserWarning

from latent_cache import schema
from latent_cache.errors import RESTORE, CorruptStoreError, IncompleteStoreError, StoreError
from latent_cache.manifest import CHANGED
from latent_cache.reading.frame_reader import FrameReader
from latent_cache.schema import ACTIONS, CODES, FRAME_TYPES, IDENTITY_VIEW, LATENTS, PREVIEW, StoreMetadata

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LatentCache:
    """One split of a complete store. Made by `latent_cache.open`.

    Attributes:
        latents: [frame, c, y, x] zarr array, all videos one after another; access through zarr has none of our checks.
        codes: [frame, y, x] uint16 zarr array, or None.
        preview: [frame, y, x, 3] uint8 zarr array of small RGB pictures, or None.
        actions: [frame, action] float32 zarr array, or None.
        video_ids, video_views: [videos], read on demand.
        offsets: [videos + 1] int64, first frame of each video.
        mean, std: [c] float32 of the training split, in every split. std may be 0 (a constant channel).
    """

    url: str
    split: str
    metadata: StoreMetadata
    latents: zarr.Array
    codes: zarr.Array | None
    preview: zarr.Array | None
    actions: zarr.Array | None
    video_ids: "Names"
    video_views: "Names"
    offsets: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    _group: zarr.Group = field(repr=False)

    @property
    def lengths(self) -> np.ndarray:
        """[videos] int64 frames of each video."""
        return np.diff(self.offsets)

    @property
    def frames(self) -> int:
        """Frames of all videos together."""
        return int(self.offsets[-1])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a frame's latent."""
        return self.latents.shape[1:]

    @property
    def nbytes(self) -> int:
        """Bytes of the split's latents in memory."""
        return self.latents.nbytes

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the split's metadata, videos, autoencoder and statistics.

        Reads no latents; the statistics of the training split represent them. `software` is not included: the same
        latents written by other versions are the same latents.
        """
        digest = hashlib.sha256()
        described = asdict(self.metadata) | {
            "software": None,
            "format_version": schema.FORMAT_VERSION,
            "split": self.split,
            "shape": list(self.latents.shape),
            "dtype": self.latents.dtype.name,
        }
        digest.update(json.dumps(described, sort_keys=True).encode())
        for name in itertools.chain(self.video_ids, self.video_views):
            digest.update(name.encode() + b"\0")
        for values in (self.offsets.astype("<i8"), self.mean.astype("<f4"), self.std.astype("<f4")):
            digest.update(values.tobytes())
        return digest.hexdigest()

    @cached_property
    def frame_readers(self) -> dict[str, FrameReader]:
        """Checked reading of latents, and of codes, preview and actions where there are any, by name of the array."""
        arrays = {LATENTS: self.latents, CODES: self.codes, PREVIEW: self.preview, ACTIONS: self.actions}
        return {
            name: FrameReader(array, self.url, self.video_ids, self.offsets)
            for name, array in arrays.items()
            if array is not None
        }

    @property
    def latent_reader(self) -> FrameReader:
        """Checked reading of latents by frame or by chunk."""
        return self.frame_readers[LATENTS]

    @property
    def code_reader(self) -> FrameReader | None:
        """Checked reading of codes; None in a store without codes."""
        return self.frame_readers.get(CODES)

    def load(self) -> torch.Tensor:
        """All latents of the split.

        Returns:
            [frame, c, y, x] on the CPU, in the dtype of the store: float16 unless it was written as float32.
        Raises:
            CorruptStoreError: a chunk is missing, damaged or contains NaN; names its file and its videos.
        """
        self.latent_reader.check_files()
        # Allocated by numpy, which requests huge pages: the first access to 150 MB is six times faster.
        latents = np.empty(self.latents.shape, self.latents.dtype)
        self.latent_reader.read_all(latents)
        return torch.from_numpy(latents)

    def video(self, video: str | int, view: str = IDENTITY_VIEW) -> np.ndarray:
        """Latents of one video.

        Args:
            video: its id, or its row in the split; a row determines the view, so `view` is ignored.
            view: which view of the video.
        Returns:
            [n, c, y, x] in the dtype of the store.
        Raises:
            StoreError: no such video.
            CorruptStoreError: one of its chunks is missing or damaged.
        """
        return self._video_frames(LATENTS, video, view)

    def video_codes(self, video: str | int, view: str = IDENTITY_VIEW) -> np.ndarray:
        """Codes of one video, [n, y, x] uint16. As `video`; also StoreError for a store without codes."""
        return self._video_frames(CODES, video, view, "encode again with cache.codes=true and --overwrite")

    def video_preview(self, video: str | int, view: str = IDENTITY_VIEW) -> np.ndarray:
        """Small frames of one video, [n, y, x, 3] uint8. As `video`; also StoreError for a store without them."""
        return self._video_frames(PREVIEW, video, view, "encode again with cache.preview=32 and --overwrite")

    def video_actions(self, video: str | int, view: str = IDENTITY_VIEW) -> np.ndarray:
        """Actions of one video, [n, action] float32. As `video`; also StoreError for a store without actions."""
        return self._video_frames(ACTIONS, video, view, "only data sets with dataset.source: lerobot have some")

    def _video_frames(self, name: str, video: str | int, view: str, way_out: str = "") -> np.ndarray:
        if name not in self.frame_readers:
            raise StoreError(f"{self.url}: the store has no {name}: {way_out}")
        row = self.row(video, view)
        return self.frame_readers[name].read(int(self.offsets[row]), int(self.offsets[row + 1]))

    def row(self, video: str | int, view: str = IDENTITY_VIEW) -> int:
        """The row of a video, given by its id and view or by the row itself."""
        where = f"{self.url}, split {self.split!r}"
        if isinstance(video, int | np.integer):
            if not 0 <= video < len(self.video_ids):
                raise StoreError(f"{where}: no video {video}: expected a row from 0 to {len(self.video_ids) - 1}")
            return int(video)
        rows = self.video_ids.find(video)
        views = {self.video_views[row]: int(row) for row in rows}
        if view in views:
            return views[view]
        if views:
            raise StoreError(f"{where}: video {video!r} has no view {view!r}: its views are {sorted(views)}")
        close = difflib.get_close_matches(video, self.video_ids, n=3) or self.video_ids[:3]
        raise StoreError(f"{where}: no video {video!r} among {len(self.video_ids)}: did you mean one of {close}?")

    @cached_property
    def fingerprints(self) -> list[str]:
        """[videos] fingerprints of the source videos when they were encoded; empty strings if the writer had none."""
        values = self._per_video(schema.VIDEO_FINGERPRINT)
        return [""] * len(self.video_ids) if values is None else [str(value) for value in values]

    @cached_property
    def video_fps(self) -> np.ndarray:
        """[videos] float32 frames per second of each video; of the whole store, if it does not tell them apart."""
        values = self._per_video(schema.VIDEO_FPS)
        return np.full(len(self.video_ids), self.metadata.fps, np.float32) if values is None else values

    @cached_property
    def video_sizes(self) -> np.ndarray:
        """[videos, 2] int32 width and height of each source video in pixels; 0 where unknown."""
        values = self._per_video(schema.VIDEO_SIZE)
        return np.zeros((len(self.video_ids), 2), np.int32) if values is None else values

    @cached_property
    def codebook(self) -> np.ndarray | None:
        """[code, channel] float32 vectors that `codes` are rows of; None in a store without them.

        `codebook[codes]`, its last axis moved to axis 1, are the quantized latents, which a decoder takes.
        """
        array = _optional_array(schema.open_group(self.url), schema.CODEBOOK, self.url)
        return None if array is None else _read_small(array, self.url)

    def _per_video(self, name: str) -> np.ndarray | None:
        array = _optional_array(self._group, name, self.url)
        if array is None:
            return None
        values = _read_small(array, self.url)
        if len(values) != len(self.video_ids):
            raise CorruptStoreError(
                f"{self.url}/{array.path}: {len(values)} values for {len(self.video_ids)} videos: {RESTORE}"
            )
        return values

    def index_damages(self) -> Iterator[CorruptStoreError]:
        """Read all that is stored for each video, such as names and offsets; yield an error for each damaged file."""
        for name, dimensions in schema.DIMENSIONS.items():
            if dimensions[0].startswith("video"):
                yield from _array_damages(self._group, name, self.url)

    @property
    def notes(self) -> dict[str, Any]:
        """JSON that the writer stored with the split."""
        return dict(self._group.attrs)


def open_cache(url: str | Path, split: str = schema.TRAIN) -> LatentCache:
    """Open one split of a complete store, as `latent_cache.open`.

    Args:
        url: a local path, or a URL that fsspec supports.
        split: name of the split; see `splits`.
    Raises:
        StoreError: no store of latents there, or no such split.
        IncompleteStoreError: the writer has not finished.
        CorruptStoreError: damaged metadata. Chunks are checked when they are read.
    """
    url = str(url).rstrip("/")
    group = schema.open_group(url)
    if group.attrs.get("complete") is not True:
        raise IncompleteStoreError(f"{url}: the store is not complete: run `river encode` again to resume")
    if group.store.manifest is None:
        _tell_unsealed(url)
    metadata = StoreMetadata.from_attrs(group.attrs, url)
    try:
        arrays = group.get(split)
        if not isinstance(arrays, zarr.Group):
            raise StoreError(f"{url}: no split {split!r}: its splits are {split_names(group)}")
        latents = arrays[LATENTS]
        codes, preview, actions = beside = [arrays.get(name) for name in (CODES, PREVIEW, ACTIONS)]
        videos = arrays[schema.VIDEO_OFFSET].shape[0] - 1
        if latents.nchunks > schema.MOST_CHUNKS or videos > schema.MOST_VIDEOS:
            raise ValueError(f"{latents.nchunks} chunks and {videos} videos are more than any store has")
        offsets = np.asarray(arrays[schema.VIDEO_OFFSET][:], dtype=np.int64)
        video_ids, video_views = (Names(arrays[name], url) for name in (schema.VIDEO_ID, schema.VIDEO_VIEW))
        mean, std = (np.array(latents.attrs[name], dtype=np.float32) for name in ("mean", "std"))
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError, ArithmeticError) as error:
        if group.store.was_replaced():
            return open_cache(url, split)
        raise CorruptStoreError(
            f"{url}/{split}: an array or attribute is missing or damaged ({error}): {RESTORE}"
        ) from error

    consistent = (
        len(offsets) == len(video_ids) + 1 == len(video_views) + 1
        and offsets[0] == 0
        and offsets[-1] == latents.shape[0]
        and bool((np.diff(offsets) > 0).all())
        and latents.chunks[1:] == latents.shape[1:]
        and mean.shape == std.shape == latents.shape[1:2]
        and bool(np.isfinite([mean, std]).all() and (std >= 0).all())
        and latents.dtype.name in ("float16", "float32")
        and all(
            array is None or (array.shape[0], array.chunks[1:]) == (latents.shape[0], array.shape[1:])
            for array in beside
        )
        and (codes is None or codes.shape[1:] == latents.shape[2:])
        and (preview is None or (preview.ndim, preview.shape[-1], preview.dtype) == (4, 3, FRAME_TYPES[PREVIEW]))
        and (actions is None or (actions.ndim, actions.dtype) == (2, FRAME_TYPES[ACTIONS]))
    )
    if not consistent:
        raise CorruptStoreError(
            f"{url}/{split}: offsets, names, statistics and latents do not fit together "
            f"({len(video_ids)} videos, latents {latents.shape}): {RESTORE}"
        )
    video_ids.check()
    video_views.check()
    return LatentCache(
        url=url,
        split=split,
        metadata=metadata,
        latents=latents,
        codes=codes,
        preview=preview,
        actions=actions,
        video_ids=video_ids,
        video_views=video_views,
        offsets=offsets,
        mean=mean,
        std=std,
        _group=arrays,
    )


@cache  # once per store and process
def _tell_unsealed(url: str) -> None:
    logger.warning("%s has no manifest, which would show exchanged files: `inspect --seal %s` writes one", url, url)


def open_metadata(url: str | Path) -> StoreMetadata:
    """Metadata of a store, complete or not. Raises as `schema.open_group`."""
    return StoreMetadata.from_attrs(schema.open_group(url).attrs, str(url))


def open_notes(url: str | Path) -> dict[str, Any]:
    """JSON that the writer stored with a complete store. Raises as `schema.open_group`."""
    notes = schema.open_group(url).attrs.get("notes", {})
    if not isinstance(notes, dict):
        raise CorruptStoreError(f"{url}/zarr.json: its notes are {type(notes).__name__}, not keys: {RESTORE}")
    return dict(notes)


def codebook_damages(url: str | Path) -> Iterator[CorruptStoreError]:
    """Read the codebook of a store, if it has one; yield an error for each damaged file."""
    yield from _array_damages(schema.open_group(url), schema.CODEBOOK, str(url).rstrip("/"))


def splits(url: str | Path) -> list[str]:
    """Names of a store's splits: train, val, test, then any others. Raises as `schema.open_group`."""
    return split_names(schema.open_group(url))


def split_names(group: zarr.Group) -> list[str]:
    """Names of the splits of a store's root group, in order."""
    written = group.attrs.get("splits")
    if isinstance(written, list):  # some remote stores cannot list their groups
        return [str(name) for name in written]
    with warnings.catch_warnings():
        # zarr warns about the writer's folder in an incomplete store.
        warnings.filterwarnings("ignore", f"Object at {schema.PROGRESS_FOLDER}", ZarrUserWarning)
        return schema.in_order(group.group_keys())


def is_sealed(url: str | Path) -> bool:
    """Whether a store has a manifest, with which its files are compared. Raises as `schema.open_group`."""
    return schema.open_group(url).store.manifest is not None


def changed_files(url: str | Path) -> Iterator[tuple[str, str]]:
    """Compare every file in the manifest of a store by sha256.

    Yields:
        For each file its key, which is its path in the store, and what is wrong with it; empty if nothing is.
    Raises:
        StoreError: as `schema.open_group`.
    """
    store = schema.open_group(url).store
    files = {} if store.manifest is None else store.manifest.files

    def what(key: str) -> str:
        content = store.read(key)
        if content is None:
            return "is missing"
        return "" if hashlib.sha256(content.as_numpy_array()).hexdigest() == files[key].sha256 else CHANGED

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from zip(files, pool.map(what, files), strict=True)


def is_complete(url: str | Path) -> bool:
    """Whether a store exists and is complete. Raises StoreError only if the path is something else."""
    path = schema.local_path(url)
    if path is not None and (not path.exists() or (path.is_dir() and not any(path.iterdir()))):
        return False
    try:
        return schema.open_group(url).attrs.get("complete") is True
    except IncompleteStoreError:
        return False


@dataclass(frozen=True)
class SplitProgress:
    """Progress of writing a split.

    Attributes:
        written: number of chunks (or shards, if there are any) that are on disk, out of `chunks`.
        frames: frames of the split.
        frames_per_chunk: frames of a chunk, or of a shard.
        last_write: time of the last written chunk in seconds since 1970; None if there is none.
    """

    written: int
    chunks: int
    frames: int
    frames_per_chunk: int
    last_write: float | None


def open_progress(url: str | Path) -> dict[str, SplitProgress]:
    """Progress of writing an incomplete, local store, by split. Raises as `schema.open_group`."""
    group = schema.open_group(url)
    path = schema.local_path(url)
    if path is None:
        raise StoreError(f"{url}: progress is known only for a local path: ask where the store is written")
    progress = {}
    for split in split_names(group):
        latents = _optional_array(group, f"{split}/{LATENTS}", str(url))
        if isinstance(latents, zarr.Array):
            size = (latents.shards or latents.chunks)[0]
            chunks = -(-latents.shape[0] // size)
            markers = (path / schema.PROGRESS_FOLDER / split).glob("*.json")
            written = [file for file in markers if file.stem.isdigit() and int(file.stem) < chunks]
            last = max((file.stat().st_mtime for file in written), default=None)
            progress[split] = SplitProgress(len(written), chunks, latents.shape[0], size, last)
    return progress


class Names(Sequence[str]):
    """An array of strings as a sequence that keeps one chunk in memory.

    Args:
        array: [video] strings, none of them empty.
        url: path or URL of the store, for messages.
    """

    def __init__(self, array: zarr.Array, url: str) -> None:
        self._array, self._url = array, url
        self._chunk = (-1, np.empty(0, np.dtypes.StringDType()))

    def __len__(self) -> int:
        return self._array.shape[0]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        position = range(len(self))[index]
        size = self._array.chunks[0]
        return str(self._read(position // size)[position % size])

    def __iter__(self) -> Iterator[str]:
        for index in range(-(-len(self) // self._array.chunks[0])):
            yield from map(str, self._read(index))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and len(self.find(name)) > 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} names, first {self[0]!r}>"

    def find(self, name: str) -> np.ndarray:
        """[n] int64 rows with this name."""
        size = self._array.chunks[0]
        found = [np.flatnonzero(self._read(index) == name) + index * size for index in range(-(-len(self) // size))]
        return np.concatenate(found)

    def check(self) -> None:
        """Read the first and the last chunk, to find most damage early.

        Raises:
            CorruptStoreError: one of them is missing or damaged.
        """
        self._read(0)
        self._read((len(self) - 1) // self._array.chunks[0])

    def _read(self, index: int) -> np.ndarray:
        held, values = self._chunk  # replaced in one assignment, so that threads see a matching pair
        if held != index:
            start = index * self._array.chunks[0]
            try:
                values = self._array[start : start + self._array.chunks[0]]
            except (ValueError, RuntimeError, TypeError) as error:
                raise self._corrupt(index, f"is damaged ({error})") from error
            if (values == "").any():  # a missing chunk reads as empty names, without an error
                raise self._corrupt(index, "is missing or damaged")
            self._chunk = (index, values)
        return values

    def _corrupt(self, index: int, what: str) -> CorruptStoreError:
        return CorruptStoreError(f"{self._url}/{self._array.path}/c/{index} {what}: {RESTORE}")


def _optional_array(group: zarr.Group, name: str, url: str) -> zarr.Array | None:
    """An array that not every store has. Raises CorruptStoreError if it has one that cannot be opened."""
    try:
        return group.get(name)
    except (KeyError, ValueError, TypeError) as error:
        where = "/".join(filter(None, (url, group.path, name)))
        raise CorruptStoreError(f"{where} cannot be opened ({error}): {RESTORE}") from error


def _array_damages(group: zarr.Group, name: str, url: str) -> Iterator[CorruptStoreError]:
    """Errors of an array that not every store has."""
    try:
        array = _optional_array(group, name, url)
    except CorruptStoreError as error:
        yield error
    else:
        if array is not None:
            yield from _index_damages(array, url)


def _read_small(array: zarr.Array, url: str) -> np.ndarray:
    """A whole array. Raises CorruptStoreError for a missing or damaged chunk."""
    for damage in _index_damages(array, url):
        raise damage
    return array[:]


def _index_damages(array: zarr.Array, url: str) -> Iterator[CorruptStoreError]:
    """Errors of the chunks, along the first axis, of an array. zarr reads a missing one as zeros or empty names."""
    for index in range(array.nchunks):
        key = f"{array.path}/{array.metadata.encode_chunk_key((index,) + (0,) * (array.ndim - 1))}"
        start = index * array.chunks[0]
        try:
            if sync(array.store.getsize(key)) == 0:
                raise ValueError("it is empty")
            array[start : start + array.chunks[0]]
        except FileNotFoundError:
            what = "is missing"
        except (ValueError, RuntimeError, TypeError) as error:
            what = f"is damaged ({error})"
        else:
            continue
        yield CorruptStoreError(f"{url}/{key} {what}: {RESTORE}")
