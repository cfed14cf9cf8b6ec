"""`river release-run`: a trained run as others get it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import path

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "copy of a run with only what predictions need, to give away: weights, settings, results, model card"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=path, metavar="FOLDER", help="default models/<dataset>, or models/<dataset>-<run>"
    )
    parser.add_argument("--half", action="store_true", help="round the weights to fp16: half the size")
    parser.add_argument("--data-license", metavar="TEXT", help="license of the training videos, for the model card")


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pathlib import Path

    from pipelines.runtime.files import size_text, stored_bytes
    from pipelines.runtime.progress import say
    from pipelines.sharing.released_run import write_released_run

    name = "-".join([config.dataset.name, *([config.run] if config.run else [])])
    folder = options.out or Path("models", name)
    write_released_run(config.run_path, folder, half=options.half, data_license=options.data_license)
    say(f"release-run: {folder}: {size_text(stored_bytes(folder))}, README.md is its model card")
