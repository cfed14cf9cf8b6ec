"""`river demo`: the whole story on one data set, from raw videos to a table and pictures."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from pipelines.runtime.arguments import add_prerequisite_options

if TYPE_CHECKING:
    from pipelines.config import RiverConfig
    from pipelines.runtime.context import RunContext

HELP = "the whole story on one data set: videos, autoencoder, store, flow, prediction, metrics"
# Sections of the configuration that --restart, --overwrite and --fine-tune take from the file again.
BEGINS_ANEW = ("seed", "dataset", "autoencoder", "cache", "flow")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_prerequisite_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a store that contradicts the configuration")
    parser.add_argument(
        "--restart", action="store_true", help="train and encode again; existing trainings are moved to a backup"
    )


def run(config: RiverConfig, run_context: RunContext, options: argparse.Namespace) -> None:
    from pipelines import stages
    from pipelines.evaluation.evaluator import evaluate
    from pipelines.prediction.clips import check_clips
    from pipelines.report.page import write_report
    from pipelines.runtime.progress import say
    from pipelines.sampling.continuation import sample_clips

    def raw_videos() -> None:
        stages.run_to("videos", config, run_context)
        check_clips(config)  # before a training that may take days

    started = time.perf_counter()
    # A store of the former autoencoder would contradict the one that is trained again.
    run_context = replace(run_context, overwrite=run_context.overwrite or run_context.restart)
    chapters: list[tuple[str, Callable[[], object]]] = [
        ("raw videos", raw_videos),
        ("stage 1: train the autoencoder", lambda: stages.run_to("autoencoder", config, run_context)),
        ("stage 1: encode all videos into the store", lambda: stages.run_to("store", config, run_context)),
        ("stage 2: train the flow, from the store alone", lambda: stages.run_to("flow", config, run_context)),
        ("choose the sampler, on validation clips", lambda: stages.run_to("sampler", config, run_context)),
        ("predict videos of the test split", lambda: sample_clips(config, run_context)),
        ("measure", lambda: evaluate(config, run_context)),
        ("write the report", lambda: write_report(config)),
    ]
    for number, (title, chapter) in enumerate(chapters, start=1):
        begun = time.perf_counter()
        say(f"\n[{number}/{len(chapters)}] {title}")
        chapter()
        say(f"      {time.perf_counter() - begun:.0f} s")
    folder = config.run_path / "samples"
    say(
        f"\nDone in {(time.perf_counter() - started) / 60:.1f} minutes. Look at\n"
        f"  {folder}/contact_sheet.png   given frames green, predicted frames red, the true frames above\n"
        f"  {folder}/overview.gif        the same, moving\n"
        f"  {config.run_path}/report.html                everything on one page, opens in any browser\n"
        f"  {config.store_path}          all latents, an ordinary Zarr store"
    )
