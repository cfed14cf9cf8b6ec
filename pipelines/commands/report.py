"""`river report`: one self-contained HTML page of a run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "one self-contained HTML page of a run: runs/<dataset>/report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines.report.page import write_report

    write_report(config)
