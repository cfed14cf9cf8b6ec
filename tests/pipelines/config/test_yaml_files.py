"""YAML 1.2: scalars, repeated keys, depth, and texts that other readers take back."""

import pytest
import yaml

from pipelines.config.yaml_files import parse_yaml, read_yaml, write_yaml
from pipelines.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # https://yaml.org/spec/1.2.2/#1032-tag-resolution
        ("017", 17),
        ("-017", -17),
        ("09", 9),
        ("0o17", 15),
        ("0x1F", 31),
        ("1e3", 1000.0),
        ("-.5E-1", -0.05),
        ("1.", 1.0),
        (".inf", float("inf")),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("Null", None),
        ("", None),
        *((word, word) for word in ("yes", "No", "on", "OFF", "y", "1:30", "1_000", "0b11", "2020-01-01", "tRue", "=")),
        ("'017'", "017"),
        ("!!str 017", "017"),
        ("[1, 2.0, x]", [1, 2.0, "x"]),
        ("1: a\non: b\nnull: c", {"1": "a", "on": "b", "null": "c"}),
        ("a: &x {p: 1, q: 2}\nb: {<<: *x, q: 3}", {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}}),
    ],
)
def test_values(text, value):
    read = parse_yaml(text, "a test")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("a: 1\nb: 2\na: 3", ["'a'", "1", "3"]),
        ("a:\n  b: 1\n  c: {}\n  b: 2", ["'b'", "2", "4"]),
        ("[" * 5000 + "]" * 5000, ["deeper"]),
        ("a: 1\n" + "\n".join(" " * depth + "a:" for depth in range(1, 200)), ["line"]),
        ("&a [*a]", ["line 1"]),
        ("a: [1", ["line 1"]),
        ("a: 1\n\tb: 2", ["line 2"]),
        ("{[1]: 2}", ["line 1"]),
        ("a\0b", ["2"]),
        ("a: 1\n--- \nb: 2", ["line 2"]),
        ("a: !!int x", ["'x'", "int"]),
        ("a: !!timestamp x", ["timestamp"]),
        ("a: !!python/object/apply:os.getcwd []", ["python/object"]),
        ("a: " + "9" * 5000, ["line 1"]),
    ],
)
def test_mistakes_are_one_line_with_their_place(text, needed, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_yaml(path)
    (message,) = str(error.value).splitlines()
    for part in (str(path), *needed):
        assert part in message


def test_readers_of_both_versions_take_back_what_is_written():
    words = ["017", "0o17", "1e3", "yes", "off", "1:30", "2020-01-01", "~", "<<", "", "a: b", "é", "1_000", "0x1f", "="]
    values = {"words": words, "numbers": [1, -1.5, 1e-5, 1e22], "others": [True, None, {}]}
    text = write_yaml(values)
    assert parse_yaml(text, "a test") == values
    assert yaml.safe_load(text) == values
