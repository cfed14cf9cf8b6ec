"""`river distill`: a student that needs one evaluation per frame, as a run beside that of its teacher."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from pipelines.runtime.arguments import add_training_options, overrides

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "train a fast student of a flow, which needs one evaluation per frame, as a run called student"
# Sections of the configuration that --restart, --overwrite and --fine-tune take from the file again.
BEGINS_ANEW = ("flow", "distillation", "sampling")
# Settings of the student alone. Its network is the teacher's.
OF_STUDENT = ("run", "flow.training", "distillation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_options(parser)
    parser.set_defaults(set=['run="student"'])
    parser.add_argument(
        "--teacher",
        dest="set",
        action="append",
        type=lambda name: f"distillation.teacher={json.dumps(name)}",
        metavar="NAME",
        help="the run whose flow is the teacher; default: the data set's default run",
    )


def dry_run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    """Print the configuration of the student, how far it is, and how far its teacher is."""
    from pipelines import stages
    from pipelines.config import dump_config
    from pipelines.runtime.progress import say

    config, teacher = stages.preview_student(config, *_teacher(config, run_context, options), run_context)
    say(dump_config(config))
    say(stages.describe(config, run_context.device))
    say(teacher)


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines import stages

    stages.run_to_student(config, *_teacher(config, run_context, options), run_context)


def _teacher(
    config: RiverConfig, run_context: RunContext, options: argparse.Namespace
) -> tuple[RiverConfig, Callable[[dict[str, Any]], RiverConfig]]:
    """The configuration of the teacher's run, and how that of a student that begins follows from its settings."""
    from pipelines.runtime.run_folder import load_run_config

    sets = overrides(options)
    of_both = [text for text in sets if not text.strip().startswith(OF_STUDENT)]
    name = f"run={json.dumps(config.distillation.teacher)}"
    anew = BEGINS_ANEW if run_context.restart else ()
    return load_run_config(options.config, [*of_both, name]), partial(load_run_config, options.config, sets, anew)
