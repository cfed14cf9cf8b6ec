"""`river import-official`: turn official weights into a run that is ready to sample."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import add_download_option, path, positive

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "official RIVER weights -> a run that is ready to sample"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_download_option(parser)
    parser.add_argument("--model", type=path, help="the main model, model.pth")
    parser.add_argument("--autoencoder", type=path, help="vqvae.ckpt or vqvae.pth; one inside the model wins")
    parser.add_argument("--refiner", type=path, help="a refiner's .pth")
    parser.add_argument(
        "--heads",
        type=positive,
        default=8,
        help="attention heads of the model, which its file does not tell; default 8",
    )
    parser.add_argument("--restart", action="store_true", help="move a training that is in the way to a backup folder")


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines.config import preset_folders
    from pipelines.official.importing import import_official
    from pipelines.official.parts import OfficialFiles

    files = OfficialFiles(options.model, options.autoencoder, options.refiner)
    import_official(config, run_context, files, preset_folders(options.config), heads=options.heads)
