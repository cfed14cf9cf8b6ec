"""`river bench`: what the store, training and sampling are worth on this machine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "what the store is worth on this machine: a table of ratios, and benchmark.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines.bench.benchmark import bench

    bench(config, run_context)
