"""`demo`: the whole story on one data set, from raw videos to a table and pictures."""

import time
from dataclasses import replace

from pipelines.commands.evaluate import evaluate
from pipelines.commands.report import report
from pipelines.commands.sample import sample
from pipelines.config import RiverConfig
from pipelines.data.datasets import prepare_data
from pipelines.encoding.encode_store import encode
from pipelines.runtime.context import RunContext
from pipelines.runtime.progress import say
from pipelines.training.autoencoder_stage import train_autoencoder
from pipelines.training.flow_stage import train_flow


def demo(config: RiverConfig, run_context: RunContext) -> None:
    """Run every stage in turn; what is done already is recognised."""
    started = time.perf_counter()
    # Training the autoencoder anew makes the store out of date with it.
    run_context = replace(run_context, overwrite=run_context.overwrite or run_context.restart)
    for number, (title, stage) in enumerate(
        (
            ("raw videos", prepare_data),
            ("stage 1: train the autoencoder", train_autoencoder),
            ("stage 1: encode all videos into the store of latents", encode),
            ("stage 2: train the flow, from the store alone", train_flow),
            ("predict videos of the test split", sample),
            ("measure", evaluate),
            ("all of it on one page", report),
        ),
        start=1,
    ):
        begun = time.perf_counter()
        say(f"\n[{number}/7] {title}")
        stage(config, run_context)
        say(f"      {time.perf_counter() - begun:.0f} s")
    folder = config.run_path / "samples"
    say(
        f"\nDone in {(time.perf_counter() - started) / 60:.1f} minutes. Look at\n"
        f"  {folder}/contact_sheet.png   context green, prediction red, above it what really happened\n"
        f"  {folder}/overview.gif        the same, moving\n"
        f"  {config.run_path}/report.html                all of it on one page, opens in any browser\n"
        f"  {config.store_path}          all latents, an ordinary Zarr store"
    )
