"""`import-official`: official weights become a run, as if it had been trained here."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.loading import find_autoencoder, find_flow, load_trained_autoencoder, weights_digest
from pipelines.official.official_download import RELEASED, download_model
from pipelines.official.parts import OfficialFiles, Part, read_parts
from pipelines.official.vector_fields import OFFICIAL_HEADS
from pipelines.runtime.checkpoints import Checkpoint, CheckpointFolder
from pipelines.runtime.context import RunContext
from pipelines.runtime.progress import say, warn
from pipelines.runtime.runs import is_imported, only_training_of, set_aside, write_run_files

LICENCE = (
    "these weights are their authors' (RIVER, ICCV 2023, arXiv 2211.14575) and come under GPL-3.0, not under this "
    "program's licence: what you hand on of them stays under it"
)


def import_official(
    config: RiverConfig,
    run_context: RunContext,
    files: OfficialFiles,
    presets: Sequence[Path] = (Path("configs"),),
    *,
    heads: int = OFFICIAL_HEADS,
) -> list[Path]:
    """Write official weights as finished trainings into the configuration's run.

    Args:
        files: at least one, unless the run_context allows downloads.
        presets: folders of configurations: where this one does not fit the files, one that does is looked for there.
        heads: attention heads of the vector field, the one size that the shapes don't tell.
    Returns:
        The checkpoints of the parts, whether they were imported now or before.
    Raises:
        UserError: no files; files that don't belong together or to the configuration; another training is there.
        FetchError: a download fails.
    """
    files.check()
    if files == OfficialFiles():
        if not run_context.download:
            raise UserError(
                "name the files: --model model.pth, --autoencoder vqvae.ckpt (where the model holds none), --refiner "
                f"refiner.pth; or fetch the released ones with --download (there are some for {', '.join(RELEASED)})"
            )
        files = replace(files, model=download_model(config))
    parts = read_parts(config, files, download=run_context.download, presets=presets, heads=heads)
    new = [part for part in parts if not _is_there(config, part)]
    in_the_way = [part for part in new if _find(config, part) is not None]
    if in_the_way and not run_context.restart:
        raise UserError("\n".join(_refusal(config, part) for part in in_the_way))
    for part in in_the_way:
        set_aside(config.run_path / part.name, part.name)
    with ExitStack() as held:
        for part in new:
            held.enter_context(only_training_of(config.run_path / part.name))
        if new:
            write_run_files(config, run_context.device)
        for part in parts:
            if part in new:
                _write(config, part)
            else:
                say(f"import-official: {part.name}: done before, {_find(config, part).path}")
    for source, sha256 in {part.source: part.state["imported"]["sha256"] for part in parts}.items():
        say(f"import-official: {source}: sha256 {sha256}")
    say(f"import-official: {LICENCE}")
    _say_what_is_next(config)
    return [_find(config, part).path for part in parts]


def _folder(config: RiverConfig, part: Part) -> CheckpointFolder:
    return CheckpointFolder(config.run_path / part.name / "checkpoints")


def _find(config: RiverConfig, part: Part) -> Checkpoint | None:
    return _folder(config, part).latest()


def _is_there(config: RiverConfig, part: Part) -> bool:
    """Whether the same weights were imported before, for the same sizes and the same autoencoder."""
    found = _find(config, part)
    if found is None or not is_imported(found):
        return False
    same_weights = found.state["imported"]["weights"] == part.state["imported"]["weights"]
    return same_weights and all(found.state.get(key) == part.state.get(key) for key in ("identity", "model", "store"))


def _refusal(config: RiverConfig, part: Part) -> str:
    found = _find(config, part)
    how = f"was imported from {found.state['imported']['file']}" if is_imported(found) else "was trained here"
    return (
        f"{found.path} {how}, and {part.source} would replace it: import with --restart (the old one is set aside), or "
        "give the run another name with --set dataset.name=..."
    )


def _write(config: RiverConfig, part: Part) -> None:
    path = _folder(config, part).save(part.step, {"model": part.network.state_dict()}, part.state)
    iterations = part.state["imported"]["iterations"]
    trained = "" if iterations is None else f"{iterations} iterations, "
    millions = sum(parameter.numel() for parameter in part.network.parameters()) / 1e6
    say(f"import-official: {part.name}: {millions:.1f} M parameters, {trained}from {part.source} -> {path}")


def _say_what_is_next(config: RiverConfig) -> None:
    flow, autoencoder = find_flow(config.run_path), find_autoencoder(config.run_path)
    if flow is None:
        say("import-official: next: `encode` the videos, then `train-flow` on their latents")
        return
    digest = weights_digest(load_trained_autoencoder(autoencoder, torch.device("cpu")))
    if flow.state["store"]["autoencoder"] == digest:
        say(
            "import-official: next: `predict` a video of yours, `sample`, `evaluate`; nothing has to be trained. To "
            "train it further on your videos: `encode`, then `train-flow --fine-tune`"
        )
    else:
        warn(
            f"{flow.path} knows another autoencoder's latents: import the model that belongs to this one, or "
            "`encode --overwrite` and `train-flow --restart`"
        )
