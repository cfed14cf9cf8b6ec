"""`river watch`: a page in the browser that shows the trainings of a run while they run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import add_server_options

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "a page in the browser: curves, pictures, rate and remaining time of a run's trainings, live"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server_options(parser)


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines.report.live_page import watch

    watch(config, options.host, options.port, not options.no_browser)
