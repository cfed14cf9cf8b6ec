"""`river push`: a run, and on request its store, to a folder, S3 or the Hugging Face hub."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import path

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "share a run: its weights, settings and results with a model card, in a folder, on S3 or on the hub"
CONFIG_IS_OPTIONAL = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=path, metavar="RUN_FOLDER", help="of the run, such as runs/shapes")
    parser.add_argument("destination", metavar="DEST", help="a folder, s3://bucket/prefix or hf://user/name")
    parser.add_argument("--store", action="store_true", help="send the store of latents, too")
    parser.add_argument("--half", action="store_true", help="round the weights to fp16: half the size")
    parser.add_argument("--data-license", metavar="TEXT", help="of the training videos, for the model card")


def run(config: RiverConfig | None, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines.sharing.transfer import push

    push(
        options.folder,
        options.destination,
        store=options.store,
        half=options.half,
        data_license=options.data_license,
        dry_run=options.dry_run,
    )
