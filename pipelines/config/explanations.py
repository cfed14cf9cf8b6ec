"""What is wrong with a configuration, in one line per key."""

import difflib
import math
import re
import reprlib
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from pipelines.config.sections import section_of
from pipelines.config.settings import RiverConfig


class Problem(typing.NamedTuple):
    """What is wrong with a key: its path, pydantic's type of the error, the value, and what is allowed."""

    path: list[str]
    type: str
    value: Any
    message: str


def by_key(errors: list[ErrorDetails], values: Any) -> list[Problem]:
    """One problem per key. Pydantic has one per type that a key may have, and one per section around a wrong key."""
    problems: dict[str, Problem] = {}
    for error in errors:
        path = _path_of(error["loc"], values, error["type"])
        message = _IN_YAML.get(error["type"], error["msg"]).removeprefix("Value error, ")
        key = ".".join(path)
        if path and key in problems:
            message = f"{problems[key].message}, or {message.removeprefix('Input should be ')}"
        problems[key if path else message] = Problem(path, error["type"], error["input"], message)
    return [
        problem
        for key, problem in problems.items()
        if not problem.path or not any(other.startswith(f"{key}.") for other in problems)
    ]


# Pydantic's messages that speak of Python.
_IN_YAML = dict.fromkeys(("model_type", "dict_type"), "Input should be a section of keys") | {
    "tuple_type": "Input should be a list",
    "list_type": "Input should be a list",
    "bool_parsing": "Input should be true or false",
    "bool_type": "Input should be true or false",
}


def _path_of(location: tuple[int | str, ...], values: Any, kind: str) -> list[str]:
    """The path of a key as users write it: without the types that pydantic adds where there are several."""
    path = []
    for part in location:
        if (inner := _item(values, part)) is not _ABSENT:
            values = inner
            path.append(str(part))
    return [*path, str(location[-1])] if kind == "missing" else path


_ABSENT = object()


def _item(values: Any, key: int | str) -> Any:
    """What a mapping or a list has at a key."""
    if isinstance(values, dict):
        return values.get(key, _ABSENT)
    return values[key] if isinstance(values, list) and key in range(len(values)) else _ABSENT


def odd_numbers(values: Any, checked: Any, path: tuple[str, ...] = ()) -> Iterator[Problem]:
    """Numbers that no key can have, although its type has them: `true`, infinity, and integers of more than 64 bits."""
    if isinstance(checked, dict | list | tuple):
        for key, inner in checked.items() if isinstance(checked, dict) else enumerate(checked):
            yield from odd_numbers(_item(values, key), inner, (*path, str(key)))
    elif isinstance(checked, int | float) and not isinstance(checked, bool):
        if isinstance(values, bool):
            yield Problem([*path], "number", values, "Input should be a number")
        elif not math.isfinite(checked):
            yield Problem([*path], "number", values, "Input should be a finite number")
        elif isinstance(checked, int) and not -(2**63) <= checked < 2**63:
            yield Problem([*path], "number", values, f"Input should be less than or equal to {2**63 - 1}")


class _YamlRepr(reprlib.Repr):
    """Values of a message: in YAML's words, and no longer than a line."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 100, 100

    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"


show = _YamlRepr().repr


def explain(problem: Problem, values: Any, source: str, origin: dict[str, str]) -> str:
    """A problem as one line: file or option, key, value, what is allowed."""
    path, message = problem.path, problem.message
    key = ".".join(path)
    unknown = problem.type == "extra_forbidden"
    # An error about several keys of a section names them in its message; the value would be the whole section.
    of_section = problem.type in ("value_error", "architecture") and isinstance(problem.value, dict)
    named = message if of_section else None
    where = ", ".join(text for name, text in origin.items() if _concerns(name, key, named)) or source
    if unknown:
        known = _known_keys(path[:-1], values)
        close = difflib.get_close_matches(path[-1], known, n=1)
        section = ".".join(path[:-1])
        hint = f'did you mean "{close[0]}"?' if close else f"known here: {', '.join(known)}"
        return f"{where}: {key}: unknown key{' in ' + section if section else ''}; {hint}"
    if of_section and re.match(r"\w+: ", message):
        return f"{where}: {key}.{message}"
    if not key or problem.type == "missing" or of_section:
        return f"{where}: {key + ': ' if key else ''}{message}"
    return f"{where}: {key}: {show(problem.value)} is not allowed: {message}"


def _concerns(override: str, key: str, named: str | None) -> bool:
    """Whether an override of this key path can have caused an error at `key`; `named`: the keys that it is about."""
    if key and (key == override or key.startswith(f"{override}.")):
        return True
    if key and not override.startswith(f"{key}."):
        return False
    return named is None or override.rpartition(".")[2] in named


def _known_keys(path: list[str], values: Any) -> list[str]:
    """The keys of a section."""
    model: type[BaseModel] | None = RiverConfig
    for name in path:
        values = values.get(name)
        model = section_of(model.model_fields.get(name), values) if model else None
    return sorted(model.model_fields) if model else []
