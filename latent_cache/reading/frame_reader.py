"""Checked reading of frames: missing and truncated chunks, flipped bits and NaN are found."""

import asyncio
import math
import os
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path

import google_crc32c
import numpy as np
import zarr
from zarr.buffer.cpu import NDBuffer
from zarr.core.sync import sync

from latent_cache import schema
from latent_cache.errors import RESTORE, DamagedFramesError, ReplacedStoreError, StoreError
from latent_cache.manifest import CHANGED, CHECKSUM_BYTES, CheckedStore, Manifest, ManifestError
from latent_cache.schema import LATENTS

PLAIN_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
# Read, added to the checksum and searched for NaN while it is in the processor's cache.
BLOCK_BYTES = 2**20
NOT_FINITE = "contains NaN or infinity, which the writer never writes"
# (unsigned type, mask without the sign, bits of infinity). Larger bit patterns are NaN. Comparing bits is several times
# faster than isfinite, which is not vectorized for fp16.
FLOAT_BITS = {"float16": (np.uint16, 0x7FFF, 0x7C00), "float32": (np.uint32, 0x7FFFFFFF, 0x7F800000)}


def all_finite(values: np.ndarray) -> bool:
    """Whether a contiguous fp16 or fp32 array has neither NaN nor infinity."""
    unsigned, mask, infinity = FLOAT_BITS[values.dtype.name]
    return values.size == 0 or bool((values.view(unsigned) & unsigned(mask)).max() < infinity)


@dataclass(frozen=True, eq=False)
class FrameReader:
    """Checked reading of `latents`, `codes` or another array with a value per frame.

    zarr silently returns the fill value for a missing chunk, and its codec errors name no file; here every such case
    becomes a DamagedFramesError that names the chunk's file and its videos.

    Args:
        array: [frame, ...], chunked along frames only.
        url: path or URL of the store.
        video_ids: [videos]; `offsets`: [videos + 1] int64, first frame of each video.
    """

    array: zarr.Array
    url: str
    video_ids: Sequence[str]
    offsets: np.ndarray

    @cached_property
    def chunk_frames(self) -> int:
        """Frames per chunk."""
        return self.array.chunks[0]

    @property
    def chunk_count(self) -> int:
        """Number of chunks, including the partial last one."""
        return -(-self.array.shape[0] // self.chunk_frames)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read frames `start` to `stop` (excluded).

        Raises:
            DamagedFramesError: one of their chunks is missing or damaged.
        """
        return self._read_parts(start, stop, self._read_within_chunk)

    def read_window(self, start: int, stop: int) -> np.ndarray:
        """As `read`, for many short reads in any order.

        A chunk of a local store is read and checked as a whole when it is first used, and again when its file has
        changed. Afterwards only the frames themselves are read, from the operating system's cache if they are in it,
        which all processes share.
        """
        plain = self._plain_folder is not None
        return self._read_parts(start, stop, self._read_of_checked_file if plain else self._read_within_chunk)

    def _read_parts(self, start: int, stop: int, read: Callable[[int, int, int, np.ndarray], None]) -> np.ndarray:
        """Frames `start` to `stop` (excluded); `read` reads those of one chunk: its index, start, stop, output."""
        out = np.empty((stop - start, *self.array.shape[1:]), self.array.dtype)
        for index in range(start // self.chunk_frames, -(-stop // self.chunk_frames)):
            first, last = max(start, index * self.chunk_frames), min(stop, (index + 1) * self.chunk_frames)
            read(index, first, last, out[first - start : last - start])
        return out

    def read_chunk(self, index: int, out: np.ndarray) -> None:
        """Read one chunk into `out`, a contiguous array of the frames in it.

        Raises:
            DamagedFramesError: the chunk is missing or damaged.
        """
        if self._plain_folder is None:
            start = index * self.chunk_frames
            self._read_within_chunk(index, start, min(start + self.chunk_frames, self.array.shape[0]), out)
            return
        with self._open_plain(index, self._plain_folder / self.chunk_key(index)) as file:
            self._read_plain(index, file, out)

    def _open_plain(self, index: int, path: str | Path) -> FileIO:
        """The file of a chunk, whose path was made before."""
        try:
            return open(path, "rb", buffering=0)
        except FileNotFoundError as error:
            raise self._corrupt(index, "is missing") from error

    def _read_of_checked_file(self, index: int, start: int, stop: int, out: np.ndarray) -> None:
        path, checked, place = self._checked.get(index) or (self._plain_folder / self.chunk_key(index), None, 0)
        with self._open_plain(index, path) as file:
            state = os.fstat(file.fileno())
            found = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
            if found != checked:
                frames = min(self.chunk_frames, self.array.shape[0] - index * self.chunk_frames)
                place = self._read_plain(index, file, np.empty((frames, *self.array.shape[1:]), self.array.dtype))
                self._checked[index] = (str(path), found, place)
            file.seek(place + (start - index * self.chunk_frames) * out[0].nbytes)
            if file.readinto(memoryview(out).cast("B")) != out.nbytes:
                raise self._corrupt(index, sync(self._file_state(index)) or "is truncated")

    @cached_property
    def _checked(self) -> dict[int, tuple[str, tuple[int, ...], int]]:
        """Of each chunk that `read_window` has checked: its file's path and identity, and its first byte there."""
        return {}

    def _read_plain(self, index: int, file: FileIO, out: np.ndarray) -> int:
        """Read and check a chunk, and return its first byte in the file."""
        begin = 0 if self.array.shards is None else file.seek(self._place_in_shard(index, file))
        flat = out.reshape(-1)
        checksum, finite = 0, True
        for start in range(0, len(flat), BLOCK_BYTES // flat.itemsize):
            block = flat[start : start + BLOCK_BYTES // flat.itemsize]
            if file.readinto(memoryview(block).cast("B")) != block.nbytes:
                break  # truncated: the checksum will not match
            checksum = google_crc32c.extend(checksum, block)
            finite = finite and all_finite(block)
        padding = math.prod(self.array.chunks) * out.itemsize - out.nbytes  # of a partial last chunk
        # To the end of the file, so that an overlong file is noticed.
        rest = file.read() if self.array.shards is None else file.read(padding + CHECKSUM_BYTES)
        checksum = google_crc32c.extend(checksum, rest[:-CHECKSUM_BYTES])
        if checksum.to_bytes(CHECKSUM_BYTES, "little") != rest[-CHECKSUM_BYTES:]:
            raise self._corrupt(index, sync(self._file_state(index)) or "is damaged: its checksum does not match")
        if not finite:
            raise self._corrupt(index, NOT_FINITE)
        self._check_identity(index, begin, checksum)
        return begin

    def _check_identity(self, index: int, start: int, checksum: int) -> None:
        """Compare the part of a chunk's file that begins at byte `start` with the manifest, by its checksum."""
        if self._manifest is not None:
            file = self._manifest.files.get(self.chunk_key(index))
            if file is None or file.crc32c.get(start) != checksum:
                raise self._corrupt(index, CHANGED)

    def _place_in_shard(self, index: int, file: FileIO) -> int:
        """Offset of a chunk in its shard. A shard ends with an index: offset and size of each chunk, and a checksum."""
        place = index % self._chunks_a_file
        size = 16 * self._chunks_a_file
        if file.seek(0, os.SEEK_END) < size + CHECKSUM_BYTES:
            raise self._corrupt(index, sync(self._file_state(index)) or "is truncated")
        file.seek(-(size + CHECKSUM_BYTES), os.SEEK_END)
        start = file.tell()
        content = file.read(size)
        checksum = google_crc32c.value(content)
        if checksum.to_bytes(CHECKSUM_BYTES, "little") != file.read():
            raise self._corrupt(
                index, sync(self._file_state(index)) or "is damaged: the checksum of its index does not match"
            )
        self._check_identity(index, start, checksum)
        offset, length = struct.unpack_from("<QQ", content, 16 * place)
        if length != math.prod(self.array.chunks) * self.array.dtype.itemsize + CHECKSUM_BYTES:
            raise self._corrupt(index, f"is damaged: chunk {place} of the shard has {length} bytes")
        return offset

    def read_all(self, out: np.ndarray) -> None:
        """Read all frames into `out`, several chunks at a time."""
        size = self.chunk_frames
        # Reading releases the GIL and checksums do not, so more threads than cores are slower.
        pool = ThreadPoolExecutor(max_workers=min(16, len(os.sched_getaffinity(0))))
        try:
            parts = [out[index * size : (index + 1) * size] for index in range(self.chunk_count)]
            for _ in pool.map(self.read_chunk, range(self.chunk_count), parts):
                pass
        finally:
            pool.shutdown(cancel_futures=True)  # a damaged chunk stops the reading of the others

    def check_files(self) -> None:
        """Check that the file of every chunk exists and has the right size. Reads no data.

        Raises:
            DamagedFramesError: names the first missing or damaged file, and their number.
        """
        files = range(0, self.chunk_count, self._chunks_a_file)

        async def states() -> list[str | None]:
            return await asyncio.gather(*(self._file_state(index) for index in files))

        wrong = [(index, state) for index, state in zip(files, sync(states()), strict=True) if state]
        if wrong:
            index, state = wrong[0]
            raise self._corrupt(index, f"{state} ({len(wrong)} of {len(files)} files are unusable)", whole_file=True)

    def damages(self) -> Iterator[DamagedFramesError | None]:
        """Read every chunk in order; yield its error, or None for an intact chunk."""

        def examine(index: int) -> DamagedFramesError | None:
            start = index * self.chunk_frames
            frames = min(self.chunk_frames, self.array.shape[0] - start)
            try:
                self.read_chunk(index, np.empty((frames, *self.array.shape[1:]), self.array.dtype))
            except DamagedFramesError as error:
                return error
            return None

        pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
        try:
            yield from pool.map(examine, range(self.chunk_count))
        finally:
            # Without waiting: an abandoned iterator is closed by the thread that collects garbage, and that may be the
            # event loop's thread, which does the reading for these threads.
            pool.shutdown(wait=False, cancel_futures=True)

    @property
    def _chunks_a_file(self) -> int:
        return chunks_per_file(self.array)

    @property
    def _manifest(self) -> Manifest | None:
        store = self.array.store
        return store.manifest if isinstance(store, CheckedStore) else None

    @cached_property
    def _plain_folder(self) -> Path | None:
        """The store's folder, if a chunk is the bytes of its frames and a checksum; otherwise None.

        This is the case for latents in a local store. Reading them directly takes a fifth of the time that zarr takes,
        which copies a chunk three times.
        """
        codecs = [codec.to_dict() for codec in self.array.metadata.codecs]
        if self.array.shards is not None:
            shard = codecs[0]["configuration"]
            if list(shard["index_codecs"]) != PLAIN_CODECS or shard["index_location"] != "end":
                return None
            codecs = list(shard["codecs"])
        return schema.local_path(self.url) if codecs == PLAIN_CODECS and sys.byteorder == "little" else None

    def _read_within_chunk(self, index: int, start: int, stop: int, out: np.ndarray) -> None:
        assert out.shape == (stop - start, *self.array.shape[1:]), (out.shape, start, stop)
        try:
            self.array.get_basic_selection(slice(start, stop), out=NDBuffer.from_numpy_array(out))
        except ManifestError as error:
            raise self._corrupt(index, sync(self._file_state(index)) or CHANGED) from error
        except (ValueError, RuntimeError) as error:  # crc32c raises the first, zstd the second
            raise self._corrupt(index, sync(self._file_state(index)) or f"is damaged: {error}") from error
        if out.dtype.kind == "f" and not all_finite(out):
            state = sync(self._file_state(index)) or NOT_FINITE
            raise self._corrupt(index, state)
        # The fill value of codes is a valid code, so only the file itself shows that it is missing.
        if out.dtype.kind != "f" and (state := sync(self._file_state(index))):
            raise self._corrupt(index, state)

    def chunk_key(self, index: int) -> str:
        """The file that contains a chunk, relative to the store."""
        coordinates = (index // self._chunks_a_file,) + (0,) * (self.array.ndim - 1)
        return f"{self.array.path}/{self.array.metadata.encode_chunk_key(coordinates)}"

    async def _file_state(self, index: int) -> str | None:
        """What is wrong with a chunk's file judging by its size; None for a file of the right size."""
        try:
            size = await self.array.store.getsize(self.chunk_key(index))
        except FileNotFoundError:
            return "is missing"
        if size == 0:
            return "is empty"
        expected = math.prod(self.array.chunks) * self.array.dtype.itemsize + CHECKSUM_BYTES
        if self.array.shards is not None:
            expected = self._chunks_a_file * (expected + 16) + CHECKSUM_BYTES
        if self.array.basename == LATENTS and size != expected:
            return f"is truncated or overlong: {size} bytes, expected {expected}"
        return None

    def _corrupt(self, index: int, what: str, whole_file: bool = False) -> StoreError:
        if isinstance(self.array.store, CheckedStore) and self.array.store.was_replaced():
            return ReplacedStoreError(
                f"{self.url} was encoded again while it was in use: what was read before belongs to the old store, so "
                "start this command again when `encode` is done"
            )
        chunks = self._chunks_a_file if whole_file else 1
        start = index * self.chunk_frames
        stop = min(start + chunks * self.chunk_frames, self.array.shape[0])
        file = f"{self.url}/{self.chunk_key(index)}"
        message = f"{file} {what}. It contains {self.name_videos(start, stop)}: {RESTORE}"
        return DamagedFramesError(message, file, what, start, stop)

    def name_videos(self, start: int, stop: int) -> str:
        """The videos with frames in `start` to `stop` (excluded) as text: their number and the first few names."""
        first, last = np.searchsorted(self.offsets, [start, stop - 1], side="right") - 1
        shown = [self.video_ids[row] for row in range(int(first), min(int(first) + 3, int(last) + 1))]
        return some_names(shown, int(last - first) + 1)


def chunks_per_file(array: zarr.Array) -> int:
    """Number of chunks in each file of an array that is chunked along its first axis."""
    return 1 if array.shards is None else array.shards[0] // array.chunks[0]


def some_names(names: Sequence[str], count: int | None = None) -> str:
    """`2 video(s): 'a', 'b'`, with the first three names; `count` is given if there are more."""
    count = len(names) if count is None else count
    return f"{count} video(s): " + ", ".join(map(repr, names[:3])) + (", ..." if count > 3 else "")
