"""`bench`: what store, training and sampling are worth here, as ratios of two things measured in turn, in one run."""

import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch

from pipelines.bench.measurement import Benchmark, Measurement
from pipelines.config import RiverConfig
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import write_json
from pipelines.runtime.progress import say
from pipelines.runtime.runs import software_versions


def bench(config: RiverConfig, run_context: RunContext) -> list[Measurement]:
    """Measure everything, print the table, and write `benchmark.json` to the run's folder.

    Stores and videos to measure with are made in a temporary folder and removed.
    """
    from pipelines.bench.autoencoder_speed import autoencoder_measurements
    from pipelines.bench.decode_speed import decode_measurements
    from pipelines.bench.encode_speed import encode_measurements
    from pipelines.bench.flow_speed import flow_measurements
    from pipelines.bench.sampling_speed import sampling_measurements
    from pipelines.bench.store_speed import store_measurements

    say(f"bench: {hardware(run_context.device)}; a few minutes; other work on this machine spoils the numbers")
    results: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="river-bench-") as folder:
        sources: list[Callable[[], Iterator[Measurement]]] = [
            lambda: store_measurements(Path(folder), run_context.device),
            lambda: flow_measurements(config, run_context.device),
            lambda: sampling_measurements(config, run_context.device),
            lambda: autoencoder_measurements(config, run_context.device),
            lambda: decode_measurements(Path(folder)),
            lambda: encode_measurements(config, run_context, Path(folder)),
        ]
        for source in sources:
            for measurement in source():
                say(line(measurement))
                results.append(measurement)
    path = config.run_path / "benchmark.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=hardware(run_context.device),
        software=software_versions(),
        measurements=results,
    )
    write_json(path, benchmark)
    missed = [measurement.name for measurement in results if measurement.reached is False]
    say(f"bench: written to {path}" + (f"; below what is wanted: {', '.join(missed)}" if missed else ""))
    return results


def line(measurement: Measurement) -> str:
    """A row of the table."""
    wanted = ""
    if measurement.at_least is not None:
        wanted = f"wanted >= {measurement.at_least:g}"
    elif measurement.at_most is not None:
        wanted = f"wanted <= {measurement.at_most:g}"
    if measurement.reached is False:
        wanted += "  NOT REACHED"
    ratio = "" if measurement.ratio is None else f"{measurement.ratio:.3g}"
    value = f"{measurement.value:.4g} {measurement.unit}"
    return f"  {measurement.name:<46} {value:<22} {measurement.reference:<44} {ratio:>8}  {wanted}".rstrip()


def hardware(device: torch.device) -> str:
    """The machine in words."""
    names = [row.partition(":")[2].strip() for row in _cpu_information() if row.startswith("model name")]
    cpu = f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"
    return f"{torch.cuda.get_device_name(device)}, {cpu}" if device.type == "cuda" else cpu


def _cpu_information() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
