"""Messages of a run, one line per phase, and its progress bars."""

import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TextIO

from tqdm import tqdm

from stage1_autoencoder.videos.names import escaped

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Silence everything but results and errors (the command line's --quiet)."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    return _quiet


def printable(message: str) -> str:
    """A message for a terminal: without the passwords of its URLs, and with control characters escaped."""
    return "\n".join(map(escaped, hide_passwords(message).split("\n")))


def hide_passwords(text: str) -> str:
    """A text in which the users and passwords of URLs are `***`."""
    return re.sub(r"://[^/\s@]+@", "://***@", text)


def say(message: str) -> None:
    """Print one line without breaking a progress bar."""
    if not _quiet:
        _print(message, sys.stdout)


def duration(seconds: float) -> str:
    """A duration for people: `40 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for size, unit, digits in ((86400, "days", 1), (3600, "h", 1), (60, "min", 0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def warn(message: str) -> None:
    """Print one line on stderr, also when the run is quiet."""
    say_error(f"warning: {message}")


def say_error(message: str) -> None:
    """Print one line on stderr as it is."""
    _print(message, sys.stderr)


def _print(message: str, stream: TextIO) -> None:
    """Print a line. A stream that takes no more (a closed pipe, a full disk, a lost terminal) ends no work."""
    with suppress(OSError):
        tqdm.write(printable(message), file=stream)
        stream.flush()


def progress(
    iterable: Iterable | None = None, *, total: int | None = None, initial: int = 0, description: str, unit: str
) -> tqdm:
    """A bar with rate and ETA; nothing if stderr is not a terminal or the run is quiet."""
    return tqdm(
        iterable,
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        unit_scale=unit == "B",
        dynamic_ncols=True,
        smoothing=0.1,
        disable=True if _quiet else None,
    )


def counted(number: int, noun: str) -> str:
    """`1 video`, `2 videos`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
