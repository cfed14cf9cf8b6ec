"""`river clean`: say what can be removed, and remove it if asked to."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "list what killed commands left, and caches, with sizes; --run NAME: a whole run instead; --yes removes it"
LISTS_BY_DEFAULT = True  # so it needs no other --dry-run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yes", action="store_true", help="remove what is listed; without it nothing is removed")
    parser.add_argument("--backups", action="store_true", help="list backups of trainings instead")
    parser.add_argument("--latents", action="store_true", help="list the store of latents instead")


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines.upkeep.cleaning import clean

    named = {
        "--run": any(text.partition("=")[0].strip() == "run" for text in options.set),
        "--backups": options.backups,
        "--latents": options.latents,
    }
    chosen = [option for option, is_named in named.items() if is_named]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)}: clean one after the other")
    kind = chosen[0].removeprefix("--") if chosen else "leftovers"
    clean(config, kind, remove_it=options.yes and not options.dry_run)
