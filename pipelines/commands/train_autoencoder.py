"""`river train-autoencoder`: stage 1, train the VQGAN."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import add_training_options

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "stage 1: train the VQGAN"
# Sections of the configuration that --restart, --overwrite and --fine-tune take from the file again.
BEGINS_ANEW = ("seed", "dataset", "autoencoder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_options(parser)


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines import stages

    stages.run_to("autoencoder", config, run_context)
