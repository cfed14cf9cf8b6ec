"""What results depend on: settings that decide, and their differences."""

from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def result_settings(section: BaseModel) -> dict[str, Any]:
    """The values of a section that results depend on, as JSON; others change logging, storage or speed."""
    return _settings(section, "changes_results")


def identity_settings(section: BaseModel) -> dict[str, Any]:
    """`result_settings` as checkpoints hold them.

    Fields with `identity_has_default: False` in their metadata are newer than some checkpoints, which hold nothing of
    them: they are left out at their defaults.
    """
    return {
        name: value
        for name, value in result_settings(section).items()
        if not _is_new(field := type(section).model_fields[name]) or value != field.default
    }


def _is_new(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("identity_has_default") is False


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
