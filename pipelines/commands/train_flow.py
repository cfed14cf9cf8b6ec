"""`river train-flow`: stage 2, train the flow from the store alone; then choose its sampler."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import add_training_options

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "stage 2: train the flow from the store alone, then choose its sampler on validation clips"
# Sections of the configuration that --restart, --overwrite and --fine-tune take from the file again.
BEGINS_ANEW = ("flow",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_options(parser)
    parser.add_argument(
        "--fine-tune",
        action="store_true",
        help="start from the weights of the existing flow, imported or trained; it is moved to a backup",
    )


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines import stages

    stages.run_to("flow", config, run_context)
    stages.run_to("sampler", config, run_context)
