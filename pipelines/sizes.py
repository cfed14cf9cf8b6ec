"""Sizes of memory as people write them."""

import re

from pipelines.errors import UserError

_UNITS = {
    "": 1,
    "B": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


def parse_size(text: str) -> int:
    """`"4 GiB"`, `"512MB"` or `"1000"` to bytes.

    Raises:
        UserError: it is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise UserError(f"{text!r} is not a size of memory; write for example 4 GiB or 512 MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
