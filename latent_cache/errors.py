"""Errors of stores. Every message names the path and the way out."""

RESTORE = "restore the file from a copy, or write the store again: `river encode` with --overwrite"
REMAKE = "copy it again, or write a new one with `inspect --seal`, which checks all other files by their checksums"


class StoreError(Exception):
    """A store cannot be used as requested. Commands treat it as bad input, not as a bug."""


class IncompleteStoreError(StoreError):
    """The writer has not finished: chunks are missing, or the store is not marked as complete."""


class CorruptStoreError(StoreError):
    """The store is marked as complete, but one of its files is missing, truncated or altered."""


class LostManifestError(CorruptStoreError):
    """The store's manifest is missing or damaged. Nothing is known about its other files."""


class ReplacedStoreError(StoreError):
    """The store was written again after it had been opened."""


class DamagedFramesError(CorruptStoreError):
    """A chunk of latents or codes is missing, truncated or altered.

    Attributes:
        file: path or URL of the file that contains the chunk.
        what: what is wrong with it, such as `is missing`.
        start, stop: frames of the split in the chunk, `stop` excluded.
    """

    def __init__(self, message: str, file: str, what: str, start: int, stop: int) -> None:
        super().__init__(message, file, what, start, stop)  # all of them, so that the error can be pickled
        self.file, self.what, self.start, self.stop = file, what, start, stop

    def __str__(self) -> str:
        return self.args[0]


class StoreMismatchError(StoreError):
    """The store is intact, but was written for another autoencoder, preprocessing or plan."""


class LockedStoreError(StoreError):
    """Another writer has locked the store."""


class NoSpaceError(StoreError):
    """The disk is full. Chunks written before are intact."""


class StaleWriterError(StoreError):
    """A task of a writer that has ended tried to write."""
