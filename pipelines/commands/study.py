"""`river study`: compare solvers and numbers of evaluations, and choose the sampler of the run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import add_prerequisite_options, positive

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "compare solvers and numbers of evaluations on the validation split; chooses the sampler of predictions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_prerequisite_options(parser)
    parser.add_argument("--videos", type=positive, default=24, help="number of clips")
    parser.add_argument(
        "--most-evaluations", type=positive, metavar="NFE", help="leave out settings with more evaluations per frame"
    )


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines import stages
    from pipelines.evaluation.study.sampler_study import open_study_clips, study

    clips = open_study_clips(config, run_context, options.videos)  # errors are reported before a training
    stages.run_to_prediction(config, run_context, choose=False)
    study(config, run_context, clips, options.most_evaluations)
