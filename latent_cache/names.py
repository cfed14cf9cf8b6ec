"""The names of a split's videos, read when they are asked for: a million of them should not be there for nothing."""

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import zarr

from latent_cache.errors import CorruptStoreError


class Names(Sequence[str]):
    """An array of strings as a sequence, of which one chunk at a time is in memory.

    Args:
        array: [video] strings, none of them empty.
        url: of the store, for messages.
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
        return f"<{len(self)} names, {self[0]!r} first>"

    def find(self, name: str) -> np.ndarray:
        """Rows [n] int64 that have a name."""
        size = self._array.chunks[0]
        found = [np.flatnonzero(self._read(index) == name) + index * size for index in range(-(-len(self) // size))]
        return np.concatenate(found)

    def check(self) -> None:
        """Read the first and the last chunk, so that damage is noticed early, in most cases.

        Raises:
            CorruptStoreError: they are missing or damaged.
        """
        self._read(0)
        self._read((len(self) - 1) // self._array.chunks[0])

    def _read(self, index: int) -> np.ndarray:
        held, values = self._chunk  # one assignment, so that threads see a pair that belongs together
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
        return CorruptStoreError(
            f"{self._url}/{self._array.path}/c/{index} {what}: restore the file from a copy, or write the store again: "
            "`make encode` with --overwrite"
        )
