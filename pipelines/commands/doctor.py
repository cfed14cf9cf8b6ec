"""`river doctor`: one screen about this machine and this folder, for bug reports."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "one screen for a bug report: versions, devices, threads, disks, extras, weights, and what this folder has"
CONFIG_IS_OPTIONAL = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(config: RiverConfig | None, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines.config import PathsConfig
    from pipelines.runtime.progress import say
    from pipelines.upkeep.diagnosis import describe_machine, without_home

    paths = PathsConfig() if config is None else config.paths
    for line in describe_machine(paths, run_context.device):
        say(without_home(line))
