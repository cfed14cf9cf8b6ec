"""YAML 1.2 as it is written: `017` is 17, `yes` and `1:30` are words, and no key stands twice."""

import copy
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from pipelines.config.bounded_files import read_bounded
from pipelines.errors import UserError

# More bytes, values and levels than a configuration has. Deeper ones would exhaust Python's stack; keys merged from
# aliases of aliases (`<<: [*a, *a]`) double on each line.
MOST_BYTES = 2**20
MOST_VALUES = 10_000
DEEPEST = 32
# More digits than any number of a configuration has.
LONGEST_NUMBER = 100

# The core schema, https://yaml.org/spec/1.2.2/#1032-tag-resolution. PyYAML's own is that of YAML 1.1.
_TAG = "tag:yaml.org,2002:"
_CORE = {
    f"{_TAG}{name}": re.compile(rf"(?:{pattern})\Z")
    for name, pattern in {
        "null": r"~|null|Null|NULL|",
        "bool": r"true|True|TRUE|false|False|FALSE",
        "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
        "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "merge": r"<<",
    }.items()
}


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with the types of YAML 1.2 and no others."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (PyYAML's own way)
    yaml_constructors: dict = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.values = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        self.depth += 1
        self.values += 1
        if self.values > MOST_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MOST_VALUES} keys and values", problem_mark=self.peek_event().start_mark
            )
        if self.depth > DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {DEEPEST} levels", problem_mark=self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is not a word", problem_mark=key.start_mark)
            if key.value in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is repeated, on lines {lines[key.value]} and {line}",
                    problem_mark=key.start_mark,
                )
            lines[key.value] = line
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {MOST_VALUES} merged keys", problem_mark=node.start_mark)

    def read_scalar(self, node: yaml.Node) -> Any:
        tag, text = node.tag, self.construct_scalar(node)
        if tag in _CORE and not _CORE[tag].match(text):
            raise yaml.MarkedYAMLError(
                problem=f"{text!r} is not of type {tag.removeprefix(_TAG)}", problem_mark=node.start_mark
            )
        if tag in (f"{_TAG}int", f"{_TAG}float") and len(text) > LONGEST_NUMBER:
            raise yaml.MarkedYAMLError(
                problem=f"a number of more than {LONGEST_NUMBER} characters", problem_mark=node.start_mark
            )
        match tag.removeprefix(_TAG):
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
            case "float":
                return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))
        return text

    def read_list(self, node: yaml.SequenceNode) -> list[Any]:
        return self.construct_sequence(node, deep=True)

    def read_mapping(self, node: yaml.Node) -> dict[str, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.MarkedYAMLError(problem="expected keys and values", problem_mark=node.start_mark)
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


class _Dumper(yaml.SafeDumper):
    """Quotes words that YAML 1.1 or YAML 1.2 would take for something else."""


for _name, _pattern in _CORE.items():
    _Loader.add_implicit_resolver(_name, _pattern, None)
    _Dumper.add_implicit_resolver(_name, _pattern, None)
for _name in ("null", "bool", "int", "float", "merge", "str"):
    _Loader.add_constructor(f"{_TAG}{_name}", _Loader.read_scalar)
_Loader.add_constructor(f"{_TAG}seq", _Loader.read_list)
_Loader.add_constructor(f"{_TAG}map", _Loader.read_mapping)
_Loader.add_constructor(None, yaml.SafeLoader.construct_undefined)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        UserError: no file of at most `MOST_BYTES`; not YAML, a key that is repeated, or too deep; names the line.
    """
    try:
        text = read_bounded(path, MOST_BYTES).decode()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a YAML file: byte {error.start} is not UTF-8") from None
    return parse_yaml(text, f"{path}: not a YAML file")


def parse_yaml(text: str, complaint: str, comments: bool = True) -> Any:
    """The content of a YAML text; `complaint` begins the message of an error.

    Args:
        comments: whether ` #` begins a comment; False refuses it.
    Raises:
        UserError: as `read_yaml`.
    """
    try:
        values, end = _parsed(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{complaint}: {place}{error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        raise UserError(f"{complaint}: character {error.position + 1} is not allowed in YAML") from None
    except (ValueError, OverflowError):  # of PyYAML, for `\U99999999`
        raise UserError(f"{complaint}: an escape \\U stands for no character") from None
    if not comments and text[end:].lstrip().startswith("#"):
        raise UserError(f"{complaint}: ` #` begins a comment in YAML; write KEY='\"VALUE\"'")
    return copy.deepcopy(values)


@lru_cache(maxsize=16)  # a command reads its preset several times, 20 ms each
def _parsed(text: str) -> tuple[Any, int]:
    """The content, and the place at which it ends."""
    loader = _Loader(text)
    node = loader.get_single_node()
    return (None, len(text)) if node is None else (loader.construct_document(node), node.end_mark.index)


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """The values of two files; where both have one, `over`'s, and sections are merged."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def write_yaml(values: dict[str, Any]) -> str:
    """The YAML text of plain data, which readers of YAML 1.1 and 1.2 understand alike."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
