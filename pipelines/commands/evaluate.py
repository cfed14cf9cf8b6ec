"""`river evaluate`: measure predictions beside baselines, with the protocol they were measured under."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import add_prerequisite_options, add_refine_option, path

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

QUICK_CLIPS = 16
HELP = "PSNR, SSIM, LPIPS, sharpness and Fréchet distances with intervals, baselines and protocol"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_prerequisite_options(parser)
    add_refine_option(parser)
    others = parser.add_mutually_exclusive_group()
    others.add_argument(
        "--quick",
        action="store_true",
        help=f"measure {QUICK_CLIPS} clips only, to see whether all is well; the result is evaluation_quick.json",
    )
    others.add_argument(
        "--export-clips",
        type=path,
        metavar="FOLDER",
        help="measure nothing, but write given and true frames of all clips, for other predictors",
    )
    others.add_argument(
        "--predictions",
        type=path,
        metavar="PATH",
        help="measure another predictor: a folder of videos, arrays or frame folders that are called as the clips, or "
        "one .npz or .safetensors file",
    )
    others.add_argument(
        "--compare",
        nargs="+",
        metavar="PATH",
        help="measure several, and differences to the first: paths as for --predictions, folders of runs, or `run`",
    )
    parser.add_argument(
        "--protocol",
        metavar="NAME",
        help="measure under exactly this protocol of the literature, or refuse; `river protocols` lists them",
    )
    parser.add_argument(
        "--black", type=int, choices=(0, -1), help="black in arrays of floats: 0 of [0, 1], -1 of [-1, 1]"
    )


def dry_run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    """Print the configuration and what would be done; refuse settings that are not those of --protocol."""
    from pipelines.config import dump_config
    from pipelines.evaluation.published import check_settings
    from pipelines.runtime.progress import say
    from pipelines.stages import describe

    if options.protocol:
        check_settings(config)
    say(dump_config(config))
    say(describe(config, run_context.device))


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines import stages
    from pipelines.errors import UserError
    from pipelines.evaluation.comparison import RUN, compare
    from pipelines.evaluation.evaluator import evaluate, evaluate_files, find_networks
    from pipelines.evaluation.prediction_files import export_clips
    from pipelines.evaluation.published import check_protocol, format_published
    from pipelines.prediction.clips import open_clips
    from pipelines.runtime.progress import say

    if options.refine and (options.export_clips or options.predictions):
        raise UserError("--refine: only predictions of runs are refined")
    if options.protocol and options.quick:
        raise UserError(f"--quick: --protocol {options.protocol} has a number of clips: leave out one of them")
    protocol = None
    if options.protocol:
        run_context.strict = True  # without a broken video it would be another set of clips
        if run_context.mirror is not None:
            stages.run_to("videos", config, run_context)
        protocol = check_protocol(config)
        say(f"evaluate: {protocol.name}: {protocol.title}")
    own = not (options.export_clips or options.predictions or options.compare)
    if not options.export_clips:
        find_networks(config, run_context)  # a missing one is reported before a training that may take days
    if own or RUN in (options.compare or []):
        stages.run_to_prediction(config, run_context, options.refine, of_clips=True)
    elif run_context.mirror is not None:
        stages.run_to("videos", config, run_context)
    if options.export_clips:
        clips = open_clips(config, run_context, config.evaluation.videos)
        say(f"evaluate: {export_clips(config, clips, options.export_clips)}")
    elif options.predictions:
        evaluate_files(config, run_context, options.predictions, options.black)
    elif options.compare:
        compare(config, run_context, options.compare, options.black, options.refine)
    elif options.quick:
        fewer = {"videos": min(QUICK_CLIPS, config.evaluation.videos)}
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=fewer)})
        evaluate(config, run_context, options.refine, "evaluation_quick.json")
    else:
        evaluate(config, run_context, options.refine)
    if protocol is not None:
        say(f"\n{format_published(protocol)}")
