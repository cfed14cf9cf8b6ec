"""`river play`: a page in the browser on which one plays with a trained run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import add_prerequisite_options, count

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "a page in the browser: predictions that go on live from a clip"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_prerequisite_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine alone")
    parser.add_argument("--port", type=count, default=0, help="port to listen on; default: any free one")
    parser.add_argument("--no-browser", action="store_true", help="print the page's address, open no browser")


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines import stages
    from pipelines.evaluation.study.sampler_study import choose_sampler
    from pipelines.loading import find_flow
    from pipelines.play.web_server import play

    if find_flow(config.run_path) is None:
        stages.run_to_prediction(config, run_context)
    else:
        choose_sampler(config, run_context)
    play(config, run_context, options.host, options.port, not options.no_browser)
