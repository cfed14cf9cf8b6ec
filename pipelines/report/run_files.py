"""Files of a run as the report reads them: results, logs and checkpoints."""

import json
from functools import cached_property
from typing import TypeVar

from pydantic import BaseModel

import latent_cache
from latent_cache import LatentCache
from pipelines.bench.measurement import Benchmark
from pipelines.config import RiverConfig
from pipelines.encoding.store_checks import store_status
from pipelines.errors import UserError
from pipelines.prediction.samples import Samples
from pipelines.runtime.checkpoints import Checkpoint
from pipelines.runtime.files import read_json
from pipelines.runtime.logs import Log, read_log
from pipelines.runtime.results import Evaluation, Study
from pipelines.runtime.run_folder import Environment, chosen_checkpoint
from pipelines.runtime.status import Status
from pipelines.sharing.bundled_models import BUNDLED
from pipelines.training.autoencoder_trainer import autoencoder_status
from pipelines.training.decoder_trainer import decoder_status
from pipelines.training.flow_trainer import flow_status
from pipelines.training.refiner_trainer import refiner_status

TRAININGS = ("autoencoder", "flow", "decoder", "refiner")
STATUS = {
    "autoencoder": autoencoder_status,
    "store": store_status,
    "flow": flow_status,
    "decoder": decoder_status,
    "refiner": refiner_status,
}
# Class -> file and the command that writes it.
FILES: dict[type[BaseModel], tuple[str, str]] = {
    Evaluation: ("evaluation.json", "evaluate"),
    Study: ("quality.json", "study"),
    Benchmark: ("benchmark.json", "bench"),
    Samples: ("samples/samples.json", "sample"),
    Environment: ("environment.json", "train-flow"),
}

Model = TypeVar("Model", bound=BaseModel)


class Missing(Exception):
    """A section has nothing to show yet; the message names the command that makes it."""


class Run:
    """The files of a configuration's run. Where one cannot be read, a `UserError` names it and the way out."""

    def __init__(self, config: RiverConfig) -> None:
        self.config, self.path = config, config.run_path
        self.name = config.dataset.name + (f", run {config.run}" if config.run else "")

    def read(self, model: type[Model]) -> Model | None:
        """The file of a class; None where it is missing."""
        name, target = FILES[model]
        path = self.path / name
        return read_json(path, model, f"`{self.command(target)}` writes it again") if path.exists() else None

    def read_if_sound(self, model: type[Model]) -> Model | None:
        """The file of a class; None also where it cannot be read, which another section reports."""
        try:
            return self.read(model)
        except UserError:
            return None

    @cached_property
    def stages(self) -> dict[str, Status]:
        """How far the store and each training are under the configuration."""
        return {name: status(self.config) for name, status in STATUS.items()}

    @cached_property
    def splits(self) -> list[LatentCache]:
        """The splits of the store, `train` first; none where it is not done."""
        store = self.stages["store"]
        splits = latent_cache.splits(store.path) if store.is_done else []
        return [latent_cache.open(store.path, split) for split in splits]

    @cached_property
    def logs(self) -> dict[str, Log | None]:
        """The log of each training; None if there is none."""
        return {training: read_log(self.config.training_folder(training) / "log.jsonl") for training in TRAININGS}

    @cached_property
    def checkpoints(self) -> dict[str, Checkpoint | None]:
        """The checkpoint in use of each training; None if there is none."""
        return {training: chosen_checkpoint(self.config.training_folder(training)) for training in TRAININGS}

    def damaged_checkpoints(self, training: str) -> list[str]:
        """A message per checkpoint whose `state.json` cannot be read."""
        problems = []
        for path in sorted((self.config.training_folder(training) / "checkpoints").glob("step_*/state.json")):
            try:
                json.loads(path.read_bytes())
            except (OSError, ValueError, RecursionError) as error:
                problems.append(f"{path}: {error}; the checkpoint is ignored: remove it")
        return problems

    def command(self, target: str) -> str:
        """The command that makes a missing part."""
        name, run = self.config.dataset.name, self.config.run
        if name in BUNDLED and run is None:
            return f"river {target} --run {name}"
        return f"river {target} --config {name}" + (f" --run {run}" if run else "")

    def is_empty(self) -> bool:
        """Whether there is nothing to report on."""
        return not any((self.path / name).exists() for name in (*(name for name, _ in FILES.values()), *TRAININGS))
