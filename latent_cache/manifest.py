"""The manifest of a complete store: a digest of each of its files, and reading that compares each file with it.

It is the document of an empty array, `manifest/zarr.json`, since Zarr programs warn about files that are no part of an
array or group. The order of writing is: data, manifest, root document (which says `complete` and is in the manifest).
A store that was written before there were manifests has none, and its root document promises none.
"""

import hashlib
import struct
from functools import lru_cache
from itertools import pairwise
from typing import Any, Self

import google_crc32c
import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import WrapperStore

ROOT_KEY, MANIFEST, MANIFEST_KEY = "zarr.json", "manifest", "manifest/zarr.json"
CHECKSUM_BYTES = 4


class ManifestError(ValueError):
    """A file is not the one in the manifest, or the manifest itself is damaged."""


def part_checksum(part: np.ndarray) -> int:
    """CRC-32C of all bytes of a part but the last four, which the codecs check: for latents it is what they contain."""
    return google_crc32c.value(part[:-CHECKSUM_BYTES])


@dataclass(frozen=True)
class StoredFile:
    """What a file of a store is.

    Attributes:
        size: in bytes.
        sha256: of its content.
        crc32c: by first byte, the `part_checksum` of each part of the file that is read at once: of the whole chunk, or
            of each chunk of a shard and of the index at its end. Empty for a metadata document.
    """

    size: int
    sha256: str
    crc32c: dict[int, int]

    @classmethod
    def of(cls, content: bytes, chunks: int = 1) -> Self:
        """Describe a file of chunks: one, or a shard of several; 0 for a metadata document."""
        starts = [0] if chunks == 1 else []
        if chunks > 1:
            index = len(content) - 16 * chunks - CHECKSUM_BYTES  # offset and size of each chunk, and a checksum
            places = struct.iter_unpack("<QQ", content[index:-CHECKSUM_BYTES])
            starts = sorted({start for start, _ in places if start < index} | {index})
        view = np.frombuffer(content, np.uint8)
        parts = {start: part_checksum(view[start:stop]) for start, stop in pairwise([*starts, len(content)])}
        return cls(len(content), hashlib.sha256(content).hexdigest(), parts)

    def holds(self, content: np.ndarray, start: int | None) -> bool:
        """Whether [bytes] uint8 is the file's content, or the part of it that begins at byte `start`."""
        if not self.crc32c:
            return hashlib.sha256(content).hexdigest() == self.sha256
        if start is not None and (start > 0 or len(content) < self.size):
            return part_checksum(content) == self.crc32c.get(start)
        bounds = pairwise([*self.crc32c, self.size])
        parts = {first: part_checksum(content[first:last]) for first, last in bounds}
        return len(content) == self.size and parts == self.crc32c


class Manifest(BaseModel):
    """Digests of all files of a store but the manifest itself.

    Attributes:
        autoencoder: sha256 of the weights of the autoencoder that the latents belong to.
        files: by key, which is the path in the store.
        sha256: of the above, so that damage of the manifest is told from damage of a file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    autoencoder: str
    files: dict[str, StoredFile]
    sha256: str

    @classmethod
    def of(cls, autoencoder: str, files: dict[str, StoredFile]) -> Self:
        """The manifest of these files."""
        draft = cls(autoencoder=autoencoder, files=files, sha256="")
        return draft.model_copy(update={"sha256": draft._own_sha256()})

    @classmethod
    @lru_cache(maxsize=4)  # a command opens the same store several times
    def parse(cls, document: bytes) -> Self:
        """Read the manifest from its document. Raises ManifestError for a damaged one."""
        try:
            manifest = _Document.model_validate_json(document).attributes.manifest
        except ValidationError as error:
            raise ManifestError(f"is damaged ({error.errors()[0]['msg']})") from None
        if manifest.sha256 != manifest._own_sha256():
            raise ManifestError("is damaged")
        return manifest

    def check(self, key: str, content: Buffer | None, byte_range: ByteRequest | None = None) -> None:
        """Compare a file, or a part of it, with the manifest.

        A missing chunk is left to the readers, which name its videos.

        Raises:
            ManifestError: it is another file, or missing, or one that the store does not have.
        """
        file = self.files.get(key)
        if content is None:
            if file is not None and not file.crc32c:
                raise ManifestError(f"{key} is missing")
            return
        if file is None:
            raise ManifestError(f"{key} is not in the store's manifest")
        start = None
        if isinstance(byte_range, RangeByteRequest):
            start = byte_range.start
        elif isinstance(byte_range, SuffixByteRequest):
            start = file.size - byte_range.suffix
        if not file.holds(content.as_numpy_array(), start):
            raise ManifestError(f"{key} {CHANGED}")

    def _own_sha256(self) -> str:
        return hashlib.sha256(self.model_dump_json(exclude={"sha256"}).encode()).hexdigest()


CHANGED = "is damaged or another file: its digest is not the one in the manifest of the store"


class _Attributes(BaseModel):
    manifest: Manifest


class _Document(BaseModel):
    attributes: _Attributes


class CheckedStore(WrapperStore[Store]):
    """Files of a store of latents, each compared with the manifest, if there is one, when it is read.

    Attributes:
        manifest: None until `compare_with`.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.manifest: Manifest | None = None
        # As they were when the store was opened.
        self._root: bytes | None = None
        self._document: bytes | None = None

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Content of a file, or of a part of it; None for a missing chunk. Raises ManifestError."""
        content = await self._store.get(key, prototype, byte_range)
        if self.manifest is not None:
            self.manifest.check(key, content, byte_range)
        elif key == ROOT_KEY and content is not None:
            self._root = content.to_bytes()
        return content

    async def getsize(self, key: str) -> int:
        """Size of a file in bytes."""
        return await self._store.getsize(key)

    def read(self, key: str) -> Buffer | None:
        """Content of a file, compared with nothing; None for a missing one."""
        return sync(self._store.get(key, default_buffer_prototype()))

    def read_manifest(self) -> Manifest | None:
        """The store's manifest; None if there is none. Raises ManifestError for a damaged one."""
        document = self.read(MANIFEST_KEY)
        self._document = None if document is None else document.to_bytes()
        return None if self._document is None else Manifest.parse(self._document)

    def compare_with(self, manifest: Manifest) -> None:
        """Compare the root document, which was read before, and from now on every file that is read.

        Raises:
            ManifestError: the root document is another one.
        """
        assert self._root is not None
        manifest.check(ROOT_KEY, default_buffer_prototype().buffer.from_bytes(self._root))
        self.manifest = manifest

    def was_replaced(self) -> bool:
        """Whether another store is there now than the one that was opened."""
        opened = {ROOT_KEY: self._root, MANIFEST_KEY: self._document}
        now = {key: self.read(key) for key in opened}
        return any((content and content.to_bytes()) != opened[key] for key, content in now.items())


def manifest_attributes(manifest: Manifest) -> dict[str, Any]:
    """Attributes of the manifest's document."""
    return {
        "description": "Size, sha256 and CRC-32C of each file of the store. Without elements, since these are all.",
        MANIFEST: manifest.model_dump(mode="json"),
    }
