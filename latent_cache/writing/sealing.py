"""Writing the root document and the manifest of a store whose other files are complete."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from latent_cache import schema
from latent_cache.manifest import MANIFEST, MANIFEST_KEY, ROOT_KEY, Manifest, StoredFile, manifest_attributes
from latent_cache.reading.frame_reader import chunks_per_file
from latent_cache.reading.reader import split_names
from latent_cache.schema import StoreMetadata
from latent_cache.writing.disk import write_file


def document(node: zarr.Group | zarr.Array, **changes: Any) -> bytes:
    """The metadata document of a group or an array.

    Args:
        changes: fields of its metadata that change.
    """
    return replace(node.metadata, **changes).to_buffer_dict(default_buffer_prototype())[ROOT_KEY].to_bytes()


def rewrite_document(folder: Path, node: zarr.Group | zarr.Array, **changes: Any) -> None:
    """Change the document of a group or an array of a store, and wait until it is on disk.

    Zarr gives a document its name before its content is on disk: a loss of power would leave it cut off.

    Args:
        folder: of the store.
        changes: fields of its metadata that change; `attributes` are added to those that it has.
    """
    if "attributes" in changes:
        changes["attributes"] = {**node.attrs, **changes["attributes"]}
    write_file(folder / node.path / ROOT_KEY, document(node, **changes))


def root_document(group: zarr.Group, *, promised: bool, **attributes: Any) -> bytes:
    """The document of the root group of a complete store.

    Args:
        promised: whether it says that there is a manifest.
        attributes: that change.
    """
    attrs = {**group.attrs, **attributes, "complete": True}
    attrs.pop(MANIFEST, None)
    if promised:
        attrs[MANIFEST] = True
    return document(group, attributes=attrs)


def make_manifest(folder: Path, group: zarr.Group, root: bytes, known: Mapping[str, StoredFile]) -> Manifest:
    """The manifest of a store that is on disk but for its root document.

    Args:
        group: the root group.
        known: by key, files that need not be read again.
    Raises:
        OSError: a file is missing.
    """
    files = {ROOT_KEY: StoredFile.of(root, chunks=0)}
    for key, chunks in _keys(group):
        files[key] = known[key] if key in known else StoredFile.of((folder / key).read_bytes(), chunks)
    return Manifest.of(StoreMetadata.from_attrs(group.attrs, str(folder)).autoencoder["sha256"], files)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and wait until it is on disk."""
    content: dict[str, Any] = {}
    attributes = manifest_attributes(manifest)
    zarr.create_array(MemoryStore(content), name=MANIFEST, shape=(0,), chunks=(1,), dtype="u1", attributes=attributes)
    write_file(folder / MANIFEST_KEY, content[MANIFEST_KEY].to_bytes())


def _keys(group: zarr.Group) -> Iterator[tuple[str, int]]:
    """Keys of all files but the root document, with the number of chunks in each; 0 for a metadata document."""
    for split in ("", *split_names(group)):
        if split:
            yield f"{split}/{ROOT_KEY}", 0
        for name in schema.DIMENSIONS if split else (schema.CODEBOOK,):
            array = group.get(f"{split}/{name}".strip("/"))
            if array is None:
                continue
            yield f"{array.path}/{ROOT_KEY}", 0
            counts = (-(-size // step) for size, step in zip(array.shape, array.shards or array.chunks, strict=True))
            for place in itertools.product(*map(range, counts)):
                yield f"{array.path}/{array.metadata.encode_chunk_key(place)}", chunks_per_file(array)
