"""`river inspect`: summarize a store, check it, seal it, decode one of its videos."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from pipelines.errors import UserError
from pipelines.runtime.arguments import path

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "summarize a store; check its checksums; give an old one a manifest; decode any of its videos"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "store",
        nargs="?",
        type=os.path.expanduser,
        help="latents/<dataset>.zarr, or a URL; default: the store of --config or --run",
    )
    parser.add_argument("--verify", action="store_true", help="read the whole store and check its checksums")
    parser.add_argument(
        "--seal",
        action="store_true",
        help="read a store that has no manifest, check its checksums, and write a manifest of its files",
    )
    parser.add_argument("--video", help="id of a video to decode")
    parser.add_argument("--view", help="the view of that video, such as hflip; default: the video itself")
    parser.add_argument("--gif", type=path, help="file for the decoded video")


def config_is_optional(options: argparse.Namespace) -> bool:
    """A store that is named needs none, unless a run or a setting is named, too."""
    return options.store is not None and not options.set


def run(config: RiverConfig | None, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines.encoding.store_summary import inspect_store, seal_store

    if options.store is None:
        _check_that_it_has_a_store(config)
    store = options.store or str(config.store_path)
    if options.seal:
        seal_store(store)
    inspect_store(
        config, run_context, store, verify=options.verify, video=options.video, view=options.view, gif=options.gif
    )


def _check_that_it_has_a_store(config: RiverConfig) -> None:
    """Raise UserError for a run whose store was never written or did not come with it, with what there is to do."""
    from pipelines.report.run_files import Run

    if not config.store_path.exists():
        run = Run(config)
        shown = "" if run.is_empty() else f"; `{run.command('report')}` shows what the run has"
        raise UserError(f"{config.store_path}: no store: `{run.command('encode')}` writes it{shown}")
