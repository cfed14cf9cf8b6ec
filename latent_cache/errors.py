"""What can be wrong with a store that a user gave. Every message names the path and the way out."""


class StoreError(Exception):
    """A store cannot be used as asked. Caught by commands as bad input, not as a fault of the program."""


class IncompleteStoreError(StoreError):
    """The writer has not finished: the store lacks chunks, or has all of them and lacks the word `complete`."""


class CorruptStoreError(StoreError):
    """The store says that it is complete, and a file of it is missing, cut short or altered."""


class DamagedFramesError(CorruptStoreError):
    """A chunk of latents or codes is missing, cut short or altered.

    Attributes:
        file: path or URL of the file in which the chunk lies.
        what: what is wrong with it, as in `is missing`.
        start, stop: the frames of the split that it carries, `stop` excluded.
    """

    def __init__(self, message: str, file: str, what: str, start: int, stop: int) -> None:
        super().__init__(message, file, what, start, stop)  # all, so that the error can be sent between processes
        self.file, self.what, self.start, self.stop = file, what, start, stop

    def __str__(self) -> str:
        return self.args[0]


class StoreMismatchError(StoreError):
    """The store is sound, and belongs to another autoencoder, preprocessing or plan than the one at hand."""


class LockedStoreError(StoreError):
    """Another writer holds the store."""


class NoSpaceError(StoreError):
    """The disk is full. What was written stays whole."""


class StaleWriterError(StoreError):
    """A task of an earlier writer, which went on after that writer had ended, was kept from writing."""
