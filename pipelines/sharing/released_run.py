"""A released run: a run folder with only what predictions need, and `release.json`, which lists its files."""

import re
from pathlib import Path, PurePosixPath
from shutil import copyfile
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, field_validator

from pipelines.config import RiverConfig, model_sizes
from pipelines.config.bounded_files import read_bounded
from pipelines.errors import UserError
from pipelines.loading import autoencoder_digest, flow_digest, load_run
from pipelines.runtime.checkpoints import Checkpoint, CheckpointFolder
from pipelines.runtime.files import file_sha256, parse_json, read_json, replacing_folder, write_json, write_text
from pipelines.runtime.progress import warn
from pipelines.runtime.results import Evaluation, RunPredictor, Study
from pipelines.runtime.run_folder import Environment, chosen_checkpoint, read_run_config, write_run_config
from pipelines.sharing.model_card import PICTURES, model_card

RELEASE_NAME = "release.json"
# A part of a name that travels: no `..`, nothing hidden, nothing that a shell or a server takes for something else.
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}"
_NAME = re.compile(rf"{_PART}(/{_PART}){{0,9}}")
# No pickles, no programs, no pages.
_SUFFIXES = (".safetensors", ".json", ".yaml", ".md", ".png", ".gif")
_MOST_FILES = 1000
_SHA256 = r"^[0-9a-f]{64}$"
MOST_RELEASE_BYTES = 2**20
MOST_DOCUMENT_BYTES = 2**26  # of every file but weights
PULL_AGAIN = "pull it again, or ask whoever gave it to you"
_EXPECTED = f"expected a released run of format_version 1 (a newer one needs an update); {PULL_AGAIN}"


def is_safe_name(name: str) -> bool:
    """Whether a relative path stays in its folder, on any system."""
    return _NAME.fullmatch(name) is not None


class ReleasedFile(BaseModel):
    """One file. `size` is in bytes."""

    model_config = ConfigDict(frozen=True)

    size: NonNegativeInt
    sha256: str = Field(pattern=_SHA256)


class ReleasedStore(BaseModel):
    """A store of latents that travels with a run. Its manifest lists its files.

    Attributes:
        size: of all its files, in bytes.
        manifest: the document of the manifest.
    """

    model_config = ConfigDict(frozen=True)

    size: NonNegativeInt
    manifest: ReleasedFile


class Release(BaseModel):
    """`release.json`: what a released run consists of. It is written and sent last, so what has it is whole.

    Attributes:
        dataset: name of the data set, and of the run's folder in `runs/`.
        data_license: of the training videos, as whoever released the run states it.
        files: by path in the folder.
        store: None: the run travels without its store.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal["river-release"] = "river-release"
    format_version: int = Field(1, ge=1, le=1)
    dataset: str = Field(pattern=rf"^{_PART}$")
    data_license: str | None = Field(None, max_length=200)
    files: dict[str, ReleasedFile] = Field(max_length=_MOST_FILES)
    store: ReleasedStore | None = None

    @field_validator("files")
    @classmethod
    def _names_are_safe(cls, files: dict[str, ReleasedFile]) -> dict[str, ReleasedFile]:
        for name, file in files.items():
            if not is_safe_name(name) or PurePosixPath(name).suffix not in _SUFFIXES or name == RELEASE_NAME:
                raise ValueError(f"{name[:100]!r} is no path of a released run (files of {' '.join(_SUFFIXES)} in it)")
            if file.size > MOST_DOCUMENT_BYTES and not name.endswith(".safetensors"):
                raise ValueError(f"{name} has {file.size} bytes, at most {MOST_DOCUMENT_BYTES} are expected")
        return files


def parse_release(content: bytes, where: Path | str) -> Release:
    """The content of a `release.json`, which may come from anybody.

    Raises:
        UserError: damaged, of another program or a newer version, or with paths that leave the folder.
    """
    if len(content) > MOST_RELEASE_BYTES:
        raise UserError(f"{where}: more than {MOST_RELEASE_BYTES} bytes; {_EXPECTED}")
    return parse_json(content, where, Release, _EXPECTED)


def check_released_run(folder: Path) -> Release:
    """Compare all files of a released run with its `release.json`. Further files are ignored.

    Raises:
        UserError: it is no released run, or one of its files is missing or damaged.
    """
    release = _read_release(folder)
    for name, expected in release.files.items():
        check_file(folder / name, expected)
    return release


def check_settings(folder: Path) -> None:
    """Refuse settings of a released run by which commands would write outside of the working folder.

    Raises:
        UserError: names the file and the path; no settings that this version knows.
    """
    for file in (folder / "config.yaml", folder / "student" / "config.yaml"):
        if file.parent == folder or file.exists():
            try:
                config = read_run_config(file)
            except OSError as error:
                raise UserError(f"{file}: {error.strerror}: no whole released run; {PULL_AGAIN}") from None
            for place in (*config.paths.model_dump().values(), config.dataset.root or ""):
                if Path(place).is_absolute() or place.startswith("~") or ".." in Path(place).parts:
                    raise UserError(f"{file}: {place} is outside of the working folder, which no released run may name")


def check_file(path: Path, expected: ReleasedFile, way_out: str = PULL_AGAIN) -> None:
    """Compare a file with what it should be.

    Args:
        way_out: ends the error message.
    Raises:
        UserError: it is missing or another one.
    """
    try:
        size = path.stat().st_size
        if size != expected.size:
            raise ValueError(f"has {size} bytes instead of {expected.size}")
        if file_sha256(path) != expected.sha256:
            raise ValueError("differs from its sha256")
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: damaged, changed or missing: {problem}; {way_out}") from None


def write_released_run(run: Path, destination: Path, *, half: bool = False, data_license: str | None = None) -> Path:
    """Make a released run of a run: the weights that predictions use, settings, results, pictures and a model card.

    The same run gives the same bytes. A named run gets the autoencoder of its data set. Paths lose their folders, which
    are nobody's business.

    Args:
        run: its folder.
        destination: a folder that is new or empty, or has a released run, which is replaced.
        half: round the weights to fp16.
        data_license: of the training videos, in words; None: as in an earlier `release.json` of the run, or not stated.
    Returns:
        `destination`.
    Raises:
        UserError: the run is not whole; another folder is there; weights that fp16 can't hold.
        OSError: it cannot be written.
    """
    if destination.exists() and not (destination / RELEASE_NAME).is_file():
        if not destination.is_dir() or any(destination.iterdir()):
            raise UserError(f"{destination}: is there and no released run: name a new folder")
    if data_license is None and (run / RELEASE_NAME).is_file():
        data_license = _read_release(run).data_license
    with replacing_folder(destination) as folder:
        config = _write_run(run, folder, half)
        student = run / "student"
        if config.run is None and chosen_checkpoint(student / "flow") is not None:
            _write_run(student, folder / "student", half, folder)
        for name in PICTURES:
            found = next((path for path in (run / "samples" / name, run / name) if path.is_file()), None)
            if found is not None:
                copyfile(found, folder / name)
        evaluation, digest = _read(folder / "evaluation.json", Evaluation), flow_digest(_chosen(folder, "flow"), "ema")
        rounded = evaluation is not None and evaluation.protocol.predictor.flow_sha256 != digest
        write_text(folder / "README.md", model_card(config, evaluation, folder, data_license, rounded))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        listed = {
            path.relative_to(folder).as_posix(): ReleasedFile(size=path.stat().st_size, sha256=file_sha256(path))
            for path in files
        }
        release = Release(dataset=config.dataset.name, data_license=data_license, files=listed)
        write_json(folder / RELEASE_NAME, release)
    return destination


def _write_run(run: Path, folder: Path, half: bool, released: Path | None = None) -> RiverConfig:
    """Write one run without model card and list.

    Args:
        released: that of the data set's default run, which has the autoencoder; None: it is written, too.
    """
    parts = load_run(run, torch.device("cpu"))  # refuses what doesn't fit together
    config = read_run_config(run / "config.yaml")
    shared = run if config.run is None else run.parent
    sources = {"autoencoder": shared, "decoder": shared} if released is None else {}
    sources |= {"flow": run, "refiner": run}
    if parts.fast_decoder is None:
        sources.pop("decoder", None)
    if parts.refiner is None:
        del sources["refiner"]
    digest = None if released is None else autoencoder_digest(_chosen(released, "autoencoder"))
    for name, source in sources.items():
        # As of imported weights, what their use depends on: they may be trained further on other videos.
        identity = {name: {"model": model_sizes(getattr(config, name).model)}}
        if name == "autoencoder":
            identity["dataset"] = {"image_size": config.dataset.image_size}
        _write_weights(_chosen(source, name), folder / name / "checkpoints", half, digest, identity)
        if name == "autoencoder":  # rounded, it has another identity, to which the others belong
            digest = autoencoder_digest(_chosen(folder, name))
    kept = config.run if released is not None else None
    values = _without_places(config.model_dump(mode="json")) | {"run": kept, "paths": {}}
    settings = RiverConfig.model_validate(values)
    write_run_config(folder / "config.yaml", settings)
    if (environment := _read(run / "environment.json", Environment)) is not None:
        write_json(folder / "environment.json", environment)
    before, now = (flow_digest(_chosen(where, "flow"), "ema") for where in (run, folder))
    evaluation = _read(run / "evaluation.json", Evaluation)
    if evaluation is not None:
        predictor = evaluation.protocol.predictor
        is_right = isinstance(predictor, RunPredictor) and predictor.flow_sha256 == before
        if is_right or _is_of_release(run):
            write_json(folder / "evaluation.json", evaluation)
        else:
            warn(f"{run}/evaluation.json: left out, it measures other weights; `evaluate` measures these")
    study = _read(run / "quality.json", Study)
    if study is not None and study.protocol.flow_sha256 == before:
        protocol = study.protocol.model_copy(update={"flow_sha256": now})  # its choice is that of rounded weights, too
        points = [study.points[study.reference], *([] if study.choice is None else [study.choice])]
        chosen = None if study.choice is None else 1
        update = {"protocol": protocol, "points": points, "reference": 0, "chosen": chosen}
        write_json(folder / "quality.json", study.model_copy(update=update))
    return settings


def _is_of_release(run: Path) -> bool:
    """Whether a run has the evaluation and the flow of its release, which may be rounded since they were measured."""
    try:
        files = _read_release(run).files
        for path in (run / "evaluation.json", _chosen(run, "flow").path / "model.safetensors"):
            check_file(path, files[path.relative_to(run).as_posix()])
    except (KeyError, UserError):
        return False
    return True


def _write_weights(
    source: Checkpoint, checkpoints: Path, half: bool, autoencoder: str | None, identity: dict[str, Any]
) -> None:
    """Write the weights of a checkpoint that predictions use.

    Args:
        autoencoder: digest of the one that the network belongs to.
        identity: settings that a configuration must share to use them.
    """
    tensors = source.tensors("ema" if source.has("ema") else "model")
    if half:
        tensors = {key: _rounded(value, f"{source.path}: {key}") for key, value in tensors.items()}
    state = {key: value for key, value in source.state.items() if key not in ("step", "files", "best")}
    state = _without_places(state) | {"identity": identity}
    if "autoencoder" in state and isinstance(state["autoencoder"], str):
        state["autoencoder"] = autoencoder
    if "autoencoder" in state.get("store", {}):
        state["store"] |= {"autoencoder": autoencoder}
    folder = CheckpointFolder(checkpoints)
    folder.save(source.step, {"model": tensors}, state, source.state.get("best"))
    for pointer in ("latest", "best"):  # of one checkpoint
        (checkpoints / pointer).unlink(missing_ok=True)


def _rounded(tensor: torch.Tensor, what: str) -> torch.Tensor:
    if tensor.dtype != torch.float32:
        return tensor
    rounded = tensor.half()
    if not rounded.isfinite().all():
        raise UserError(f"{what} is too large for fp16: leave out --half")
    return rounded


def _chosen(run: Path, name: str) -> Checkpoint:
    checkpoint = chosen_checkpoint(run / name)
    assert checkpoint is not None
    return checkpoint


def _read_release(folder: Path) -> Release:
    path = folder / RELEASE_NAME
    try:
        content = read_bounded(path, MOST_RELEASE_BYTES)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; {_EXPECTED}") from None
    return parse_release(content, path)


def _read(path: Path, model: type[BaseModel]) -> Any:
    """A result of a run; None if it is missing, or with a warning unreadable."""
    if not path.is_file():
        return None
    try:
        return read_json(path, model, "left out")
    except UserError as error:
        warn(str(error))
        return None


def _without_places(value: Any) -> Any:
    """A JSON value whose URLs and paths out of the working folder are only their last names."""
    if isinstance(value, dict):
        return {key: _without_places(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_places(part) for part in value]
    if isinstance(value, str) and (value.startswith(("/", "~", "..")) or "://" in value):
        return Path(value).name
    return value
