"""`river sample`: predict videos of the test split."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import add_prerequisite_options, add_refine_option, positive

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "predict videos of the test split: GIF, MP4, contact sheet, latents"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_prerequisite_options(parser)
    add_refine_option(parser)
    parser.add_argument("--videos", type=positive, default=8, help="number of clips")
    parser.add_argument("--samples", type=positive, default=1, help="number of different predictions per clip")


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines import stages
    from pipelines.sampling.continuation import sample_clips

    stages.run_to_prediction(config, run_context, options.refine, of_clips=True)
    sample_clips(config, run_context, options.videos, options.refine, options.samples)
