"""Writing a store chunk by chunk; it can be interrupted anywhere and resumed."""

import contextlib
import logging
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self

import numpy as np
import zarr
from zarr.storage import LocalStore

from latent_cache import schema
from latent_cache.errors import (
    RESTORE,
    CorruptStoreError,
    IncompleteStoreError,
    NoSpaceError,
    StoreError,
    StoreMismatchError,
)
from latent_cache.manifest import MANIFEST, ROOT_KEY, StoredFile
from latent_cache.reading.frame_reader import FrameReader
from latent_cache.schema import CODES, LATENTS, PROGRESS_FOLDER, TRAIN, StoreMetadata
from latent_cache.writing.appending import clear_store
from latent_cache.writing.chunk_plan import ChunkPlan, SplitPlan
from latent_cache.writing.chunk_writer import ChunkWriter, file_path, session_path
from latent_cache.writing.disk import LOCK_FILE, PARTIAL, WriterLock, flush_tree, is_full, write_file
from latent_cache.writing.markers import ChunkMarker, channel_statistics
from latent_cache.writing.sealing import make_manifest, rewrite_document, root_document, write_manifest

logger = logging.getLogger(__name__)

BEFORE_FILE = "before"  # names the manifest of the store that an appending writer continues


class StoreWriter:
    """Writes whole chunks of an incomplete store; `finish` completes it. Use it in a `with` statement.

    Threads and other processes may write chunks at the same time, through `chunk_writer`. Only whole chunks can be
    written, since zarr silently loses data when two tasks write parts of one chunk.
    """

    def __init__(
        self,
        path: Path,
        metadata: StoreMetadata,
        plans: Mapping[str, SplitPlan],
        *,
        codes: bool,
        extras: Mapping[str, tuple[int, ...]],
        dtype: str,
        lock: WriterLock,
        before: Path | None,
    ) -> None:
        """Called by `StoreWriter.open`, which makes the checks."""
        self.path = path
        self.metadata = metadata
        self.plans = dict(plans)
        self.dtype = dtype
        self.codes = codes
        self._lock = lock
        self._before_path = before
        self._before = None if before is None else schema.open_group(before)
        self._frames_before = {split: self._count_before(split) for split in plans}
        self._session = uuid.uuid4().hex
        shape = next(iter(self.plans.values())).latent_shape
        # Of each array with a value per frame, the shape of one.
        self._frame_shapes = {LATENTS: shape} | ({CODES: shape[1:]} if codes else {}) | dict(extras)
        self._group: zarr.Group
        self._finished: dict[str, dict[int, ChunkMarker]] = {split: {} for split in plans}

    @classmethod
    def open(
        cls,
        path: str | Path,
        metadata: StoreMetadata,
        plans: Mapping[str, SplitPlan],
        *,
        codes: bool,
        extras: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
        dtype: Literal["float16", "float32"] = "float16",
        overwrite: bool = False,
        before: Path | None = None,
    ) -> Self:
        """Create a store, or resume an incomplete one.

        Chunks of an earlier writer are kept if the plan has the same frames in them and their files are intact; all
        others are `pending`.

        Args:
            path: a local folder that is missing, empty, or a store of latents.
            metadata: origin of the latents; must agree with that of an incomplete store.
            plans: by split; `train` is required, since its statistics standardize all splits.
            codes: whether codes are stored in addition to latents.
            extras: further arrays, with the shape of a frame: `preview` (y, x, 3), `actions` (n,).
            dtype: dtype of the stored latents.
            overwrite: delete an existing store of latents.
            before: another store, complete and with a manifest, that this one continues: each of its splits is planned,
                with the same chunks, and begins with its videos. Its chunks are not written again, and its statistics
                stay. Anything in `path` that does not continue it is deleted.
        Raises:
            StoreError: a URL, a complete store, a folder with other content, no `train`.
            StoreMismatchError: an incomplete store of another autoencoder, preprocessing, dtype or set of splits.
            LockedStoreError: another writer has locked it.
        """
        folder = schema.local_path(path)
        if folder is None:
            raise StoreError(f"{path}: stores are written to local folders only: write it locally, then copy it there")
        if TRAIN not in plans:
            raise StoreError(f"{path}: no split {TRAIN!r}, whose statistics standardize all splits, in {sorted(plans)}")
        shapes = {split: plan.latent_shape for split, plan in plans.items()}
        if len(set(shapes.values())) > 1:
            raise StoreError(f"{path}: the splits have latents of different shapes: {shapes}")

        _refuse_foreign(folder)
        begun = (folder / PROGRESS_FOLDER).exists()
        lock = WriterLock(folder / PROGRESS_FOLDER / LOCK_FILE)
        try:
            writer = cls(folder, metadata, plans, codes=codes, extras=extras, dtype=dtype, lock=lock, before=before)
            fresh = overwrite or schema.has_only_begun(folder) or not writer._continues()
            if not fresh:
                writer._check_agreement(schema.open_group(folder))
            begun = True  # whatever fails from here on leaves a store that can be resumed
            if fresh:
                clear_store(folder)
            writer._prepare()
        except BaseException:
            _release(lock, folder)
            if not begun:
                _remove_empty_progress(folder)
            raise
        return writer

    def pending(self, split: str) -> list[ChunkPlan]:
        """Chunks of a split that have not been written, in order."""
        linked, finished = self._linked(split), self._finished[split]
        indices = range(linked, len(self.plans[split].chunks))
        return [self._task(split, index) for index in indices if index not in finished]

    def _count_pending(self, split: str) -> int:
        return len(self.plans[split].chunks) - self._linked(split) - len(self._finished[split])

    def _task(self, split: str, index: int) -> ChunkPlan:
        """The part of a chunk that must be encoded: without the frames that the store before has."""
        plan, frames = self.plans[split], self._frames_before[split]
        chunk = plan.chunk(index)
        if chunk.start >= frames:
            return chunk
        first = next(n for n, piece in enumerate(chunk.pieces) if plan.offsets[piece.video] >= frames)
        return replace(
            chunk,
            start=frames,
            pieces=chunk.pieces[first:],
            video_ids=chunk.video_ids[first:],
            video_views=chunk.video_views[first:],
        )

    def _count_before(self, split: str) -> int:
        """Frames of a split in the store that this one continues."""
        array = None if self._before is None else self._before.get(f"{split}/{LATENTS}")
        return 0 if array is None else array.shape[0]

    def _linked(self, split: str) -> int:
        """Number of files, the first ones, that are those of the store before: all full ones, or all that there are."""
        plan, frames = self.plans[split], self._frames_before[split]
        return len(plan.chunks) if frames == plan.frames else frames // plan.file_frames

    def write_chunk(
        self,
        split: str,
        chunk: ChunkPlan,
        latents: np.ndarray,
        codes: np.ndarray | None,
        measured: Mapping[str, Any] | None = None,
        extras: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> None:
        """Write one whole chunk and wait until it is on disk. Writing a chunk again replaces it.

        Arguments and errors as in `ChunkWriter.write`; also ValueError for a chunk that is not in the plan.
        """
        if chunk != self._task(split, chunk.index):
            raise ValueError(f"chunk {chunk.index} of {split!r} is not in the plan: take chunks from `pending`")
        self._finished[split].pop(chunk.index, None)
        self.accept(split, chunk, self.chunk_writer.write(split, chunk, latents, codes, measured, extras))

    def accept(self, split: str, chunk: ChunkPlan, marker: ChunkMarker) -> None:
        """Register a chunk that another process has written through `chunk_writer`."""
        self._finished[split][chunk.index] = marker

    def markers(self, split: str) -> list[ChunkMarker]:
        """Markers of the finished chunks of a split, in order."""
        return [marker for _, marker in sorted(self._finished[split].items())]

    @property
    def chunk_writer(self) -> ChunkWriter:
        """Writes this store's chunks, in this or other processes, until `close`."""
        return ChunkWriter(self.path, self._session, self._before_path)

    def bytes_needed(self, name: str = LATENTS) -> int:
        """Bytes of all pending chunks of an array; of other arrays than the latents at most, as they are compressed."""
        if name not in self._frame_shapes:
            return 0
        frames = sum(self._count_pending(split) * plan.file_frames for split, plan in self.plans.items())
        return frames * math.prod(self._frame_shapes[name]) * self._frame_type(name).itemsize

    def check_space(self) -> None:
        """Raise NoSpaceError if the latents of the pending chunks do not fit on the disk."""
        free, needed = shutil.disk_usage(self.path).free, self.bytes_needed()
        if needed > free:
            raise NoSpaceError(
                f"{self.path}: pending latents need {needed / 1e6:.1f} MB, but its disk has {free / 1e6:.1f} MB left: "
                "free some, or set paths.latents to a folder on another disk"
            )

    def finish(
        self,
        notes: Mapping[str, Mapping[str, Any]] | None = None,
        store_notes: Mapping[str, Any] | None = None,
        codebook: np.ndarray | None = None,
    ) -> None:
        """Write names, offsets and statistics, flush everything, and mark the store as complete.

        Args:
            notes: by split, JSON for the attributes of its group.
            store_notes: JSON for the attribute `notes` of the root group.
            codebook: [code, channel] vectors of the codes; None: not stored.
        Raises:
            IncompleteStoreError: chunks are pending.
            CorruptStoreError: written chunks have been removed.
            NoSpaceError: the disk is full.
        """
        missing = {split: self._count_pending(split) for split in self.plans}
        if any(missing.values()):
            raise IncompleteStoreError(f"{self.path}: pending chunks: {missing}: write them, then call finish")
        for split in self.plans:
            for name in self._frame_shapes:
                self._frame_reader(split, name).check_files()
        try:
            self._write_index(notes or {})
            if codebook is not None:
                _write_small(self._group, schema.CODEBOOK, np.asarray(codebook, np.float32), len(codebook))
            flush_tree(self.path)
            root = root_document(self._group, promised=True, notes=dict(store_notes or {}))
            write_manifest(self.path, make_manifest(self.path, self._group, root, self._stored_files()))
            write_file(self.path / ROOT_KEY, root)
        except OSError as error:
            if is_full(error):
                raise NoSpaceError(
                    f"{self.path}: no space left for the names of its videos: free some, then resume"
                ) from error
            raise
        shutil.rmtree(self.path / PROGRESS_FOLDER)
        self.close()

    def _stored_files(self) -> dict[str, StoredFile]:
        """Files of latents, codes and the like, by key."""
        files = {}
        for split, plan in self.plans.items():
            for name in self._frame_shapes:
                reader = self._frame_reader(split, name)
                keys = [reader.chunk_key(index * plan.shard_chunks) for index in range(len(plan.chunks))]
                files |= {key: self._before.store.manifest.files[key] for key in keys[: self._linked(split)]}
                files |= {keys[index]: marker.files[name] for index, marker in self._finished[split].items()}
        return files

    def _write_index(self, notes: Mapping[str, Mapping[str, Any]]) -> None:
        if self._before is None:
            statistics = channel_statistics(self.markers(TRAIN))
        else:
            attrs = self._before[f"{TRAIN}/{LATENTS}"].attrs
            statistics = {name: attrs[name] for name in ("mean", "std")}
        for split, plan in self.plans.items():
            group = self._group[split]
            assert isinstance(group, zarr.Group)
            rewrite_document(self.path, group, attributes=dict(notes.get(split, {})))
            rewrite_document(self.path, group[LATENTS], attributes=statistics)
            videos = len(plan.video_ids)
            fps = np.full(videos, self.metadata.fps) if plan.fps is None else plan.fps
            sizes = np.zeros((videos, 2)) if plan.sizes is None else plan.sizes
            for name, values in (
                (schema.VIDEO_OFFSET, np.asarray(plan.offsets)),
                (schema.VIDEO_FPS, np.asarray(fps, np.float32)),
                (schema.VIDEO_SIZE, np.asarray(sizes, np.int32)),
            ):
                _write_small(group, name, values, schema.OFFSET_CHUNK)
            for name, texts in (
                (schema.VIDEO_ID, plan.video_ids),
                (schema.VIDEO_VIEW, plan.video_views),
                (schema.VIDEO_FINGERPRINT, plan.fingerprints),
            ):
                _write_small(group, name, np.array(texts, dtype=np.dtypes.StringDType()), schema.NAME_CHUNK)

    def close(self) -> None:
        """Release the lock, and stop late tasks of this writer. Written chunks are kept; safe to call twice."""
        _release(self._lock, self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check_agreement(self, group: zarr.Group) -> None:
        existing = StoreMetadata.from_attrs(group.attrs, str(self.path))
        differences = self.metadata.differences(existing)
        named = {file.parent.name for file in self.path.glob("*/zarr.json")}
        others = sorted(named - self.plans.keys() - {schema.CODEBOOK, MANIFEST})
        if others:
            differences.append(f"splits: {sorted(self.plans)} here, also {others} there")
        for split, plan in self.plans.items():
            if any((self.path / PROGRESS_FOLDER / split).glob("*.json")):  # otherwise the arrays are just created again
                differences += self._array_differences(group, split, plan)
        if differences:
            raise StoreMismatchError(
                f"{self.path} was written with other settings:\n  " + "\n  ".join(differences) + "\n"
                "Write it again with --overwrite, or write another store, or use the settings of this store"
            )
        if group.attrs.get("complete") and self._before is None:  # one that did not take its place is finished again
            raise StoreError(f"{self.path} is complete: to write it again, use --overwrite")

    def _array_differences(self, group: zarr.Group, split: str, plan: SplitPlan) -> list[str]:
        latents = group.get(f"{split}/{LATENTS}")
        if latents is None:
            return []
        pairs = {
            "dtype": (self.dtype, latents.dtype.name),
            "latent shape": (plan.latent_shape, latents.shape[1:]),
        }
        for name in schema.FRAME_TYPES:
            array = group.get(f"{split}/{name}")
            pairs[name] = (self._frame_shapes.get(name), None if array is None else array.shape[1:])
        return [f"{split} {name}: {here} here, {there} there" for name, (here, there) in pairs.items() if here != there]

    def _frame_type(self, name: str) -> np.dtype[Any]:
        return np.dtype(self.dtype) if name == LATENTS else schema.FRAME_TYPES[name]

    def _prepare(self) -> None:
        """Create or resize the arrays as planned, and find the finished chunks."""
        for stray in self.path.rglob(f"*{PARTIAL}"):  # of a writer that was killed before renaming it
            stray.unlink()
        session_path(self.path).write_text(self._session)
        if self._before is not None:
            write_file(self.path / PROGRESS_FOLDER / BEFORE_FILE, self._before.store.manifest.sha256.encode())
        attrs = self.metadata.to_attrs(list(self.plans), complete=False)
        self._group = zarr.open_group(LocalStore(self.path), mode="a", zarr_format=3, attributes=attrs)
        if dict(self._group.attrs) != attrs:  # other software: the last writer's is recorded
            rewrite_document(self.path, self._group, attributes=attrs)
            self._group = zarr.open_group(LocalStore(self.path), mode="r+", zarr_format=3)
        for split, plan in self.plans.items():
            group = self._group.require_group(split)
            for name, shape in self._frame_shapes.items():
                array = group.get(name)
                size, chunk = (plan.frames, *shape), (plan.chunk_frames, *shape)
                shard = (plan.file_frames, *shape) if plan.shard_chunks > 1 else None
                dtype = self._frame_type(name)
                if array is None or (array.chunks, array.shards, array.dtype) != (chunk, shard, dtype):
                    shutil.rmtree(self.path / PROGRESS_FOLDER / split, ignore_errors=True)
                    schema.create_array(group, name, size, chunk, dtype, shard)
                elif array.shape != size:
                    rewrite_document(self.path, array, shape=size)
                (self.path / split / name / "c").mkdir(exist_ok=True)
                for place in (self.path / split / name / "c").iterdir():
                    if int(place.name) >= len(plan.chunks):  # of a plan with more frames
                        shutil.rmtree(place)
            for name in schema.FRAME_TYPES.keys() - self._frame_shapes.keys():
                if name in group:
                    del group[name]
            (self.path / PROGRESS_FOLDER / split).mkdir(parents=True, exist_ok=True)
            self._link(split)
            self._find_finished(split)
        flush_tree(self.path)

    def _continues(self) -> bool:
        """Whether what is there was begun as the continuation of the same store, if of any."""
        if self._before is None:
            return True
        with contextlib.suppress(FileNotFoundError):
            return (self.path / PROGRESS_FOLDER / BEFORE_FILE).read_text() == self._before.store.manifest.sha256
        return False

    def _link(self, split: str) -> None:
        """Take over the files of the store before."""
        for index in range(self._linked(split)):
            for name in self._frame_shapes:
                array = self._group[f"{split}/{name}"]
                ours, theirs = (file_path(root / split / name, array, index) for root in (self.path, self._before_path))
                if not (ours.exists() and ours.samefile(theirs)):
                    ours.unlink(missing_ok=True)
                    ours.parent.mkdir(parents=True, exist_ok=True)
                    os.link(theirs, ours)

    def _find_finished(self, split: str) -> None:
        plan, linked = self.plans[split], self._linked(split)
        arrays = {name: self._group[f"{split}/{name}"] for name in self._frame_shapes}

        def check(file: Path) -> None:
            try:
                marker = ChunkMarker.read(file)
                index = int(file.stem)
                if index < linked:
                    raise ValueError("the store before has its frames")
                chunk = plan.chunks[index]
                files = {name: file_path(self.path / split / name, array, index) for name, array in arrays.items()}
                marker.check(chunk, files)
            except (ValueError, TypeError, IndexError, OSError) as error:
                logger.info("%s: chunk %s of %s will be written again: %s", self.path, file.stem, split, error)
                file.unlink()  # so that a marker never belongs to other content
            else:
                self._finished[split][index] = marker

        with ThreadPoolExecutor(thread_name_prefix="verify") as pool:
            list(pool.map(check, sorted((self.path / PROGRESS_FOLDER / split).glob("*.json"))))

    def _frame_reader(self, split: str, name: str) -> FrameReader:
        plan = self.plans[split]
        return FrameReader(self._group[f"{split}/{name}"], str(self.path), plan.video_ids, plan.offsets)


def seal(path: str | Path) -> None:
    """Give a complete store a manifest of its files as they are. Check them before.

    Raises:
        StoreError: no complete store in a local folder, or one that cannot be read.
        LockedStoreError: a writer has locked it.
        NoSpaceError: the disk is full.
    """
    with _sealing(path) as (folder, group):
        root = root_document(group, promised=True)
        manifest = make_manifest(folder, group, root, {})
        # In this order: a store without the manifest that its root document promises can be sealed again.
        write_file(folder / ROOT_KEY, root)
        write_manifest(folder, manifest)


def unseal(path: str | Path) -> None:
    """Take the manifest away: a damaged one, or one of files that were changed on purpose. Raises as `seal`."""
    with _sealing(path) as (folder, group):
        write_file(folder / ROOT_KEY, root_document(group, promised=False))
        shutil.rmtree(folder / MANIFEST, ignore_errors=True)


@contextlib.contextmanager
def _sealing(path: str | Path) -> Iterator[tuple[Path, zarr.Group]]:
    """Lock a complete, local store, and turn errors of its files into ours."""
    folder = schema.local_path(path)
    if folder is None:
        raise StoreError(f"{path}: only a store in a local folder gets a manifest: seal it where it was written")
    group = schema.open_group(folder, checked=False)
    if group.attrs.get("complete") is not True:
        raise IncompleteStoreError(f"{folder}: the store is not complete: finish it with `river encode`")
    lock = WriterLock(folder / PROGRESS_FOLDER / LOCK_FILE)
    try:
        yield folder, group
    except OSError as error:
        if is_full(error):
            raise NoSpaceError(f"{folder}: no space left for the manifest: free some, then seal it again") from error
        raise CorruptStoreError(f"{folder}: a file cannot be read or written ({error}): {RESTORE}") from error
    finally:
        _release(lock, folder)
        _remove_empty_progress(folder)


def _write_small(group: zarr.Group, name: str, values: np.ndarray, rows: int) -> None:
    """Write a whole array, in chunks along its first axis, of a given number of rows at most."""
    chunks = (min(len(values), rows), *values.shape[1:])
    schema.create_array(group, name, values.shape, chunks, values.dtype)[:] = values


def _refuse_foreign(folder: Path) -> None:
    """Raise StoreError unless a folder is missing, empty, or a store of latents, even one that has only begun."""
    if not folder.exists():
        return
    if folder.is_dir() and not (folder / "zarr.json").exists():
        if any(folder.iterdir()) and not (folder / PROGRESS_FOLDER).exists():
            raise StoreError(f"{folder} contains other files, and is not overwritten: check paths.latents")
        return
    with contextlib.suppress(IncompleteStoreError):
        schema.open_group(folder, checked=False)


def _release(lock: WriterLock, folder: Path) -> None:
    """Release a store. The progress folder stays, even if it is empty: it shows that a writer was interrupted."""
    if lock.held:
        session_path(folder).unlink(missing_ok=True)
    lock.release()


def _remove_empty_progress(folder: Path) -> None:
    """Remove empty progress folders of a store that was not opened; without a root group they identify the store."""
    if (folder / "zarr.json").exists():
        with contextlib.suppress(OSError):  # it contains markers of finished chunks, or does not exist
            for split in (folder / PROGRESS_FOLDER).iterdir():
                split.rmdir()
            (folder / PROGRESS_FOLDER).rmdir()
