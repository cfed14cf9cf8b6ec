"""What can go wrong through no fault of ours, and the exit code that each has."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_SKIPPED = 3


class UserError(Exception):
    """Bad usage, configuration or input. The message says what, which (path, key, value), and the way out."""


class CheckFailed(Exception):
    """A check that the user asked for found something wrong, which was listed. The message sums it up."""


class InputUnreadable(Exception):
    """The file system or the network did not give some input. What is done is kept, and the same command resumes."""


class OutputClosed(Exception):
    """Whoever read what we print has left, as `head` does after its lines: there is nobody to tell it."""


class StoppedBySignal(Exception):
    """The run was stopped by SIGINT or SIGTERM after it had saved; carries the signal's number."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number
