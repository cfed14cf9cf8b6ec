"""The configuration: one schema, read from YAML, with errors that name the key and the way out."""

import difflib
import hashlib
import json
import math
import os
import re
import reprlib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pipelines.errors import UserError
from pipelines.yaml_files import DEEPEST, parse_yaml, read_yaml, write_yaml
from stage1_autoencoder.config import (
    AutoencoderModelConfig,
    AutoencoderTrainingConfig,
    RefinerModelConfig,
    RefinerTrainingConfig,
    VQGANConfig,
)
from stage1_autoencoder.setting_types import FilePath, Seed, Size
from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.views import parse_view
from stage2_flow.config import FlowTrainingConfig, SamplingConfig, VectorFieldConfig
from stage2_flow.sampling_plan import SamplingPlan

_UNITS = {
    "": 1,
    "B": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


def parse_size(text: str) -> int:
    """`"4 GiB"`, `"512MB"` or `"1000"` in bytes.

    Raises:
        UserError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise UserError(f"{text!r} is not a size of memory: expected for example 4 GiB or 512 MB")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if not 1 <= size < 2**63:
        raise UserError(f"{text!r} is not a size of memory: expected 1 byte or more, and less than 8388608 TiB")
    return int(size)


# Pixels per side of SSIM's window: smaller images have no SSIM.
SSIM_WINDOW = 11
# Of the field. Training takes 16 bytes per weight: itself, its gradient, and two moments of AdamW.
MOST_WEIGHTS = 2**40 // 16

ProtocolName = Literal["kth_10_30", "kth_10_40", "bair_1_15", "clevrer_2_14"]

# SRVP, SLAMP, MCVD and RaMViD prepend the given frames to the predicted ones and pass whole clips to the I3D.
_FVD: dict[str, Any] = {"fvd_context": True, "fvd_frames": None}
# SRVP's test set: 1000 clips drawn from the videos of persons 21-25. Its draw is unknown; ours is by evaluation.seed.
_KTH: dict[str, Any] = {"split": "test", "context": 10, "videos": 1000, "samples": 1, "window": "random", "seed": 0}

PROTOCOLS: dict[str, dict[str, Any]] = {
    "kth_10_30": _KTH | {"horizon": 30} | _FVD,
    "kth_10_40": _KTH | {"horizon": 40} | _FVD,
    # The whole test set, the first 16 of 30 frames of each.
    "bair_1_15": {"split": "test", "context": 1, "horizon": 15, "videos": 256, "samples": 1, "window": "first"} | _FVD,
    # RIVER's lengths; its number of videos is unknown.
    "clevrer_2_14": {"split": "test", "context": 2, "horizon": 14, "videos": 256, "samples": 1, "window": "first"}
    | _FVD,
}

# Keys of `dataset:` that belong to a protocol. They are not set; a difference is reported.
_EVERY_FRAME = {"fps": None, "frame_step": 1}
_KTH_DATA = {"source": "kth", "image_size": 64, **_EVERY_FRAME, "splits.test": "21-25", "sequences": False}
PROTOCOL_DATA: dict[str, dict[str, Any]] = {
    "kth_10_30": _KTH_DATA,
    "kth_10_40": _KTH_DATA,
    "bair_1_15": _EVERY_FRAME,
    "clevrer_2_14": {"image_size": 128, "fps": None, "frame_step": 5},
}


class EvaluationConfig(BaseModel):
    """The protocol: which clips, how many frames are given, how many are predicted.

    With `protocol`, keys that are not set take the protocol's values instead of the defaults.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: ProtocolName | None = Field(
        None,
        description="a protocol of the literature, which sets the keys below; keys set explicitly win, and the result "
        "reports them",
    )
    split: Split = Field("test", description="split that `evaluate` measures and `sample` shows; `study` takes val")
    context: Size = Field(10, description="frames given")
    horizon: Size = Field(30, description="frames predicted")
    videos: Size = Field(256, description="number of clips; with window: random a video can give several")
    samples: Size = Field(1, description="predictions per clip, each with its own sampling seed")
    window: Literal["first", "random", "moving"] = Field(
        "first",
        description="where a clip starts: at frame 0, at a random frame, or where the given frames move most",
    )
    batch_size: Size = Field(32, description="clips per batch; changes only memory and speed")
    seed: Seed = Field(0, description="of random windows and of the bootstrap")
    video_network: FilePath | None = Field(
        None,
        description="path of the I3D, i3d_torchscript.pt, for the Fréchet video distance; null: the copy in torch's "
        "download folder (--download downloads it)",
    )
    fvd_context: bool = Field(
        True,
        description="whether clips of the Fréchet video distance begin with the given frames: yes in SRVP, SLAMP, MCVD "
        "and RaMViD, no in FitVid",
    )
    fvd_frames: PositiveInt | None = Field(
        16,
        ge=10,
        description="frames per input of the I3D: clips are cut into consecutive segments of this length, the last one "
        "aligned with the end of the clip; null: the whole clip",
    )
    resamples: NonNegativeInt = Field(
        1000,
        le=100_000,
        description="bootstrap resamples over recordings for 95 % intervals; 0: no intervals. At most 200 are used for "
        "the Fréchet video distance",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_protocol(cls, values: Any) -> Any:
        name = values.get("protocol") if isinstance(values, dict) else None
        return PROTOCOLS[name] | values if isinstance(name, str) and name in PROTOCOLS else values


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PathsConfig(_Section):
    """Root folders; the data set's name is appended to each. The defaults are in the working folder."""

    data: FilePath = Field("data", description="raw videos: <data>/<name>")
    latents: FilePath = Field("latents", description="stores: <latents>/<name>.zarr")
    runs: FilePath = Field("runs", description="checkpoints, logs, samples: <runs>/<name>")


class AutoencoderConfig(_Section):
    model: AutoencoderModelConfig = Field(default_factory=VQGANConfig)
    training: AutoencoderTrainingConfig = Field(default_factory=AutoencoderTrainingConfig)


class CacheConfig(_Section):
    """The store of latents."""

    residency: Literal["auto", "device", "host", "stream"] = Field(
        "auto",
        description="where stage 2 keeps the latents: all on the training device, all in host memory, or, with stream, "
        "a part at a time within memory_budget; auto: the first of these that fits into free memory",
    )
    dtype: Literal["float16", "float32"] = "float16"
    chunk_frames: PositiveInt | None = Field(None, le=2**24, description="frames per chunk; null: about 8 MiB")
    views: tuple[str, ...] = Field(
        ("identity",),
        description="augmented versions of the training videos to store: identity, hflip, jitter-1, jitter-2, ... "
        "(color, constant over a video); the other splits have identity only",
    )
    codes: bool = Field(True, description="store the nearest codes beside the latents")
    precision: Literal["fp32", "tf32", "bf16"] = Field(
        "fp32",
        description="of the encoder: on a GPU tf32 (convolutions) adds an error about as large as that of fp16 "
        "storage, bf16 one ten times as large",
    )
    compile: bool = Field(False, description="torch.compile the encoder, which takes about a minute")
    batch_frames: Size = Field(
        1,
        description="minimum number of frames encoded at once, rounded up to whole batches of the network; changes "
        "memory and speed, not the store",
    )
    memory_budget: str = Field(
        "4 GiB", description="memory for the frames and latents of `encode`, and for latents with residency: stream"
    )

    @field_validator("views")
    @classmethod
    def _views_are_known(cls, views: tuple[str, ...]) -> tuple[str, ...]:
        for view in views:
            parse_view(view)
        if not views or len(set(views)) < len(views):
            raise ValueError("expected at least one view, and none twice")
        return views

    @property
    def memory_budget_bytes(self) -> int:
        return parse_size(self.memory_budget)


class FlowConfig(_Section):
    model: VectorFieldConfig = Field(default_factory=VectorFieldConfig)
    training: FlowTrainingConfig = Field(default_factory=FlowTrainingConfig)


class RefinerConfig(_Section):
    """The optional refinement network."""

    model: RefinerModelConfig = Field(default_factory=RefinerModelConfig)
    training: RefinerTrainingConfig = Field(default_factory=RefinerTrainingConfig)


class LoggingConfig(_Section):
    every: PositiveInt = Field(50, description="steps between lines of log.jsonl")
    wandb: Literal["off", "offline", "online"] = Field("off", description="only online uses the network")
    wandb_project: str = "river"

    @field_validator("wandb", mode="before")
    @classmethod
    def _accept_yaml_booleans(cls, value: Any) -> Any:
        # Readers of YAML 1.1 write a bare `off` as false.
        return {True: "offline", False: "off"}[value] if isinstance(value, bool) else value


class RiverConfig(_Section):
    """Everything a run depends on."""

    seed: Seed = 0
    paths: PathsConfig = Field(default_factory=PathsConfig)
    dataset: DatasetConfig
    autoencoder: AutoencoderConfig = Field(default_factory=AutoencoderConfig)
    cache: CacheConfig = Field(default_factory=CacheConfig)
    flow: FlowConfig = Field(default_factory=FlowConfig)
    refiner: RefinerConfig = Field(default_factory=RefinerConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)

    @model_validator(mode="after")
    def _sizes_fit(self) -> "RiverConfig":
        factor = self.autoencoder.model.downsampling
        if self.dataset.image_size % factor:
            raise ValueError(
                f"dataset.image_size: {self.dataset.image_size} is not a multiple of {factor}, the down-sampling "
                f"factor of autoencoder.model.{self.autoencoder.model.what_downsamples}"
            )
        adversarial = self.autoencoder.training.adversarial
        if adversarial.weight and self.dataset.image_size < adversarial.smallest_side:
            raise ValueError(
                f"autoencoder.training.adversarial.layers: {adversarial.layers} layers need images of at least "
                f"{adversarial.smallest_side} pixels per side, and dataset.image_size is {self.dataset.image_size}: "
                "use fewer layers"
            )
        if self.autoencoder.training.best_by == "ssim" and self.dataset.image_size < SSIM_WINDOW:
            raise ValueError(
                f"autoencoder.training.best_by: ssim needs images of at least {SSIM_WINDOW} pixels per side, and "
                f"dataset.image_size is {self.dataset.image_size}: use psnr"
            )
        for key, size in (
            ("autoencoder.training.pool_memory", self.autoencoder.training.pool_memory),
            ("cache.memory_budget", self.cache.memory_budget),
        ):
            try:
                parse_size(size)
            except UserError as error:
                raise ValueError(f"{key}: {error}") from None
        field = self.flow.model
        if field.weights > MOST_WEIGHTS:
            raise ValueError(
                f"flow.model.width: {field.width} gives the field {field.weights / 1e9:.0f} billion weights, and "
                f"{MOST_WEIGHTS / 1e9:.0f} billion take 1 TiB in training: use a smaller width or depth"
            )
        SamplingPlan.from_config(self.sampling)  # refuses options that exclude each other
        return self

    @property
    def data_root(self) -> Path:
        return Path(self.paths.data)

    @property
    def store_path(self) -> Path:
        return Path(self.paths.latents) / f"{self.dataset.name}.zarr"

    @property
    def run_path(self) -> Path:
        return Path(self.paths.runs) / self.dataset.name


def preset_folders(path: str | Path | None = None) -> list[Path]:
    """Folders of presets: that of a configuration file, ./configs, the repository's, the package's."""
    beside = [] if path is None else [Path(path).parent]
    shipped = [Path(__file__).resolve().parents[1] / "configs", Path(__file__).resolve().parent / "presets"]
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


def load_config(
    path: str | Path, overrides: Sequence[str] = (), run_settings: dict[str, dict[str, Any]] | None = None
) -> RiverConfig:
    """Read a YAML file or preset and its `base` files; apply `key.path=value` overrides; check everything.

    `null` gives a section, or a key that cannot be null, its default again. Paths expand `~` and `$NAME`. Relative ones
    are relative to the file that has them, or to the working folder if an override has them.

    Args:
        run_settings: section -> values of a run, which replace those of the file; overrides replace both.
    Raises:
        UserError: the file is missing or not YAML, a key is unknown (names the closest known one), a value has the
            wrong type or is out of range.
    """
    values = _read_config(find_preset(path), seen=())
    for section, kept in (run_settings or {}).items():
        values[section] = kept if not isinstance(kept, dict) else (values.get(section) or {}) | kept
    origin = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        key = key.strip()
        if not separator or not key:
            raise UserError(f"--set {override}: expected key.path=value, for example --set flow.training.steps=1000")
        value = parse_yaml(text, f"--set {override}: the value is not YAML", comments=False)
        values = _assign(values, key.split("."), value, override)
        origin[key] = f"--set {override}"
    return parse_config(values, str(path), origin)


def parse_config(values: dict[str, Any], source: str, origin: dict[str, str] | None = None) -> RiverConfig:
    """Check a mapping against the schema; `source` and `origin` (key path -> where it was set) appear in errors."""
    if isinstance(values, dict):
        values = _without_nulls(RiverConfig, values)
    try:
        config = RiverConfig.model_validate(values)
    except ValidationError as error:
        problems = _by_key(error.errors(), values)
    else:
        problems = list(_odd_numbers(values, config.model_dump()))
    if problems:
        raise UserError("\n".join(_explain(problem, values, source, origin or {}) for problem in problems))
    return config


def _read_config(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The values of a file over those of its `base`, with paths that hold in any folder."""
    if path.resolve() in seen:
        raise UserError(f"{path}: `base` refers back to this file")
    values = read_yaml(path)
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise UserError(f"{path}: expected sections such as `dataset:`, found {found}")
    values = _anchor_paths(RiverConfig, values, path.parent)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: base: {_show(base)} is not the name of a config file or preset")
    try:
        found = find_preset(base, path.parent)
    except UserError as error:
        raise UserError(f"{path}: base: {error}") from None
    return _merge(_read_config(found, (*seen, path.resolve())), values)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _assign(values: dict[str, Any], keys: list[str], value: Any, override: str) -> dict[str, Any]:
    """A copy of the values with one of them set."""
    if len(keys) > DEEPEST:
        raise UserError(f"--set {override}: a key has at most {DEEPEST} parts")
    first, *others = keys
    if others:
        section = values.get(first)
        if section is not None and not isinstance(section, dict):
            raise UserError(f"--set {override}: {first} is a value, not a section")
        value = _assign(section or {}, others, value, override)
    return values | {first: value}


def _section_of(field: FieldInfo | None, values: Any) -> type[BaseModel] | None:
    """The model of a section, of the architecture that its values name; None: the field is no section."""
    kinds = () if field is None else (field.annotation, *typing.get_args(field.annotation))
    bare = [typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind for kind in kinds]
    models = [kind for kind in bare if isinstance(kind, type) and issubclass(kind, BaseModel)]
    for model in models[1:]:
        if isinstance(values, dict) and model.model_fields["architecture"].default == values.get("architecture"):
            return model
    return models[0] if models else None


def _without_nulls(model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """The values without nulls of sections and of keys that cannot be null."""
    kept = {}
    for name, value in values.items():
        field = model.model_fields.get(name)
        if value is None and field is not None and NoneType not in typing.get_args(field.annotation):
            continue
        if isinstance(value, dict) and field is not None:
            section = _section_of(field, value)
            value = _without_nulls(section, value) if section else {k: v for k, v in value.items() if v is not None}
        kept[name] = value
    return kept


def _anchor_paths(model: type[BaseModel], values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The values with relative paths made absolute in a folder.

    Defaults stay: `data`, `latents` and `runs` are folders of the working folder, wherever they are written.
    """
    anchored = {}
    for name, value in values.items():
        field = model.model_fields.get(name)
        if isinstance(value, dict) and (section := _section_of(field, value)):
            value = _anchor_paths(section, value, folder)
        elif isinstance(value, str) and field is not None and _is_path(field) and value != field.default:
            # What begins with a variable is not known yet.
            if not value.startswith(("~", "$", "{data}")):
                value = os.path.abspath(folder / value)
        anchored[name] = value
    return anchored


def _is_path(field: FieldInfo) -> bool:
    (expands,) = FilePath.__metadata__
    return expands in field.metadata or FilePath in typing.get_args(field.annotation)


class _Problem(typing.NamedTuple):
    """What is wrong with a key: its path, pydantic's type of the error, the value, and what is allowed."""

    path: list[str]
    type: str
    value: Any
    message: str


def _by_key(errors: list[ErrorDetails], values: Any) -> list[_Problem]:
    """One problem per key. Pydantic has one per type that a key may have, and one per section around a wrong key."""
    problems: dict[str, _Problem] = {}
    for error in errors:
        path = _path_of(error["loc"], values, error["type"])
        message = _IN_YAML.get(error["type"], error["msg"]).removeprefix("Value error, ")
        key = ".".join(path)
        if path and key in problems:
            message = f"{problems[key].message}, or {message.removeprefix('Input should be ')}"
        problems[key if path else message] = _Problem(path, error["type"], error["input"], message)
    return [
        problem
        for key, problem in problems.items()
        if not problem.path or not any(other.startswith(f"{key}.") for other in problems)
    ]


# Pydantic's messages that speak of Python.
_IN_YAML = dict.fromkeys(("model_type", "dict_type"), "Input should be a section of keys") | {
    "tuple_type": "Input should be a list",
    "bool_parsing": "Input should be true or false",
    "bool_type": "Input should be true or false",
}


def _path_of(location: tuple[int | str, ...], values: Any, kind: str) -> list[str]:
    """The path of a key as users write it: without the types that pydantic adds where there are several."""
    path = []
    for part in location:
        if (inner := _item(values, part)) is not _ABSENT:
            values = inner
            path.append(str(part))
    return [*path, str(location[-1])] if kind == "missing" else path


_ABSENT = object()


def _item(values: Any, key: int | str) -> Any:
    """What a mapping or a list has at a key."""
    if isinstance(values, dict):
        return values.get(key, _ABSENT)
    return values[key] if isinstance(values, list) and key in range(len(values)) else _ABSENT


def _odd_numbers(values: Any, checked: Any, path: tuple[str, ...] = ()) -> Iterator[_Problem]:
    """Numbers that no key can have, although its type has them: `true`, infinity, and integers of more than 64 bits."""
    if isinstance(checked, dict | list | tuple):
        for key, inner in checked.items() if isinstance(checked, dict) else enumerate(checked):
            yield from _odd_numbers(_item(values, key), inner, (*path, str(key)))
    elif isinstance(checked, int | float) and not isinstance(checked, bool):
        if isinstance(values, bool):
            yield _Problem([*path], "number", values, "Input should be a number")
        elif not math.isfinite(checked):
            yield _Problem([*path], "number", values, "Input should be a finite number")
        elif isinstance(checked, int) and not -(2**63) <= checked < 2**63:
            yield _Problem([*path], "number", values, f"Input should be less than or equal to {2**63 - 1}")


class _YamlRepr(reprlib.Repr):
    """Values of a message: in YAML's words, and no longer than a line."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 100, 100

    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"


_show = _YamlRepr().repr


def _explain(problem: _Problem, values: Any, source: str, origin: dict[str, str]) -> str:
    """A problem as one line: file or option, key, value, what is allowed."""
    path, message = problem.path, problem.message
    key = ".".join(path)
    unknown = problem.type == "extra_forbidden"
    # An error about several keys of a section names them in its message; the value would be the whole section.
    of_section = problem.type in ("value_error", "architecture") and isinstance(problem.value, dict)
    named = message if of_section else None
    where = ", ".join(text for name, text in origin.items() if _concerns(name, key, named)) or source
    if unknown:
        known = _known_keys(path[:-1], values)
        close = difflib.get_close_matches(path[-1], known, n=1)
        section = ".".join(path[:-1])
        hint = f'did you mean "{close[0]}"?' if close else f"known here: {', '.join(known)}"
        return f"{where}: {key}: unknown key{' in ' + section if section else ''}; {hint}"
    if of_section and re.match(r"\w+: ", message):
        return f"{where}: {key}.{message}"
    if not key or problem.type == "missing" or of_section:
        return f"{where}: {key + ': ' if key else ''}{message}"
    return f"{where}: {key}: {_show(problem.value)} is not allowed: {message}"


def _concerns(override: str, key: str, named: str | None) -> bool:
    """Whether an override of this key path can have caused an error at `key`; `named`: the keys that it is about."""
    if key and (key == override or key.startswith(f"{override}.")):
        return True
    if key and not override.startswith(f"{key}."):
        return False
    return named is None or override.rpartition(".")[2] in named


def _known_keys(path: list[str], values: Any) -> list[str]:
    """The keys of a section."""
    model: type[BaseModel] | None = RiverConfig
    for name in path:
        values = values.get(name)
        model = _section_of(model.model_fields.get(name), values) if model else None
    return sorted(model.model_fields) if model else []


def dump_config(config: RiverConfig) -> str:
    """The resolved configuration as YAML that `load_config` takes back, in whatever folder it then is."""
    return write_yaml(_anchor_paths(RiverConfig, config.model_dump(mode="json"), Path.cwd()))


def fingerprint(*parts: Any) -> str:
    """sha256 of sections or other plain data."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


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
