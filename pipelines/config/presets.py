"""Configuration files by path or by name."""

import os
from pathlib import Path

from pipelines.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel they are in the package, see setup.py; in the repository beside it.
SHIPPED = next((folder for folder in (_PACKAGE / "presets", _PACKAGE.parent / "configs") if folder.is_dir()), None)


def preset_folders(path: str | Path | None = None) -> list[Path]:
    """Folders of presets: that of a configuration file, ./configs, and the one that this program comes with."""
    beside = [] if path is None else [Path(path).parent]
    return list(dict.fromkeys([*beside, Path("configs"), *([] if SHIPPED is None else [SHIPPED])]))


def find_preset(name: str | Path, beside: Path | None = None) -> Path:
    """A configuration file by its path, or a preset by its name: `configs/kth.yaml`, `kth.yaml`, `kth`.

    Args:
        beside: folder of a file that names this one; it comes before the presets. None: the working folder, in which a
            bare name such as `kth` means the preset rather than `kth.yaml`.
    Raises:
        UserError: no such file; names the presets.
    """
    path = Path(os.path.expanduser(name))
    presets = []
    if path.name == str(name) or path.parent == Path("configs"):
        presets = [folder / f"{path.name.removesuffix('.yaml')}.yaml" for folder in preset_folders()]
    if beside is not None:
        files = [beside / path, beside / f"{path}.yaml", *presets]
    else:
        files = [path, *presets] if path.suffix else [*presets, Path(f"{path}.yaml"), path]
    for file in files:
        if file.is_file():
            return file
    known = sorted({preset.stem for folder in preset_folders(path) for preset in folder.glob("*.yaml")})
    raise UserError(f"{path}: no such config file; presets: {', '.join(known)}")
