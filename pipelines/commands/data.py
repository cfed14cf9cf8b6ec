"""`river data`: fetch, verify, unpack and index the raw videos."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import add_video_options

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "fetch, verify, unpack and index the raw videos"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_video_options(parser)


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines import stages

    stages.run_to("videos", config, run_context)


def dry_run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    """Print what would be fetched, and what the videos that are there contain."""
    from pipelines.data.datasets import preview_data

    preview_data(config, run_context)
