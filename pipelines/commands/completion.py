"""`river completion`: a script that lets a shell complete commands, options and files."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = 'print completions for a shell: eval "$(river completion bash)" in ~/.bashrc'
CONFIG_IS_OPTIONAL = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def run(config: RiverConfig | None, run_context: RunContext, options: argparse.Namespace) -> None:
    import shtab

    for parser in options.parsers.values():
        for action in parser._actions:
            if action.nargs != 0 and action.choices is None:
                action.complete = shtab.FILE
    print(shtab.complete(options.parser, options.shell))
