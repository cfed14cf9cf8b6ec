"""Reading a store behind a URL: what a network can do to it becomes an error that names the file."""

import atexit
import contextlib

from fsspec import AbstractFileSystem
from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore

from latent_cache.errors import StoreError


class RemoteStore(FsspecStore):
    """A store that fsspec reads. A file that is not there is no error; one that cannot be got is a StoreError.

    Attributes:
        url: of the root, as the user gave it.
    """

    url: str

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """A file, or a part of it; None where there is none."""
        try:
            content = await super().get(key, prototype, byte_range)
        except Exception as error:  # the library behind each protocol has errors of its own
            raise self._unreadable(key, error) from error
        # A server that knows no ranges sends the whole file.
        if content is not None and isinstance(byte_range, RangeByteRequest):
            if len(content) > byte_range.end - byte_range.start:
                content = content[byte_range.start : byte_range.end]
        elif content is not None and isinstance(byte_range, SuffixByteRequest):
            content = content[-byte_range.suffix :] if len(content) > byte_range.suffix else content
        return content

    async def getsize(self, key: str) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError: there is none.
            StoreError: it cannot be got.
        """
        try:
            return await super().getsize(key)
        except FileNotFoundError as error:
            # fsspec says so of all that fails on the way; a cause that has no other status is the network's.
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
            f"{self.url}/{key} cannot be read ({reason}): check the URL and the connection, and try again, or copy the "
            "store to a local folder"
        )


def open_remote(url: str) -> RemoteStore:
    """A store behind a URL that fsspec knows, for reading. Nothing is fetched yet.

    Raises:
        StoreError: no such protocol, or its package is not installed.
    """
    try:
        store = RemoteStore.from_url(url, read_only=True)
    except (ImportError, ValueError) as error:
        raise StoreError(f"{url}: cannot be opened ({error}): give a local path, or install the protocol") from error
    store.url = url
    # One for all stores of a server, kept by fsspec until the process ends; nobody else closes its connections.
    if store.fs not in _open_file_systems:
        _open_file_systems.append(store.fs)
    return store


_open_file_systems: list[AbstractFileSystem] = []


@atexit.register  # after zarr's own, and so called before it, while its event loop still runs
def close_connections() -> None:
    """Close the connections of all stores that were opened; they are opened again when they are needed."""
    for file_system in _open_file_systems:
        session = getattr(file_system, "_session", None)
        if session is not None and hasattr(session, "close"):
            with contextlib.suppress(Exception):  # nothing is lost by a connection that closes badly
                sync(session.close())
            file_system._session = None
    _open_file_systems.clear()
