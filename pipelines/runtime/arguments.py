"""Pieces of command lines that several commands share."""

import argparse
import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from pipelines.errors import UserError

# A year.
MOST_MINUTES = 525_600


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    return _integer(text, 1)


def count(text: str) -> int:
    """An argparse type: an integer of at least 0."""
    return _integer(text, 0)


def minutes(text: str) -> float:
    """An argparse type: minutes, more than 0 and at most a year."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= MOST_MINUTES:
        raise argparse.ArgumentTypeError(f"expected minutes, more than 0 and at most {MOST_MINUTES}, got {text!r}")
    return number


def path(text: str) -> Path:
    """An argparse type: a file or folder. `~` arrives as it is in values that `make` passes on."""
    return Path(os.path.expanduser(text))


def yes_or_no(text: str) -> bool:
    """An argparse type: yes, true, on, 1, or no, false, off, 0 and nothing."""
    answers = dict.fromkeys(("yes", "true", "on", "1"), True) | dict.fromkeys(("no", "false", "off", "0", ""), False)
    if text.strip().lower() not in answers:
        raise argparse.ArgumentTypeError(f"expected yes or no, got {text!r}")
    return answers[text.strip().lower()]


def refuse_unknown_words(
    words: Sequence[str], parser: argparse.ArgumentParser, parsers: Mapping[str, argparse.ArgumentParser]
) -> None:
    """Exit for a command or an option that does not exist, with the nearest one that does."""
    command = words[0] if words else "-"
    if command not in parsers and not command.startswith("-"):
        parser.error(f"argument COMMAND: invalid choice: {command!r}{_nearest(command, parsers)}")
    used = parsers.get(command, parser)
    known = ["--help", *re.findall(r"--[a-z-]+", used.format_usage())]
    for word in takewhile(lambda word: word != "--", words):
        option = word.partition("=")[0]
        if re.match(r"--?[A-Za-z]", option) and option not in ("-h", *known):
            used.error(f"unrecognized arguments: {word}{_nearest('--' + option.lstrip('-'), known)}")


def _nearest(word: str, known: Iterable[str]) -> str:
    """The nearest known word as a question; all of them if none is near."""
    known = list(dict.fromkeys(known))
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command."""
    parser.add_argument("--config", metavar="YAML", help="a YAML file, or the name of a preset; default shapes")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for example flow.training.steps=1000"
    )
    parser.add_argument(
        "--run",
        dest="set",
        action="append",
        type=lambda name: f"run={json.dumps(name)}",
        metavar="NAME",
        help="a further run on the same store and autoencoder: its flow and results are in <runs>/<dataset>/NAME",
    )
    parser.add_argument("--device", default=os.environ.get("DEVICE") or "auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="threads of PyTorch on a CPU; default: all cores, and for predictions as many as are fastest now",
    )
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
    download = parser.add_argument(
        "--download",
        action="store_const",
        const=True,
        default=os.environ.get("DOWNLOAD", ""),
        help="download missing public weights, checked by their sha256",
    )
    download.type = yes_or_no  # of the environment's word


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
        "--minutes",
        type=minutes,
        dest="training_minutes",
        metavar="M",
        help="train for this time: the number of steps is measured at the start, and kept when it is resumed",
    )
    parser.add_argument(
        "--resume",
        type=os.path.expanduser,
        metavar="CHECKPOINT",
        default="auto",
        help="checkpoint to resume from: auto (the newest whole one), or the step or folder of another",
    )


def overrides(options: argparse.Namespace) -> list[str]:
    """The `--set` options of a command, and what its other options set; the later ones win.

    Raises:
        UserError: `--minutes` and a number of steps; no such `--protocol`.
    """
    asked = getattr(options, "training_minutes", None)
    if (protocol := getattr(options, "protocol", None)) is not None:
        from pipelines.config import find_protocol  # takes time, and most commands need none

        settings = {"protocol": protocol} | find_protocol(protocol).settings
        return [*(f"evaluation.{key}={json.dumps(value)}" for key, value in settings.items()), *options.set]
    if asked is None:
        return options.set
    section = "flow" if options.command == "distill" else options.command.removeprefix("train-")
    key = f"{section}.training.steps"
    for text in options.set:
        if text.partition("=")[0].strip() == key:
            raise UserError(f"--minutes {asked:g} decides how many steps, and so does --set {text}: use one")
    return [*options.set, f"{key}=null"]


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Options of commands that serve a page."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine alone")
    parser.add_argument("--port", type=count, default=0, help="port to listen on; default: any free one")
    parser.add_argument("--no-browser", action="store_true", help="print the page's address, open no browser")


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
