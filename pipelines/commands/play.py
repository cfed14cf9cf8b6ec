"""`river play`: a page in the browser on which one plays with a trained run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import add_prerequisite_options, add_server_options

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "a page in the browser: predictions that go on live from a clip"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_prerequisite_options(parser)
    add_server_options(parser)


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
