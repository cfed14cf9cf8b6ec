"""What can be wrong with a store that a user gave. Every message names the path and the way out."""


class StoreError(Exception):
    """A store cannot be used as asked. Caught by commands as bad input, not as a fault of the program."""


class IncompleteStoreError(StoreError):
    """The writer has not finished: the store lacks chunks, or has all of them and lacks the word `complete`."""


class CorruptStoreError(StoreError):
    """The store says that it is complete, and a file of it is missing, cut short or altered."""


class StoreMismatchError(StoreError):
    """The store is sound, and belongs to another autoencoder, preprocessing or plan than the one at hand."""


class LockedStoreError(StoreError):
    """Another writer holds the store."""


class NoSpaceError(StoreError):
    """The disk is full. What was written stays whole."""


class StaleWriterError(StoreError):
    """A task of an earlier writer, which went on after that writer had ended, was kept from writing."""
