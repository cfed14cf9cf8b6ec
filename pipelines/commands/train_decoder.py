"""`river train-decoder`: train the optional fast decoder of predicted frames."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import add_training_options

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "optional: train a small, fast decoder for sampling.decoder=fast, from the store alone"
# Sections of the configuration that --restart, --overwrite and --fine-tune take from the file again.
BEGINS_ANEW = ("decoder",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_options(parser)


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines import stages

    stages.run_to("decoder", config, run_context)
