"""`river convert`: write the frames of any data set as folders of pictures."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import add_video_options, path, positive

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "write the frames of any data set as folders of pictures: <out>/<split>/<video>/<frame>.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_video_options(parser)
    parser.add_argument("--out", type=path, required=True, help="folder to write to")
    parser.add_argument("--format", choices=("png", "jpg"), default="png", help="format of the pictures")
    parser.add_argument("--quality", type=positive, default=95, help="quality of jpg pictures, at most 100")
    parser.add_argument(
        "--split", action="append", choices=("train", "val", "test"), help="only this split; repeatable"
    )
    parser.add_argument("--videos", type=positive, help="limit per split")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that were written differently")


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines.data.frame_folders import convert

    convert(
        config,
        run_context,
        options.out,
        image_format=options.format,
        splits=options.split,
        quality=options.quality,
        videos=options.videos,
    )
