"""Official weights become a run, as if it had been trained here."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from pipelines.config import RiverConfig
from pipelines.data.fetch import fetch
from pipelines.errors import UserError
from pipelines.loading import autoencoder_digest, find_autoencoder, find_flow, load_trained_autoencoder, weights_digest
from pipelines.official.official_networks import OFFICIAL_HEADS, load_autoencoder
from pipelines.official.parts import OfficialFiles, Part, check_channels, check_sizes, parts_of_run, read_networks
from pipelines.official.weight_files import HEAD_BYTES, MOST_WEIGHT_BYTES, foreign_content
from pipelines.runtime.checkpoints import Checkpoint, CheckpointFolder
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import size_text
from pipelines.runtime.progress import say, warn
from pipelines.runtime.run_folder import another_name, is_imported, move_to_backup, only_training_of, write_run_files

LICENSE = (
    "these weights are their authors' (RIVER, ICCV 2023, arXiv 2211.14575) and are licensed under GPL-3.0, unlike this "
    "program: if you pass them on, that license applies"
)
HUB = "https://huggingface.co/cvg-unibe"
# Per data set: the repository, its autoencoder's file, and the side of the square frames of its training. The main
# model is `model.pth` in each.
RELEASED = {
    "kth": ("river_kth_64", "vqvae.ckpt", 64),
    "bair_64": ("river_bair_64", "vqvae.ckpt", 64),
    "bair_256": ("river_bair_256", "vqvae.ckpt", 256),
    "clevrer": ("river_clevrer_128", "vqvae.pth", 128),
}


def import_official(
    config: RiverConfig,
    run_context: RunContext,
    files: OfficialFiles,
    presets: Sequence[Path] = (Path("configs"),),
    *,
    heads: int = OFFICIAL_HEADS,
) -> None:
    """Write official weights as finished trainings into the configuration's run.

    Args:
        files: at least one, unless downloads are allowed.
        presets: folders of configurations; if this one does not fit the files, they are searched for one that does.
        heads: attention heads of the vector field, which the shapes don't tell.
    Raises:
        UserError: no files; files that don't belong together or to the configuration; another training is there.
        FetchError: a download fails.
    """
    files.check()
    if files == OfficialFiles():
        if not run_context.download:
            raise UserError(
                "name the files: --model model.pth, --autoencoder vqvae.ckpt (if the model holds none), --refiner "
                f"refiner.pth; or download released ones with --download (available for {', '.join(RELEASED)})"
            )
        files = replace(files, model=download(config, "model"))
    parts = _read_parts(config, files, run_context.download, presets, heads)
    new = [part for part in parts if not _is_imported_already(config, part)]
    in_the_way = [part for part in new if _find(config, part) is not None]
    refused = [part for part in in_the_way if not run_context.restart or _is_shared(config, part)]
    if refused:
        raise UserError("\n".join(_refusal(config, part) for part in refused))
    for part in in_the_way:
        move_to_backup(config.training_folder(part.name), part.name)
    with ExitStack() as locks:
        for part in new:
            locks.enter_context(only_training_of(config.training_folder(part.name)))
        for part in new:
            write_run_files(config.shared if part.name == "autoencoder" else config, run_context.device)
        for part in parts:
            if part in new:
                _write(config, part)
            else:
                say(f"import-official: {part.name}: done before, {_find(config, part).path}")
    for source, sha256 in {part.source: part.state["imported"]["sha256"] for part in parts}.items():
        say(f"import-official: {source}: sha256 {sha256}")
    say(f"import-official: {LICENSE}")
    _warn_of_random_positions(config)
    _say_next_steps(config)


def download(config: RiverConfig, what: str) -> Path:
    """Download a released file of the configuration's data set to `<data>/<dataset>/official/`, unless it is there.

    Args:
        what: `model` or `autoencoder`.
    Raises:
        UserError: no released weights for this data set.
        FetchError: the download fails (the next call resumes it), or what arrives is no checkpoint.
    """
    dataset = config.dataset.name
    if dataset not in RELEASED:
        raise UserError(
            f"--download: there are released weights for {', '.join(RELEASED)}, not for {dataset!r}: name the files "
            "with --model and --autoencoder"
        )
    repository, autoencoder, _ = RELEASED[dataset]
    name = "model.pth" if what == "model" else autoencoder
    target = config.data_root / dataset / "official" / name
    if target.is_file():
        with target.open("rb") as file:
            if foreign_content(file.read(HEAD_BYTES)) is None:
                say(f"import-official: {target} exists ({size_text(target.stat().st_size)})")
                return target
    url = f"{HUB}/{repository}/resolve/main/{name}"
    target.parent.mkdir(parents=True, exist_ok=True)
    say(f"import-official: downloading {url} -> {target}")
    way_out = f"get the file by other means and name it with --{what} <file>"
    fetch(url, target, most=MOST_WEIGHT_BYTES, way_out=way_out, check_head=foreign_content)
    say(f"import-official: downloaded {size_text(target.stat().st_size)}")
    return target


def _read_parts(
    config: RiverConfig, files: OfficialFiles, may_download: bool, presets: Sequence[Path], heads: int
) -> list[Part]:
    """The networks of the files as parts of this run, after all checks."""
    networks = read_networks(files, heads)
    # The latents that flow and refiner work on: of the files' autoencoder, one imported before, or a released one.
    autoencoder, path = networks.autoencoder, networks.autoencoder_path
    if autoencoder is None:
        before = find_autoencoder(config.shared.run_path)
        if before is not None and is_imported(before):
            autoencoder, path = load_trained_autoencoder(before, torch.device("cpu")), before.path
        elif may_download:
            path = download(config, "autoencoder")
            autoencoder = load_autoencoder(path)
            networks = replace(networks, autoencoder=autoencoder, autoencoder_path=path)
        else:
            trained = "has none" if before is None else f"has another, {before.path}, which was trained here"
            raise UserError(
                f"{files.model or files.refiner} works on latents of an autoencoder, which it does not hold, and "
                f"{config.shared.run_path} {trained}: name the one that came with it, --autoencoder vqvae.ckpt "
                "(CLEVRER's: vqvae.pth)"
                + ("" if before is None else ", with --restart or --set dataset.name=<another run>")
            )
    if networks.field is not None:
        check_channels(networks.field, files.model, autoencoder, path)
    check_sizes(files, networks, config, presets)
    return list(parts_of_run(config, files, networks, weights_digest(autoencoder)))


def _find(config: RiverConfig, part: Part) -> Checkpoint | None:
    return CheckpointFolder(config.training_folder(part.name) / "checkpoints").latest()


def _is_imported_already(config: RiverConfig, part: Part) -> bool:
    """Whether the same weights were imported before, with the same sizes and autoencoder."""
    found = _find(config, part)
    if found is None or not is_imported(found):
        return False
    same_weights = found.state["imported"]["weights"] == part.state["imported"]["weights"]
    keys = ("identity", "model", "store", "autoencoder")
    return same_weights and all(found.state.get(key) == part.state.get(key) for key in keys)


def _refusal(config: RiverConfig, part: Part) -> str:
    found = _find(config, part)
    origin = f"was imported from {found.state['imported']['file']}" if is_imported(found) else "was trained here"
    for_all = "without --run, " if _is_shared(config, part) else ""
    return (
        f"{found.path} {origin}, and {part.source} would replace it: import {for_all}with --restart (the existing one "
        f"is moved to a backup folder), or {another_name(config.training_folder(part.name))}"
    )


def _is_shared(config: RiverConfig, part: Part) -> bool:
    """Whether a part belongs to other runs than the configuration's, too."""
    return config.run is not None and part.name == "autoencoder"


def _write(config: RiverConfig, part: Part) -> None:
    folder = CheckpointFolder(config.training_folder(part.name) / "checkpoints")
    path = folder.save(part.step, {"model": part.network.state_dict()}, part.state)
    iterations = part.state["imported"]["iterations"]
    trained = "" if iterations is None else f"{iterations} iterations, "
    millions = sum(parameter.numel() for parameter in part.network.parameters()) / 1e6
    say(f"import-official: {part.name}: {millions:.1f} M parameters, {trained}from {part.source} -> {path}")


def _warn_of_random_positions(config: RiverConfig) -> None:
    """The files do not tell how large the frames were; released ones are known."""
    dataset = config.dataset
    side = RELEASED[dataset.name][2] if dataset.name in RELEASED else max(dataset.frame_size)
    if max(dataset.frame_size) > side:
        warn(
            f"dataset.image_size: {dataset.image_size}: the released model of {dataset.name} was trained on frames of "
            f"{side}x{side}; its position codes beyond that are random: use smaller frames, or fine-tune it "
            "(`train-flow --fine-tune`)"
        )


def _say_next_steps(config: RiverConfig) -> None:
    flow, autoencoder = find_flow(config.run_path), find_autoencoder(config.shared.run_path)
    if flow is None:
        say("import-official: next: `encode` the videos, then `train-flow` on their latents")
        return
    digest = autoencoder_digest(autoencoder)
    if flow.state["store"]["autoencoder"] == digest:
        say(
            "import-official: next: `predict` a video of yours, `sample`, `evaluate`; no training is needed. To "
            "fine-tune it on your videos: `encode`, then `train-flow --fine-tune`"
        )
    else:
        warn(
            f"{flow.path} was trained on another autoencoder's latents: import the model that belongs to this one, or "
            "`encode --overwrite` and `train-flow --restart`"
        )
