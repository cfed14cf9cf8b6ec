"""Writing one whole chunk of a store: by any process that sees the store's disk, and safely more than once."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore, MemoryStore

from latent_cache.errors import NoSpaceError, StaleWriterError, StoreError
from latent_cache.reading.frame_reader import all_finite, some_names
from latent_cache.schema import CODES, LATENTS, PROGRESS_FOLDER
from latent_cache.writing.chunk_plan import ChunkPlan
from latent_cache.writing.disk import is_full, write_file
from latent_cache.writing.markers import ChunkMarker

SESSION_FILE = "session"


@dataclass(frozen=True)
class ChunkWriter:
    """Writes chunks on behalf of a `StoreWriter`, which has the lock; small and picklable.

    A chunk's files are made in memory, written under another name and renamed, and its marker comes last. So a task
    that dies leaves the chunk as it was, and a task that runs twice, even at once, writes the same chunk twice.

    Args:
        path: the store's folder.
        session: of the `StoreWriter`; a task that outlives it (of a worker that lost its scheduler) writes nothing.
    """

    path: Path
    session: str

    def write(
        self,
        split: str,
        chunk: ChunkPlan,
        latents: np.ndarray,
        codes: np.ndarray | None,
        measured: Mapping[str, Any] | None = None,
    ) -> ChunkMarker:
        """Write a chunk and wait until it is on the disk.

        Args:
            chunk: from `StoreWriter.pending`.
            latents: [chunk.frames, c, h, w] float, pre-quantization.
            codes: [chunk.frames, h, w] integer in 0..65535, or None for a store without codes.
            measured: JSON that the marker keeps.
        Raises:
            StoreError: NaN or infinity in the latents, or values that the dtype cannot hold. Names the videos.
            NoSpaceError: the disk is full.
            StaleWriterError: the session is over.
            ValueError: arrays that don't fit the store.
        """
        group = self.path / split
        arrays = {LATENTS: _open(group / LATENTS)}
        has_codes = (group / CODES).exists()
        if (codes is None) == has_codes:
            raise ValueError(f"codes are {'missing' if has_codes else 'given'}, but the store has codes={has_codes}")
        shape = arrays[LATENTS].shape[1:]
        values = {LATENTS: stored_latents(latents, arrays[LATENTS].dtype, shape, chunk, str(group))}
        if codes is not None:
            arrays[CODES] = _open(group / CODES)
            values[CODES] = checked_codes(codes, shape[1:], chunk)

        files = {name: file_content(array, values[name]) for name, array in arrays.items()}
        marker = ChunkMarker.of(chunk, values[LATENTS], files, measured or {})
        try:
            for name, content in files.items():
                self._check_session()
                write_file(file_path(group / name, arrays[name], chunk.index), content)
            self._check_session()
            marker.write(marker_path(self.path, split, chunk.index))
        except OSError as error:
            if is_full(error):
                raise NoSpaceError(f"{self.path}: no space left for chunk {chunk.index} of {split}") from error
            raise
        return marker

    def _check_session(self) -> None:
        try:
            session = session_path(self.path).read_text()
        except FileNotFoundError:
            session = None
        if session != self.session:
            raise StaleWriterError(f"{self.path}: the encoding that this task belongs to is over: nothing is written")


def session_path(store: Path) -> Path:
    """Where a store says which `StoreWriter` is at it."""
    return store / PROGRESS_FOLDER / SESSION_FILE


def marker_path(store: Path, split: str, index: int) -> Path:
    """Where the marker of a chunk is."""
    return store / PROGRESS_FOLDER / split / f"{index}.json"


def file_path(folder: Path, array: zarr.Array, index: int) -> Path:
    """The file of a chunk, or shard, of an array that lies in `folder`."""
    return folder / array.metadata.encode_chunk_key((index,) + (0,) * (array.ndim - 1))


def stored_latents(
    latents: np.ndarray, dtype: np.dtype[Any], shape: tuple[int, ...], chunk: ChunkPlan, where: str
) -> np.ndarray:
    """Latents in the dtype of the store.

    Args:
        latents: [chunk.frames, c, h, w] float.
        dtype: float16 or float32.
        shape: (c, h, w) of the store.
        where: path of the split, for messages.
    Returns:
        The same, contiguous, rounded to `dtype`, all finite.
    Raises:
        StoreError: NaN, infinity, or values beyond the dtype's range; names the videos.
        ValueError: another shape, or no floats.
    """
    expected = (chunk.frames, *shape)
    if latents.shape != expected or latents.dtype.kind != "f":
        raise ValueError(f"latents {latents.dtype}{list(latents.shape)}: floats {list(expected)} are wanted")
    with np.errstate(over="ignore"):  # the check below speaks of it, and names the video
        stored = np.ascontiguousarray(latents, dtype=dtype)
    if all_finite(stored):
        return stored

    wrong = ~np.isfinite(stored)
    value = latents[wrong][0]
    overflows = bool(np.isfinite(value))
    frames = np.flatnonzero(wrong.any(axis=(1, 2, 3)))
    what = f"{value} does not fit {dtype.name}" if overflows else f"they hold {value}"
    raise StoreError(
        f"{where}: latents are refused, {what}, in {len(frames)} frame(s) of {some_names(chunk.videos_of(frames))}: "
        "check these videos and the autoencoder" + (", or set cache.dtype to float32" if overflows else "")
    )


def checked_codes(codes: np.ndarray, shape: tuple[int, ...], chunk: ChunkPlan) -> np.ndarray:
    """Codes as uint16.

    Args:
        codes: [chunk.frames, h, w] integer in 0..65535.
        shape: (h, w) of the store.
    Raises:
        ValueError: another shape, type or range.
    """
    expected = (chunk.frames, *shape)
    if codes.shape != expected or codes.dtype.kind not in "iu":
        raise ValueError(f"codes {codes.dtype}{list(codes.shape)}: integers {list(expected)} are wanted")
    largest = np.iinfo(np.uint16).max
    if codes.dtype != np.uint16 and (codes.min() < 0 or codes.max() > largest):
        raise ValueError(f"codes from {codes.min()} to {codes.max()}: 0 to {largest} can be stored")
    return codes.astype(np.uint16, copy=False)


def file_content(array: zarr.Array, values: np.ndarray) -> bytes:
    """The file of one whole chunk, or shard, of an array, as zarr itself writes it.

    Args:
        values: frames of the chunk; the last chunk of an array may have fewer than fit, and is filled up.
    """
    # In memory, not in place: zarr would merge a partial last chunk with the file that is there.
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
