"""`river pull`: a run that was pushed, and on request its store."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import path

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "get a shared run from a folder, S3 or the hub, checked by its digests"
CONFIG_IS_OPTIONAL = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a folder, s3://bucket/prefix or hf://user/name")
    parser.add_argument("folder", type=path, nargs="?", metavar="FOLDER", help="a new one; default: runs/<data set>")
    parser.add_argument("--store", action="store_true", help="get the store of latents, too")


def run(config: RiverConfig | None, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines.sharing.transfer import pull

    pull(options.source, options.folder, store=options.store, dry_run=options.dry_run)
