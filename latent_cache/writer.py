"""Writing a store, chunk by chunk, so that it can be interrupted anywhere and go on."""

import contextlib
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import zarr
from zarr.storage import LocalStore

from latent_cache import schema
from latent_cache.chunks import FrameReader
from latent_cache.disk import WriterLock, flush, flush_tree, flush_with_folders
from latent_cache.errors import CorruptStoreError, IncompleteStoreError, StoreError, StoreMismatchError
from latent_cache.incoming import checked_codes, stored_latents
from latent_cache.plan import ChunkPlan, SplitPlan
from latent_cache.progress import ChunkMarker, channel_statistics
from latent_cache.schema import CODES, LATENTS, PROGRESS_FOLDER, TRAIN, StoreMetadata

logger = logging.getLogger(__name__)

LOCK_FILE = "writer.lock"


class StoreWriter:
    """Writes whole chunks of an incomplete store; `finish` makes it complete. Use it in a `with` statement.

    Several threads may write different chunks at once. zarr loses data silently when two tasks write parts of one
    chunk, so a part of a chunk cannot be written at all.
    """

    def __init__(
        self,
        path: Path,
        metadata: StoreMetadata,
        plans: Mapping[str, SplitPlan],
        *,
        codes: bool,
        dtype: str,
        lock: WriterLock,
    ) -> None:
        """For `StoreWriter.open`, which makes the checks."""
        self.path = path
        self.metadata = metadata
        self.plans = dict(plans)
        self.dtype = dtype
        self.codes = codes
        self._lock = lock
        self._frame_arrays = (LATENTS, CODES) if codes else (LATENTS,)
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
        dtype: Literal["float16", "float32"] = "float16",
        overwrite: bool = False,
    ) -> Self:
        """Create a store, or go on with an incomplete one.

        Chunks that an earlier writer finished are kept when the plan still wants the same frames in them and they
        read back whole; all others are `pending`.

        Args:
            path: a local folder; missing, empty, or a store of ours.
            metadata: what the latents are latents of. Must agree with an incomplete store's.
            plans: by split; `train` must be there, since its statistics standardise all splits.
            codes: whether codes are stored beside the latents.
            dtype: of the stored latents.
            overwrite: throw away what is there, if it is a store of ours.
        Raises:
            StoreError: a URL, a complete store, a folder of something else, no `train`.
            StoreMismatchError: an incomplete store of another autoencoder, preprocessing, dtype or set of splits.
            LockedStoreError: another writer is at it.
        """
        folder = schema.local_path(path)
        if folder is None:
            raise StoreError(f"{path}: a store is written to a local folder: write it to one, then copy it there")
        if TRAIN not in plans:
            raise StoreError(f"{path}: splits {sorted(plans)} lack {TRAIN!r}, whose statistics standardise all splits")
        shapes = {split: plan.latent_shape for split, plan in plans.items()}
        if len(set(shapes.values())) > 1:
            raise StoreError(f"{path}: the splits' latents differ in shape: {shapes}")

        _refuse_foreign(folder)
        lock = WriterLock(folder / PROGRESS_FOLDER / LOCK_FILE)
        try:
            writer = cls(folder, metadata, plans, codes=codes, dtype=dtype, lock=lock)
            if overwrite or not (folder / "zarr.json").exists():
                _clear(folder)
            else:
                writer._check_agreement(schema.open_group(folder))
            writer._prepare()
        except BaseException:
            _release(lock, folder)
            raise
        return writer

    def pending(self, split: str) -> list[ChunkPlan]:
        """The chunks of a split that are still to be written, in order."""
        finished = self._finished[split]
        plan = self.plans[split]
        return [plan.chunk(index) for index in range(len(plan.chunks)) if index not in finished]

    def write_chunk(self, split: str, chunk: ChunkPlan, latents: np.ndarray, codes: np.ndarray | None) -> None:
        """Write one whole chunk and wait until it is on the disk. Writing a chunk again replaces it.

        Args:
            chunk: from `pending`.
            latents: [chunk.frames, c, h, w] float, pre-quantization.
            codes: [chunk.frames, h, w] integer in 0..65535, or None for a store without codes.
        Raises:
            StoreError: NaN or infinity in the latents, or values that the dtype cannot hold. Names the videos.
            ValueError: arrays that don't fit the plan.
        """
        plan = self.plans[split]
        if chunk != plan.chunk(chunk.index):
            raise ValueError(f"chunk {chunk.index} of {split!r} is not the plan's: take it from `pending`")
        if (codes is None) == self.codes:
            raise ValueError(f"codes are {'missing' if self.codes else 'given'}, but the store has codes={self.codes}")
        stored = stored_latents(latents, self.dtype, plan, chunk, f"{self.path}/{split}")
        stored_codes = None if codes is None else checked_codes(codes, plan, chunk)

        # First the marker goes, then the old chunk: at no moment does a marker vouch for another content. Without the
        # old file zarr also has nothing to merge the padding of a partial last chunk with.
        self._finished[split].pop(chunk.index, None)
        self._marker_path(split, chunk.index).unlink(missing_ok=True)
        for name, values in ((LATENTS, stored), (CODES, stored_codes)):
            if values is None:
                continue
            reader = self._frame_reader(split, name)
            file = self.path / reader.chunk_key(chunk.index)
            file.unlink(missing_ok=True)
            reader.array[chunk.start : chunk.stop] = values
            flush_with_folders(file, self.path)

        marker = ChunkMarker.of(chunk, stored)
        marker.write(self._marker_path(split, chunk.index))
        self._finished[split][chunk.index] = marker

    def finish(self) -> None:
        """Write the videos' names and offsets and the statistics, flush everything, and call the store complete.

        Raises:
            IncompleteStoreError: chunks are pending.
            CorruptStoreError: somebody removed chunks that were written.
        """
        missing = {split: len(plan.chunks) - len(self._finished[split]) for split, plan in self.plans.items()}
        if any(missing.values()):
            raise IncompleteStoreError(f"{self.path}: chunks still to be written: {missing}: write them, then finish")
        for split in self.plans:
            for name in self._frame_arrays:
                self._frame_reader(split, name).check_files()
        statistics = channel_statistics(list(self._finished[TRAIN].values()))
        for split, plan in self.plans.items():
            group = self._group[split]
            assert isinstance(group, zarr.Group)
            group[LATENTS].update_attributes(statistics)
            for name, values in (
                (schema.VIDEO_OFFSET, plan.offsets),
                (schema.VIDEO_ID, np.array(plan.video_ids, dtype=np.dtypes.StringDType())),
                (schema.VIDEO_VIEW, np.array(plan.video_views, dtype=np.dtypes.StringDType())),
            ):
                schema.create_array(group, name, values.shape, values.shape, values.dtype)[:] = values
        flush_tree(self.path)
        self._group.update_attributes({"complete": True})
        flush_with_folders(self.path / "zarr.json", self.path)
        shutil.rmtree(self.path / PROGRESS_FOLDER)
        self.close()

    def close(self) -> None:
        """Let other writers in. What was written stays; safe to call twice."""
        _release(self._lock, self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check_agreement(self, group: zarr.Group) -> None:
        there = StoreMetadata.from_attrs(group.attrs, str(self.path))
        differences = self.metadata.differences(there)
        strangers = sorted({file.parent.name for file in self.path.glob("*/zarr.json")} - self.plans.keys())
        if strangers:
            differences.append(f"splits: {sorted(self.plans)} here, also {strangers} there")
        for split, plan in self.plans.items():
            if any((self.path / PROGRESS_FOLDER / split).glob("*.json")):  # else the arrays are simply made anew
                differences += self._array_differences(group, split, plan)
        if differences:
            raise StoreMismatchError(
                f"{self.path} was written for something else:\n  " + "\n  ".join(differences) + "\n"
                "Write it again with --overwrite, or write another store, or use the settings of this one"
            )
        if group.attrs.get("complete"):
            raise StoreError(f"{self.path} is complete: there is nothing to write, except anew with --overwrite")

    def _array_differences(self, group: zarr.Group, split: str, plan: SplitPlan) -> list[str]:
        latents = group.get(f"{split}/{LATENTS}")
        if latents is None:
            return []
        pairs = {
            "dtype": (self.dtype, latents.dtype.name),
            "latent shape": (plan.latent_shape, latents.shape[1:]),
            "codes": (self.codes, f"{split}/{CODES}" in group),
        }
        return [f"{split} {name}: {here} here, {there} there" for name, (here, there) in pairs.items() if here != there]

    def _prepare(self) -> None:
        """Make the arrays as the plans want them, and find out which chunks are finished."""
        for stray in self.path.rglob("*.partial"):  # of a writer that was killed between writing and renaming
            stray.unlink()
        attrs = self.metadata.to_attrs(complete=False)
        self._group = zarr.open_group(LocalStore(self.path), mode="a", zarr_format=3, attributes=attrs)
        if dict(self._group.attrs) != attrs:  # other software: the last writer is the one to name
            self._group.update_attributes(attrs)
        for split, plan in self.plans.items():
            group = self._group.require_group(split)
            channels, height, width = plan.latent_shape
            shapes = {LATENTS: (channels, height, width)} | ({CODES: (height, width)} if self.codes else {})
            for name, shape in shapes.items():
                array = group.get(name)
                size, chunk = (plan.frames, *shape), (plan.chunk_frames, *shape)
                dtype = np.dtype(self.dtype if name == LATENTS else np.uint16)
                if array is None or array.chunks != chunk or array.dtype != dtype:
                    shutil.rmtree(self.path / PROGRESS_FOLDER / split, ignore_errors=True)
                    schema.create_array(group, name, size, chunk, dtype)
                elif array.shape != size:
                    array.resize(size)
            if not self.codes and CODES in group:
                del group[CODES]
            self._recognise_finished(split)
        flush_tree(self.path)

    def _recognise_finished(self, split: str) -> None:
        plan = self.plans[split]
        for file in sorted((self.path / PROGRESS_FOLDER / split).glob("*.json")):
            try:
                marker = ChunkMarker.read(file)
                index = int(file.stem)
                chunk = plan.chunks[index]
                if not marker.proves(chunk):
                    raise ValueError("the plan now wants other frames there")
                for name in self._frame_arrays:
                    self._frame_reader(split, name).read(chunk.start, chunk.stop)
            except (ValueError, TypeError, IndexError, CorruptStoreError) as error:
                logger.info("%s: chunk %s of %s is written again: %s", self.path, file.stem, split, error)
                file.unlink()
            else:
                self._finished[split][index] = marker

    def _frame_reader(self, split: str, name: str) -> FrameReader:
        plan = self.plans[split]
        return FrameReader(self._group[f"{split}/{name}"], str(self.path), plan.video_ids, plan.offsets)

    def _marker_path(self, split: str, index: int) -> Path:
        return self.path / PROGRESS_FOLDER / split / f"{index}.json"


def _refuse_foreign(folder: Path) -> None:
    """Raise StoreError unless a folder is missing, empty, a store of ours, or one that was just begun."""
    if not folder.exists():
        return
    if folder.is_dir() and not (folder / "zarr.json").exists():
        if any(folder.iterdir()) and not (folder / PROGRESS_FOLDER).exists():
            raise StoreError(f"{folder}: holds something else, and no store is written over it: check paths.latents")
        return
    schema.open_group(folder)


def _release(lock: WriterLock, folder: Path) -> None:
    """Let go of a store, and leave no empty folder in it. Without a root that folder says that the store is ours."""
    lock.release()
    if (folder / "zarr.json").exists():
        with contextlib.suppress(OSError):  # markers of finished chunks are in it, or it is gone
            (folder / PROGRESS_FOLDER).rmdir()


def _clear(folder: Path) -> None:
    """Remove all but the lock; the root first, so that what is half removed is never taken for complete."""
    (folder / "zarr.json").unlink(missing_ok=True)
    flush(folder)
    for entry in [*folder.iterdir(), *(folder / PROGRESS_FOLDER).iterdir()]:
        if entry.name in (PROGRESS_FOLDER, LOCK_FILE):
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
