"""`river distill`: a student that needs one evaluation per frame, as a run beside that of its teacher."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import add_training_options, overrides

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "train a fast student of a flow, which needs one evaluation per frame, as a run called student"
# Sections of the configuration that --restart, --overwrite and --fine-tune take from the file again.
BEGINS_ANEW = ("flow", "distillation", "sampling")
# Settings of the student alone.
OF_STUDENT = ("run", "flow", "distillation")


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


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines import stages
    from pipelines.runtime.run_folder import load_run_config

    of_both = [text for text in overrides(options) if text.partition("=")[0].split(".")[0].strip() not in OF_STUDENT]
    teacher = load_run_config(options.config, [*of_both, f"run={json.dumps(config.distillation.teacher)}"])

    def begin(settings: dict) -> RiverConfig:
        """The configuration of a student that begins, with settings of its teacher."""
        anew = BEGINS_ANEW if run_context.restart else ()
        return load_run_config(options.config, overrides(options), anew, settings)

    stages.run_to_student(config, teacher, run_context, begin)
