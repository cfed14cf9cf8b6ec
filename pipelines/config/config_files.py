"""The configuration from YAML files and overrides, and back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.config.explanations import by_key, explain, odd_numbers, show
from pipelines.config.presets import find_preset
from pipelines.config.sections import anchor_paths, without_nulls
from pipelines.config.settings import RiverConfig
from pipelines.config.yaml_files import DEEPEST, merge, parse_yaml, read_yaml, write_yaml
from pipelines.errors import UserError

MOST_SHOWN = 20  # wrong keys in a message


def load_config(
    path: str | Path, overrides: Sequence[str] = (), run_settings: dict[str, dict[str, Any]] | None = None
) -> RiverConfig:
    """Read a YAML file or preset and its `base` files; apply `key.path=value` overrides; check everything.

    `null` gives a section, or a key that cannot be null, its default again. Paths expand `~` and `$NAME`. Relative ones
    are relative to the file that has them, or to the working folder if an override has them.

    Args:
        run_settings: section -> values of a run, which replace those of the file; overrides replace both.
    Raises:
        UserError: the file is missing or not YAML, a key is unknown (names the closest known one), a value has the
            wrong type or is out of range.
    """
    values = _read_config(find_preset(path), seen=())
    for section, kept in (run_settings or {}).items():
        values[section] = kept if not isinstance(kept, dict) else (values.get(section) or {}) | kept
    origin = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        key = key.strip()
        if not separator or not key:
            raise UserError(f"--set {override}: expected key.path=value, for example --set flow.training.steps=1000")
        value = parse_yaml(text, f"--set {override}: the value is not YAML", comments=False)
        values = _assign(values, key.split("."), value, override)
        origin[key] = f"--set {override}"
    return parse_config(values, str(path), origin)


def parse_config(values: dict[str, Any], source: str, origin: dict[str, str] | None = None) -> RiverConfig:
    """Check a mapping against the schema; `source` and `origin` (key path -> where it was set) appear in errors."""
    if isinstance(values, dict):
        values = without_nulls(RiverConfig, values)
    try:
        config = RiverConfig.model_validate(values)
    except ValidationError as error:
        problems = by_key(error.errors(), values)
    else:
        problems = list(odd_numbers(values, config.model_dump()))
    if problems:
        lines = [explain(problem, values, source, origin or {}) for problem in problems[:MOST_SHOWN]]
        more = len(problems) - len(lines)
        raise UserError("\n".join(lines + [f"{source}: {more} more keys are wrong"] * (more > 0)))
    return config


def _read_config(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The values of a file over those of its `base`, with paths that hold in any folder."""
    if path.resolve() in seen:
        raise UserError(f"{path}: `base` refers back to this file")
    if len(seen) == DEEPEST:
        raise UserError(f"{path}: this is the {DEEPEST}th `base` of a `base`: merge some of these files")
    values = read_yaml(path)
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise UserError(f"{path}: expected sections such as `dataset:`, found {found}")
    values = anchor_paths(RiverConfig, values, path.parent)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: base: {show(base)} is not the name of a config file or preset")
    try:
        found = find_preset(base, path.parent)
    except UserError as error:
        raise UserError(f"{path}: base: {error}") from None
    return merge(_read_config(found, (*seen, path.resolve())), values)


def _assign(values: dict[str, Any], keys: list[str], value: Any, override: str) -> dict[str, Any]:
    """A copy of the values with one of them set."""
    if len(keys) > DEEPEST:
        raise UserError(f"--set {override}: a key has at most {DEEPEST} parts")
    first, *others = keys
    if others:
        section = values.get(first)
        if section is not None and not isinstance(section, dict):
            raise UserError(f"--set {override}: {first} is a value, not a section")
        value = _assign(section or {}, others, value, override)
    return values | {first: value}


def dump_config(config: RiverConfig) -> str:
    """The resolved configuration as YAML that `load_config` takes back, in whatever folder it then is."""
    return write_yaml(anchor_paths(RiverConfig, config.model_dump(mode="json"), Path.cwd()))
