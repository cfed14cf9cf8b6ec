"""`river import-lerobot`: a configuration for a robot data set of LeRobot."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import path

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "check a robot data set in LeRobot's layout, say what is in it, and write configs/<name>.yaml for it"
CONFIG_IS_OPTIONAL = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=path, metavar="FOLDER", help="the data set: it has meta, data and videos")
    parser.add_argument("--camera", help="camera to use, such as observation.images.top; default: the first")
    parser.add_argument("--name", help="name of the configuration; default: that of the folder")


def run(config: RiverConfig | None, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines.data.robot_import import import_lerobot

    import_lerobot(
        options.folder,
        run_context,
        base=options.config,
        camera=options.camera,
        name=options.name,
        writes=not options.dry_run,
    )


dry_run = run
