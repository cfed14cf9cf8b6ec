"""Trained models that come with the program: `--run NAME` begins with a copy of one, as a data set of that name."""

import difflib
import shutil
from collections.abc import Sequence
from pathlib import Path

from pipelines.config import RiverConfig, load_config
from pipelines.errors import UserError
from pipelines.runtime.files import replacing_folder, size_text, stored_bytes
from pipelines.runtime.progress import say
from pipelines.runtime.run_folder import read_run_config
from pipelines.sharing.released_run import check_released_run

# Name -> what it is good for.
BUNDLED = {
    "shapes-small": "predicts discs, squares and triangles that bounce in frames of 64x64, as the demo's do; it knows "
    "nothing else, and turns a real video into such shapes"
}
# From this likeness on, a name is taken for a misspelt one: one letter of ten is wrong.
MISSPELT = 0.9

_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel they are in the package, see setup.py; in the repository beside it.
MODELS = next((folder for folder in (_PACKAGE / "models", _PACKAGE.parent / "models") if folder.is_dir()), None)


def find_bundled(name: str) -> Path | None:
    """The folder of a model that comes with the program; None: there is none of this name."""
    return MODELS / name if MODELS is not None and name in BUNDLED else None


def with_bundled_run(path: str | Path, overrides: Sequence[str], *, copies: bool) -> list[str]:
    """Overrides in which `run` may name a bundled model, which is copied into `paths.runs` unless it is there.

    A run shares the autoencoder and store of its data set, and this one has its own: so it is the default run of a data
    set of its name. A run of the user that has the name comes first.

    Args:
        path, overrides: see `load_config`.
        copies: whether it is copied, or only said that it would be.
    Raises:
        UserError: see `load_config`; the model is of another data set than the configuration, damaged, or misspelt.
        OSError: it cannot be copied.
    """
    if find_bundled(str(path)) is not None and not Path(path).exists():
        raise UserError(f"--config {path}: this is a trained model and no configuration: use --run {path}")
    if not any(override.partition("=")[0].strip() == "run" for override in overrides):
        return [*overrides]
    config = load_config(path, overrides)
    if config.run is None or config.run_path.exists():
        return [*overrides]
    model = find_bundled(config.run)
    if model is None:
        if near := difflib.get_close_matches(config.run, BUNDLED, n=1, cutoff=MISSPELT):
            raise UserError(
                f"--run {config.run}: there is no such run; did you mean {near[0]}, which comes with this program? "
                "A run of your own needs a name less like it"
            )
        return [*overrides]
    if (known := _preset(model)) != config.dataset.name:
        raise UserError(
            f"--run {config.run}: this model was trained on {known}, and the configuration {path} is of "
            f"{config.dataset.name}: use --config {known}, or give a run of your own another name"
        )
    own = [*overrides, "run=null", f"dataset.name={config.run}"]
    run = load_config(path, own).run_path
    if not run.exists():
        size = size_text(stored_bytes(model))
        if not copies:
            say(f"{config.run}: would be copied to {run} ({size}), with nothing left to train")
        else:
            _copy(model, run)
            say(f"{config.run}: copied to {run} ({size}), where it is an ordinary run")
    say(f"{config.run}: {BUNDLED[config.run]}")
    return own


def bundled_runs(config: RiverConfig) -> dict[str, RiverConfig]:
    """Configurations of the bundled models of a configuration's data set, by name: where they are now."""
    found = {}
    for name in BUNDLED:
        model = find_bundled(name)
        if model is None or _preset(model) != config.dataset.name:
            continue
        dataset = config.dataset.model_copy(update={"name": name})
        run = config.model_copy(update={"run": None, "dataset": dataset})
        if not run.run_path.exists():
            run = run.model_copy(update={"paths": config.paths.model_copy(update={"runs": str(model.parent)})})
        found[name] = run
    return found


def _preset(model: Path) -> str:
    """Name of the preset that a model was trained with."""
    return read_run_config(model / "config.yaml").dataset.source


def _copy(model: Path, run: Path) -> None:
    check_released_run(model)
    with replacing_folder(run) as new:
        for file in model.rglob("*"):
            if file.is_file():
                (new / file.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, new / file.relative_to(model))  # an installed one may be read-only
