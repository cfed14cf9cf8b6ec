"""What results depend on: settings that decide, and their differences."""

from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python


def result_settings(section: BaseModel) -> dict[str, Any]:
    """The values of a section that results depend on, as JSON; others change logging, storage or speed."""
    return _settings(section, "changes_results")


def model_sizes(section: BaseModel) -> dict[str, Any]:
    """The values of a network's section that the shapes of its weights depend on, as JSON."""
    return _settings(section, "changes_shapes")


def _settings(section: BaseModel, effect: str) -> dict[str, Any]:
    """The values of a section as JSON, without fields that have `effect: False` in their metadata."""
    dumped = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        metadata = field.json_schema_extra
        if isinstance(metadata, dict) and metadata.get(effect) is False:
            del dumped[name]
        elif isinstance(inner := getattr(section, name), BaseModel):
            dumped[name] = _settings(inner, effect)
    return dumped


def differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every key in which two dumped sections differ; `theirs` is the old one."""
    lines = []
    for key in sorted(ours.keys() | theirs.keys()):
        new, old = ours.get(key), theirs.get(key)
        if isinstance(new, dict) and isinstance(old, dict):
            lines += differences(new, old, f"{prefix}{key}.")
        elif new != old:
            lines.append(f"{prefix}{key}: {old} -> {new}")
    return lines


def with_defaults(recorded: dict[str, Any], ours: dict[str, Any], section: BaseModel) -> dict[str, Any]:
    """A recorded section with the defaults of the keys that `ours` has and that are newer than the record."""
    filled = dict(recorded)
    for name in ours:
        field, inner = type(section).model_fields[name], getattr(section, name)
        if isinstance(inner, BaseModel):
            if isinstance(recorded.get(name), dict):
                filled[name] = with_defaults(recorded[name], ours[name], inner)
        elif name not in recorded and not field.is_required():
            filled[name] = to_jsonable_python(field.get_default(call_default_factory=True))
    return filled
