"""`river bench`: measure speed on this machine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "measure reading, training, sampling and encoding on this machine; writes benchmark.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines.bench.benchmark import run_benchmark

    run_benchmark(config, run_context)
