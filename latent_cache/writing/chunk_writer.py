"""Writing one whole chunk of a store, from any process with access to the store's disk."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore, MemoryStore

from latent_cache.errors import NoSpaceError, StaleWriterError, StoreError
from latent_cache.manifest import StoredFile
from latent_cache.reading.frame_reader import all_finite, chunks_per_file, some_names
from latent_cache.reading.reader import open_cache
from latent_cache.schema import CODES, FRAME_TYPES, LATENTS, PROGRESS_FOLDER
from latent_cache.writing.chunk_plan import ChunkPlan
from latent_cache.writing.disk import is_full, write_file
from latent_cache.writing.markers import ChunkMarker

SESSION_FILE = "session"


@dataclass(frozen=True)
class ChunkWriter:
    """Writes chunks for a `StoreWriter`, which holds the lock; small and picklable.

    A chunk's files are built in memory, written under a temporary name and renamed; its marker is written last. So a
    task that dies leaves the chunk unchanged, and a task that runs twice, even at the same time, writes the same chunk.

    Args:
        path: the store's folder.
        session: session of the `StoreWriter`. A task that outlives it (of a worker that lost its scheduler) writes
            nothing.
        before: the store that this one continues. A chunk that does not begin where its file begins goes on after the
            frames that this store has there.
    """

    path: Path
    session: str
    before: Path | None = None

    def write(
        self,
        split: str,
        chunk: ChunkPlan,
        latents: np.ndarray,
        codes: np.ndarray | None,
        measured: Mapping[str, Any] | None = None,
        extras: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> ChunkMarker:
        """Write a chunk and wait until it is on disk.

        Args:
            chunk: from `StoreWriter.pending`.
            latents: [chunk.frames, c, h, w] float, pre-quantization.
            codes: [chunk.frames, h, w] integer in 0..65535, or None for a store without codes.
            measured: JSON values to store in the marker.
            extras: `preview` [chunk.frames, y, x, 3] integer in 0..255, `actions` [chunk.frames, action] float, where
                the store has them.
        Raises:
            StoreError: NaN or infinity in the latents, or values out of the dtype's range; names the videos.
            NoSpaceError: the disk is full.
            StaleWriterError: the session has ended.
            CorruptStoreError: frames of the store before cannot be read.
            ValueError: arrays that do not fit the store.
        """
        group = self.path / split
        beside = dict(extras) if codes is None else {CODES: codes, **extras}
        for name in FRAME_TYPES:
            if (name in beside) != (has_it := (group / name).exists()):
                raise ValueError(f"{name} are {'missing' if has_it else 'given'}, but the store has {name}={has_it}")
        arrays = {name: _open(group / name) for name in (LATENTS, *beside)}
        shape = arrays[LATENTS].shape[1:]
        values = {LATENTS: stored_latents(latents, arrays[LATENTS].dtype, shape, chunk, str(group))}
        values |= {name: checked_values(name, beside[name], arrays[name].shape[1:], chunk) for name in beside}

        if head := chunk.start % (arrays[LATENTS].shards or arrays[LATENTS].chunks)[0]:
            cache = open_cache(self.before, split)
            for name, reader in cache.frame_readers.items():
                values[name] = np.concatenate([reader.read(chunk.start - head, chunk.start), values[name]])

        files = {name: file_content(array, values[name]) for name, array in arrays.items()}
        stored = {name: StoredFile.of(content, chunks_per_file(arrays[name])) for name, content in files.items()}
        marker = ChunkMarker.of(chunk, values[LATENTS], stored, measured or {})
        try:
            for name, content in files.items():
                self._check_session()
                write_file(file_path(group / name, arrays[name], chunk.index), content)
            self._check_session()
            marker.write(marker_path(self.path, split, chunk.index))
        except OSError as error:
            if is_full(error):
                raise NoSpaceError(
                    f"{self.path}: no space left for chunk {chunk.index} of {split}: free some, then resume"
                ) from error
            raise
        return marker

    def _check_session(self) -> None:
        try:
            session = session_path(self.path).read_text()
        except FileNotFoundError:
            session = None
        if session != self.session:
            raise StaleWriterError(f"{self.path}: the writer of this task has ended; the task writes nothing")


def session_path(store: Path) -> Path:
    """The file that names the session of the current `StoreWriter`."""
    return store / PROGRESS_FOLDER / SESSION_FILE


def marker_path(store: Path, split: str, index: int) -> Path:
    """The file of a chunk's marker."""
    return store / PROGRESS_FOLDER / split / f"{index}.json"


def file_path(folder: Path, array: zarr.Array, index: int) -> Path:
    """The file of a chunk, or shard, of the array in `folder`."""
    return folder / array.metadata.encode_chunk_key((index,) + (0,) * (array.ndim - 1))


def stored_latents(
    latents: np.ndarray, dtype: np.dtype[Any], shape: tuple[int, ...], chunk: ChunkPlan, where: str
) -> np.ndarray:
    """Convert latents to the dtype of the store.

    Args:
        latents: [chunk.frames, c, h, w] float.
        dtype: float16 or float32.
        shape: (c, h, w) of the store.
        where: path of the split, for messages.
    Returns:
        The same values, contiguous, rounded to `dtype`, all finite.
    Raises:
        StoreError: NaN, infinity, or values out of the dtype's range; names the videos.
        ValueError: a wrong shape, or values that are no floats.
    """
    expected = (chunk.frames, *shape)
    if latents.shape != expected or latents.dtype.kind != "f":
        raise ValueError(f"latents are {latents.dtype}{list(latents.shape)}, expected floats {list(expected)}")
    with np.errstate(over="ignore"):  # reported below, with the video
        stored = np.ascontiguousarray(latents, dtype=dtype)
    if all_finite(stored):
        return stored

    wrong = ~np.isfinite(stored)
    value = latents[wrong][0]
    overflows = bool(np.isfinite(value))
    frames = np.flatnonzero(wrong.any(axis=(1, 2, 3)))
    what = f"{value} is out of the range of {dtype.name}" if overflows else f"{value} is not finite"
    raise StoreError(
        f"{where}: invalid latents ({what}) in {len(frames)} frame(s) of {some_names(chunk.videos_of(frames))}: "
        "check these videos and the autoencoder" + (", or set cache.dtype to float32" if overflows else "")
    )


def checked_values(name: str, values: np.ndarray, shape: tuple[int, ...], chunk: ChunkPlan) -> np.ndarray:
    """Convert values beside the latents, such as codes, to the type of their array.

    Args:
        values: [chunk.frames, ...] integer in the type's range, or finite float.
        shape: of a frame in the store.
    Raises:
        ValueError: a wrong shape or type, or values out of range.
    """
    expected, dtype = (chunk.frames, *shape), FRAME_TYPES[name]
    kinds, what = ("f", "floats") if dtype.kind == "f" else ("iu", "integers")
    if values.shape != expected or values.dtype.kind not in kinds:
        raise ValueError(f"{name} are {values.dtype}{list(values.shape)}, expected {what} {list(expected)}")
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    low, high = limits.min, limits.max
    if (values.dtype != dtype or dtype.kind == "f") and not (values.min() >= low and values.max() <= high):  # nor NaN
        raise ValueError(f"{name} range from {values.min()} to {values.max()}, expected {low} to {high}")
    return np.ascontiguousarray(values, dtype)


def file_content(array: zarr.Array, values: np.ndarray) -> bytes:
    """Content of the file of one whole chunk, or shard, as zarr itself writes it.

    Args:
        values: frames of the chunk; the last chunk of an array may have fewer, and is padded with the fill value.
    """
    # In memory, not in place: zarr would merge a partial last chunk with the existing file.
    content: dict[str, Any] = {}
    shape = array.shards or array.chunks
    one = zarr.create_array(
        MemoryStore(content),
        shape=shape,
        chunks=array.chunks,
        shards=array.shards,
        dtype=array.dtype,
        compressors=array.compressors,
        filters=None,
        fill_value=array.fill_value,
        config={"write_empty_chunks": True},
    )
    if len(values) < shape[0]:
        filler = np.full((shape[0] - len(values), *shape[1:]), array.fill_value, array.dtype)
        values = np.concatenate([values, filler])
    one[:] = values
    return content[one.metadata.encode_chunk_key((0,) * one.ndim)].to_bytes()


def _open(folder: Path) -> zarr.Array:
    return zarr.open_array(LocalStore(folder, read_only=True), mode="r", zarr_format=3)
