"""Types of settings: paths that expand, and numbers with bounds."""

import os
import re
from typing import Annotated

from pydantic import AfterValidator, Field, PositiveInt

# Bounds that no machine's memory reaches, so that a mistyped size is refused at once.
LARGEST_WIDTH = 8192
Width = Annotated[PositiveInt, Field(le=LARGEST_WIDTH)]  # channels of a layer, pixels of a side
Depth = Annotated[PositiveInt, Field(le=256)]  # blocks one after another
MOST_HALVINGS = 8
Halvings = Annotated[PositiveInt, Field(le=MOST_HALVINGS)]
Size = Annotated[PositiveInt, Field(le=65536)]  # frames or clips at once
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = tuple[Beta, Beta]


def expand_path(text: str) -> str:
    """A path with the values of `~`, `~user`, `$NAME` and `${NAME}`.

    Raises:
        ValueError: no such user or variable, or a character that no path has.
    """
    if "\0" in text:
        raise ValueError("a path has no NUL character")
    home = os.path.expanduser(text)
    if home.startswith("~"):
        raise ValueError(f"there is no user {home[1:].partition('/')[0]!r}; a folder of this name is ./{home}")
    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", _variable, home)


def _variable(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    if name not in os.environ:
        raise ValueError(f"the environment variable {name} is not set")
    return os.environ[name]


FilePath = Annotated[str, AfterValidator(expand_path)]
