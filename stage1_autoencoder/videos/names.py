"""Names of videos and files: their natural order, and how messages and ids show them."""

import re
from collections.abc import Iterable, Sequence

# What moves a terminal's cursor, begins a line, or turns the direction of the text.
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def escaped(text: str) -> str:
    """A text on one line: control characters become `\\x1b`, `\\n` and so on."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def natural_order(names: Sequence[str]) -> list[int]:
    """Positions of names in natural order: numbers inside names count as numbers, so clip2 comes before clip10.

    Names that differ only in leading zeros follow the order of their characters.
    """
    by_characters = sorted(range(len(names)), key=names.__getitem__)
    return sorted(by_characters, key=lambda position: _natural_key(names[position]))


def _natural_key(name: str) -> str:
    # One string per name, since there may be a million. A zero character, which no name contains, sorts the text before
    # a number like the end of a name; the number of digits before the digits sorts numbers by value.
    return re.sub(r"\d+", lambda number: _number_key(number[0]), name)


def _number_key(digits: str) -> str:
    value = str(int(digits)) if len(digits) < 1000 else digits  # more than Python converts
    return f"\0{chr(len(value))}{value}"


def join_names(names: Iterable[str], most: int = 5) -> str:
    """Join names for a message; a list longer than `most` is shortened."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
