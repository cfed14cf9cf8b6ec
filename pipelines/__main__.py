"""The command line: `python -m pipelines COMMAND --config configs/<dataset>.yaml` (installed as `river`)."""

import argparse
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType

from pipelines import __version__
from pipelines.commands import COMMANDS
from pipelines.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_SKIPPED,
    EXIT_USAGE,
    CheckFailed,
    InputUnreadable,
    Interrupted,
    StoppedBySignal,
    UserError,
)
from pipelines.runtime.arguments import add_common_options, overrides, refuse_unknown_words
from pipelines.runtime.signals import Interrupts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a user's errors end in one clear message and an exit code.

    Returns:
        0 done; 1 failed; 2 bad usage, configuration or input; 3 some videos were skipped, or could not be read and are
        tried again by the next call; 128 + signal.
    """
    try:
        with Interrupts():
            return _main(sys.argv[1:] if arguments is None else arguments)
    except Interrupted as stopped:  # before the command began
        return 128 + stopped.signal_number
    except BrokenPipeError:  # of the parser, which prints a usage
        return 128 + signal.SIGPIPE
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # Python would try again when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _main(arguments: Sequence[str]) -> int:
    # Closed ones are None, and their descriptors would be those of the next files that are opened.
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a console need not have all characters
    os.environ["MPLBACKEND"] = "agg"  # charts go into files; a notebook's own backend may be missing here
    command, options = _parse(arguments)
    # These imports take seconds: not before the command line is known to be right.
    from latent_cache import NoSpaceError, StoreError
    from pipelines.runtime.progress import say_error
    from stage1_autoencoder.videos.source import VideoError

    name = options.command
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        name += f" [process {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']}]"
    try:
        return _run(command, options)
    except (NoSpaceError, CheckFailed, OSError) as error:
        say_error(f"{name}: {error}")
        return EXIT_FAILED
    except (UserError, StoreError, VideoError) as error:
        say_error(f"{name}: {error}")
        return EXIT_USAGE
    except InputUnreadable as error:
        say_error(f"{name}: {error}")
        return EXIT_SKIPPED
    except StoppedBySignal as stopped:
        say_error(f"{name}: {stopped}")
        return 128 + stopped.signal_number
    except KeyboardInterrupt as stopped:
        say_error(f"{name}: interrupted; finished work is kept, the same command resumes")
        return 128 + (stopped.signal_number if isinstance(stopped, Interrupted) else signal.SIGINT)


def _parse(arguments: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """The command's module and its options; wrong usage exits with that command's usage line."""
    parser = argparse.ArgumentParser(
        prog="river",
        description="Video prediction by latent flow matching, in two stages around a Zarr store of latents.",
        epilog="Begin with `river sample --run shapes-small`, with a trained model, or with `river demo`, which trains "
        "one. Exit codes: 0 done, 1 failed, 2 bad usage or input, 3 videos were skipped or unreadable, "
        "129/130/143 stopped by a signal after saving.",
    )
    parser.add_argument("--version", action="version", version=f"river {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {name: importlib.import_module(f"pipelines.commands.{name.replace('-', '_')}") for name in COMMANDS}
    parsers = {}
    for name, module in modules.items():
        parsers[name] = subparsers.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        add_common_options(parsers[name])
        module.add_arguments(parsers[name])
    if not arguments:
        parser.print_help(sys.stderr)
        raise SystemExit(EXIT_USAGE)
    refuse_unknown_words(arguments, parser, parsers)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parsers[options.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    options.parser, options.parsers = parser, parsers  # for `completion`
    return modules[options.command], options


def _run(command: ModuleType, options: argparse.Namespace) -> int:
    from pipelines.config import dump_config, find_preset
    from pipelines.runtime.context import RunContext
    from pipelines.runtime.distributed import leave_processes
    from pipelines.runtime.progress import say, say_error, set_quiet
    from pipelines.runtime.run_folder import load_run_config
    from pipelines.sharing.bundled_models import with_bundled_run

    run_context = RunContext.from_options(options)
    processes = run_context.processes
    set_quiet(options.quiet or not processes.is_first)
    config = None
    is_optional = getattr(command, "config_is_optional", lambda _: getattr(command, "CONFIG_IS_OPTIONAL", False))
    if options.config is not None or not is_optional(options):
        if options.config is None:
            say(f"configuration: {find_preset('shapes')} (--config NAME takes another preset or file)")
            options.config = "shapes"
        anew = getattr(command, "BEGINS_ANEW", ()) if run_context.begins_anew else ()
        copies = not (options.dry_run or getattr(command, "LISTS_BY_DEFAULT", False))
        with processes.sharing_failures(), processes.first_before_others():
            changes = with_bundled_run(options.config, overrides(options), copies=copies)
        config = load_run_config(options.config, changes, anew)
    if options.dry_run and config is not None and not getattr(command, "LISTS_BY_DEFAULT", False):
        if hasattr(command, "dry_run"):
            command.dry_run(config, run_context, options)
        else:
            from pipelines.stages import describe

            say(dump_config(config))
            say(describe(config, run_context.device))
        return EXIT_DONE
    with processes.sharing_failures():
        command.run(config, run_context, options)
    leave_processes()
    if run_context.skipped and processes.is_first:
        say_error(f"{options.command}: finished; {len(run_context.skipped)} video(s) were skipped:")
        for video_id, reason in list(run_context.skipped.items())[:20]:
            say_error(f"  {video_id}: {reason}")
        # torchrun takes every code but 0 for a crash.
        return EXIT_SKIPPED if processes.count == 1 else EXIT_DONE
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
