"""`river evaluate`: measure predictions beside baselines, with the protocol they were measured under."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import add_prerequisite_options, add_refine_option

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

QUICK_CLIPS = 16
HELP = "PSNR, SSIM, LPIPS, sharpness and Fréchet distances with intervals, baselines and protocol"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_prerequisite_options(parser)
    add_refine_option(parser)
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"measure {QUICK_CLIPS} clips only, to see whether all is well; the result is evaluation_quick.json",
    )


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines import stages
    from pipelines.evaluation.evaluator import evaluate, find_networks

    find_networks(config, run_context)  # a missing one is reported before a training that may take days
    stages.run_to_prediction(config, run_context, options.refine, of_clips=True)
    name = "evaluation.json"
    if options.quick:
        name, fewer = "evaluation_quick.json", {"videos": min(QUICK_CLIPS, config.evaluation.videos)}
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=fewer)})
    evaluate(config, run_context, options.refine, name)
