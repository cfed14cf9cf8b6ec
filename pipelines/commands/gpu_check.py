"""`river gpu-check`: compare the GPU with the CPU, and measure it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import positive

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "check that the GPU computes what the CPU computes, and measure it; writes gpu_check.json and gpu_check.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes", type=positive, default=4, help="after which no further speed is measured; checks are always made"
    )


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines.bench.device_check import check_device

    check_device(config, run_context, options.minutes)
