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


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP came; carries the signal's number."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number


class StoppedBySignal(Exception):
    """The run was stopped by SIGINT, SIGTERM or SIGHUP after it had saved; carries the signal's number."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number
