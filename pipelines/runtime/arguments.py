"""Pieces of command lines that several commands share."""

import argparse
import os


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    return _integer(text, 1)


def count(text: str) -> int:
    """An argparse type: an integer of at least 0."""
    return _integer(text, 0)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command."""
    parser.add_argument("--config", metavar="YAML", help="a YAML file, or the name of a preset; default shapes")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for example flow.training.steps=1000"
    )
    parser.add_argument("--device", default=os.environ.get("DEVICE") or "auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and what would be done, then stop"
    )
    parser.add_argument("--quiet", action="store_true", help="print errors and warnings only")


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """Options of commands that may read raw videos."""
    parser.add_argument("--strict", action="store_true", help="stop at a broken video instead of skipping it")
    parser.add_argument(
        "--mirror", default=os.environ.get("MIRROR") or None, help="folder or URL that holds the data set's archives"
    )


def add_download_option(parser: argparse.ArgumentParser) -> None:
    """Options of commands that may need public weights."""
    parser.add_argument(
        "--download",
        action="store_true",
        default=os.environ.get("DOWNLOAD", "") not in ("", "0"),
        help="download missing public weights, checked by their sha256",
    )


def add_prerequisite_options(parser: argparse.ArgumentParser) -> None:
    """Options of commands that build missing prerequisites: videos, autoencoder, store, flow."""
    add_video_options(parser)
    add_download_option(parser)
    parser.add_argument(
        "--scheduler",
        default=os.environ.get("SCHEDULER") or None,
        metavar="ADDRESS",
        help="encode on a dask cluster: its scheduler's address, tcp://host:8786",
    )


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Options of commands that train a network."""
    add_prerequisite_options(parser)
    parser.add_argument(
        "--restart", action="store_true", help="train again from step 0; the existing training is moved to a backup"
    )
    parser.add_argument(
        "--resume",
        metavar="CHECKPOINT",
        default="auto",
        help="checkpoint to resume from: auto (the newest whole one), or the step or folder of another",
    )


def add_refine_option(parser: argparse.ArgumentParser) -> None:
    """Options of commands that predict frames."""
    parser.add_argument(
        "--refine", action="store_true", help="refine predicted frames; trains the refiner first if it is missing"
    )


def _integer(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}")
    return number
