"""`river runs`: the runs of a data set side by side."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "list the runs of a data set: steps, PSNR, date, and which settings differ"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines.report.run_list import format_runs
    from pipelines.runtime.progress import say

    say(format_runs(config))
