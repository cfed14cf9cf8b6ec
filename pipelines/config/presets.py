"""Configuration files by path or by name."""

import os
from pathlib import Path

from pipelines.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]


def preset_folders(path: str | Path | None = None) -> list[Path]:
    """Folders of presets: that of a configuration file, ./configs, the repository's, the package's."""
    beside = [] if path is None else [Path(path).parent]
    shipped = [PACKAGE.parent / "configs", PACKAGE / "presets"]
    return list(dict.fromkeys([*beside, Path("configs"), *(folder for folder in shipped if folder.is_dir())]))


def find_preset(name: str | Path, beside: Path | None = None) -> Path:
    """A configuration file by its path, or a preset by its name: `configs/kth.yaml`, `kth.yaml`, `kth`.

    Args:
        beside: folder of a file that names this one; it comes before the presets. None: the working folder, in which a
            bare name such as `kth` means the preset.
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
        files = [path, *presets] if path.suffix else [*presets, path]
    for file in files:
        if file.is_file():
            return file
    known = sorted({preset.stem for folder in preset_folders(path) for preset in folder.glob("*.yaml")})
    raise UserError(f"{path}: no such config file; presets: {', '.join(known)}")
