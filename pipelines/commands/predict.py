"""`river predict`: continue any video file."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import add_prerequisite_options, add_refine_option, path, positive

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "continue any video file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_prerequisite_options(parser)
    add_refine_option(parser)
    parser.add_argument("video", type=path, help="a video file, or a folder of frames")
    parser.add_argument(
        "--frames", type=positive, help="frames to predict; default evaluation.horizon, or with --live until Ctrl-C"
    )
    parser.add_argument("--live", action="store_true", help="write an MP4 alone, frame by frame as they are predicted")
    parser.add_argument("--samples", type=positive, default=1, help="number of different continuations")
    parser.add_argument("--marked", action="store_true", help="frame given frames green and predicted frames red")


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines import stages
    from pipelines.errors import UserError
    from pipelines.evaluation.study.sampler_study import choose_sampler
    from pipelines.loading import find_decoder, find_flow, find_refiner
    from pipelines.prediction.clips import read_video
    from pipelines.sampling.continuation import continue_live, continue_video

    if options.live and options.refine:
        raise UserError("--live predicts without the refiner: leave out --refine or --live")
    video = read_video(config, options.video)  # a broken one is reported before a training that may take days
    if find_flow(config.run_path) is None:
        stages.run_to_prediction(config, run_context)
    else:
        choose_sampler(config, run_context)
    fast = config.sampling.decoder == "fast" and not options.refine
    if fast and find_decoder(config.shared.run_path) is None:
        stages.run_to("decoder", config, run_context)
    if options.refine and find_refiner(config.run_path) is None:
        stages.run_to("refiner", config, run_context)
    if options.live:
        continue_live(config, run_context, video, options.frames, options.marked, options.samples)
        return
    continue_video(
        config,
        run_context,
        video,
        frames=options.frames,
        refine=options.refine,
        marked=options.marked,
        samples=options.samples,
    )
