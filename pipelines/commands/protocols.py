"""`river protocols`: how papers evaluate, side by side."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "list the protocols of the literature side by side, or show one with the numbers it can be compared with"
CONFIG_IS_OPTIONAL = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("protocol_name", nargs="?", metavar="NAME", help="show this one, by its name or its file")


def run(config: RiverConfig | None, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines.config import find_protocol, protocol_files
    from pipelines.evaluation.published import format_protocol, format_protocols
    from pipelines.runtime.progress import say

    if options.protocol_name is not None:
        say(format_protocol(find_protocol(options.protocol_name)))
    else:
        say(format_protocols(find_protocol(name) for name in protocol_files()))
