"""`river encode`: encode all splits into the store of latents, or verify it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import add_prerequisite_options, count

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "encode all splits into the store of latents, append new videos to it, or --verify it"
# Sections of the configuration that --restart, --overwrite and --fine-tune take from the file again.
BEGINS_ANEW = ("cache",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_prerequisite_options(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a store that contradicts the configuration or the videos"
    )
    parser.add_argument(
        "--verify",
        type=count,
        nargs="?",
        const=64,
        metavar="N",
        help="write nothing: check all checksums, encode N frames (default 64) again and compare",
    )


def dry_run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    """Print the configuration, what would be done, and what would be added to a complete store."""
    from pipelines.config import dump_config
    from pipelines.encoding.store_encoder import preview_appending
    from pipelines.runtime.progress import say
    from pipelines.stages import describe

    say(dump_config(config))
    say(describe(config, run_context.device))
    if added := preview_appending(config, run_context):
        say(added)


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    if options.verify is None:
        from pipelines import stages

        stages.run_to("store", config, run_context)
    else:
        from pipelines.encoding.verification import verify_store

        verify_store(config, run_context, options.verify)
