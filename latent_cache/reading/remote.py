"""Reading a store from a URL: failures of the network become errors that name the file."""

import atexit
import contextlib

from fsspec import AbstractFileSystem
from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore

from latent_cache.errors import StoreError


class RemoteStore(FsspecStore):
    """A store that is read with fsspec. A missing file is no error; a file that cannot be read is a StoreError.

    Attributes:
        url: URL of the root, as the user gave it.
    """

    url: str

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Content of a file, or of a part of it; None for a missing file."""
        try:
            content = await super().get(key, prototype, byte_range)
        except Exception as error:  # each protocol's library has its own errors
            raise self._unreadable(key, error) from error
        # A server without range requests sends the whole file.
        if content is not None and isinstance(byte_range, RangeByteRequest):
            if len(content) > byte_range.end - byte_range.start:
                content = content[byte_range.start : byte_range.end]
        elif content is not None and isinstance(byte_range, SuffixByteRequest):
            content = content[-byte_range.suffix :] if len(content) > byte_range.suffix else content
        return content

    async def getsize(self, key: str) -> int:
        """Size of a file in bytes.

        Raises:
            FileNotFoundError: the file is missing.
            StoreError: the file cannot be read.
        """
        try:
            return await super().getsize(key)
        except FileNotFoundError as error:
            # fsspec raises it for all failures; only without a cause, or with status 404, the file is really missing.
            if error.__cause__ is None or getattr(error.__cause__, "status", None) == 404:
                raise
            raise self._unreadable(key, error.__cause__) from error
        except StoreError:
            raise
        except Exception as error:
            raise self._unreadable(key, error) from error

    def _unreadable(self, key: str, error: BaseException) -> StoreError:
        reason = str(error) or type(error).__name__
        return StoreError(
            f"{self.url}/{key} cannot be read ({reason}): check the URL and the connection and try again, or copy the "
            "store to a local folder"
        )


def open_remote(url: str) -> RemoteStore:
    """Open a URL that fsspec supports, for reading. Nothing is downloaded yet.

    Raises:
        StoreError: an unknown protocol, or its package is not installed.
    """
    try:
        store = RemoteStore.from_url(url, read_only=True)
    except (ImportError, ValueError) as error:
        raise StoreError(
            f"{url}: cannot be opened ({error}): use a local path, or install the package of the protocol"
        ) from error
    store.url = url
    # fsspec keeps one file system for all stores of a server until the process ends, and does not close it.
    if store.fs not in _open_file_systems:
        _open_file_systems.append(store.fs)
    return store


_open_file_systems: list[AbstractFileSystem] = []


@atexit.register  # registered after zarr's own handler, so it runs first, while zarr's event loop still runs
def close_connections() -> None:
    """Close the connections of all opened stores; they are opened again on demand."""
    for file_system in _open_file_systems:
        session = getattr(file_system, "_session", None)
        if session is not None and hasattr(session, "close"):
            with contextlib.suppress(Exception):  # a failed close loses nothing
                sync(session.close())
            file_system._session = None
    _open_file_systems.clear()
