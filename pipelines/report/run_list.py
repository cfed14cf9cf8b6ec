"""The runs of a data set, a line each: how far the flow is, how good, how old, and which of its settings differ."""

from datetime import datetime

from pipelines.config import RiverConfig, differences
from pipelines.errors import UserError
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.files import read_json
from pipelines.runtime.progress import warn
from pipelines.runtime.results import Evaluation, RunPredictor
from pipelines.runtime.run_folder import chosen_checkpoint, describe_progress, run_names, trained_settings
from pipelines.sharing.bundled_models import bundled_runs

DEFAULT = "default"
HEAD = ("run", "flow", "PSNR", "saved", "other settings")
# Of a measurement: what its numbers are compared by.
_MEASURED = ("split", "window", "context", "horizon", "samples")


def format_runs(config: RiverConfig) -> str:
    """A table of the default run, the named ones and bundled models; a sentence if no flow is trained.

    Args:
        config: with the settings of the default run. Those in which another run differs are named.
    """
    runs = {name or DEFAULT: config.model_copy(update={"run": name}) for name in (None, *run_names(config))}
    rows = [row for name, run in (bundled_runs(config) | runs).items() if (row := _row(name, run, config))]
    if not rows:
        return (
            f"{config.shared.run_path}: no run has a flow yet: `train-flow` trains one, with --run NAME a further one"
        )
    widths = [max(len(row[column]) for row in (HEAD, *rows)) for column in range(len(HEAD))]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in (HEAD, *rows))
    return "\n".join(line.rstrip() for line in lines)


def _row(name: str, config: RiverConfig, default: RiverConfig) -> tuple[str, ...] | None:
    """A run's line; None if it has no flow."""
    newest = CheckpointFolder(config.training_folder("flow") / "checkpoints").latest(warns=False)
    if newest is None:
        return None
    sections = ("seed", "flow", "distillation", "refiner")
    settings = {name: value for name, value in trained_settings(config).items() if name in sections}
    steps = settings.get("flow", {}).get("training", {}).get("steps") or newest.step
    of_all = f" of {steps}" if newest.step < steps else ""
    psnr, evaluation = "", _evaluation(config)
    if evaluation is not None:
        used, predictor = chosen_checkpoint(config.training_folder("flow")), evaluation.protocol.predictor
        psnr = f"{evaluation.metrics['psnr'].prediction:.2f} dB" + (
            f" at step {predictor.flow_step}"
            if used is not None and isinstance(predictor, RunPredictor) and used.step != predictor.flow_step
            else ""
        )
        settings["evaluation"] = evaluation.protocol.model_dump(include=set(_MEASURED))
    ours = default.model_dump(mode="json")
    theirs = {name: ours[name] for name in settings}
    if "evaluation" in settings:
        theirs["evaluation"] = {name: ours["evaluation"][name] for name in _MEASURED}
    saved = datetime.fromtimestamp((newest.path / "state.json").stat().st_mtime)
    return (
        name,
        describe_progress(newest) + of_all,
        psnr,
        f"{saved:%Y-%m-%d %H:%M}",
        "; ".join(differences(settings, theirs)),
    )


def _evaluation(config: RiverConfig) -> Evaluation | None:
    path = config.run_path / "evaluation.json"
    try:
        return read_json(path, Evaluation, "`evaluate` writes it again") if path.exists() else None
    except UserError as error:
        warn(str(error))
        return None
