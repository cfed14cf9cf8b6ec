"""The story as data: which stages there are, what each needs, how far it is, and how it is run."""

from collections.abc import Callable
from dataclasses import dataclass

from pipelines.config import RiverConfig
from pipelines.data.datasets import prepare_data
from pipelines.dry_run import describe_plan as describe
from pipelines.encoding.encode_store import encode
from pipelines.runtime.context import RunContext
from pipelines.training.autoencoder_stage import train_autoencoder
from pipelines.training.flow_stage import train_flow
from pipelines.training.refiner_stage import train_refiner

__all__ = ["STAGES", "Stage", "describe", "run_to"]


@dataclass(frozen=True)
class Stage:
    """One step of the story."""

    name: str
    run: Callable[[RiverConfig, RunContext], object]


STAGES = {
    stage.name: stage
    for stage in (
        Stage("videos", prepare_data),
        Stage("autoencoder", train_autoencoder),
        Stage("store", encode),
        Stage("flow", train_flow),
        Stage("refiner", train_refiner),
    )
}


def run_to(name: str, config: RiverConfig, run_context: RunContext) -> None:
    """Run a stage, after everything that it needs and that is not done."""
    STAGES[name].run(config, run_context)
