"""Plain values beside the schema: which section they belong to, which are paths, which give a default again."""

import os
import typing
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from stage1_autoencoder.setting_types import FilePath


def section_of(field: FieldInfo | None, values: Any) -> type[BaseModel] | None:
    """The model of a section, of the architecture that its values name; None: the field is no section."""
    kinds = () if field is None else (field.annotation, *typing.get_args(field.annotation))
    bare = [typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind for kind in kinds]
    models = [kind for kind in bare if isinstance(kind, type) and issubclass(kind, BaseModel)]
    for model in models[1:]:
        if isinstance(values, dict) and model.model_fields["architecture"].default == values.get("architecture"):
            return model
    return models[0] if models else None


def without_nulls(model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """The values without nulls of sections and of keys that cannot be null."""
    kept = {}
    for name, value in values.items():
        field = model.model_fields.get(name)
        if value is None and field is not None and NoneType not in typing.get_args(field.annotation):
            continue
        if isinstance(value, dict) and field is not None:
            section = section_of(field, value)
            value = without_nulls(section, value) if section else {k: v for k, v in value.items() if v is not None}
        kept[name] = value
    return kept


def anchor_paths(model: type[BaseModel], values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The values with relative paths made absolute in a folder.

    Defaults stay: `data`, `latents` and `runs` are folders of the working folder, wherever they are written.
    """
    anchored = {}
    for name, value in values.items():
        field = model.model_fields.get(name)
        if isinstance(value, dict) and (section := section_of(field, value)):
            value = anchor_paths(section, value, folder)
        elif isinstance(value, str) and field is not None and _is_path(field) and value != field.default:
            # What begins with a variable is not known yet.
            if not value.startswith(("~", "$", "{data}")):
                value = os.path.abspath(folder / value)
        anchored[name] = value
    return anchored


def _is_path(field: FieldInfo) -> bool:
    (expands,) = FilePath.__metadata__
    return expands in field.metadata or FilePath in typing.get_args(field.annotation)
