"""All benchmarks of one run: measure, print the table, write `benchmark.json`."""

import os
import platform
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pipelines.bench.autoencoder_speed import autoencoder_measurements
from pipelines.bench.flow_speed import flow_measurements, sampling_measurements
from pipelines.bench.frame_speed import frame_measurements
from pipelines.bench.measurement import Benchmark, Measurement
from pipelines.bench.video_speed import decode_measurements, encode_measurements
from pipelines.bench.workbench import Workbench
from pipelines.config import RiverConfig
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import write_json
from pipelines.runtime.progress import say
from pipelines.runtime.run_folder import software_versions

SUBJECTS = (
    flow_measurements,
    sampling_measurements,
    frame_measurements,
    autoencoder_measurements,
    decode_measurements,
    encode_measurements,
)


def run_benchmark(config: RiverConfig, run_context: RunContext, **sizes: Any) -> Benchmark:
    """Measure everything, print the table, and write `benchmark.json` to the run's folder.

    Stores and videos are made in a temporary folder and removed; networks have random weights.

    Args:
        sizes: fields of `Workbench`; without them enough work for stable numbers, a few minutes.
    """
    machine = hardware(run_context.device)
    say(f"bench: {machine}; takes a few minutes; other programs on this machine distort the numbers")
    measurements: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="river-bench-") as folder:
        bench = Workbench(config, run_context, Path(folder), **sizes)
        for subject in SUBJECTS:
            for measurement in subject(bench):
                say(measurement.line())
                measurements.append(measurement)
    benchmark = Benchmark(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=machine,
        software=software_versions(),
        measurements=measurements,
    )
    path = config.run_path / "benchmark.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, benchmark)
    missed = [measurement.name for measurement in measurements if measurement.reached is False]
    say(f"bench: wrote {path}" + (f"; outside the required range: {', '.join(missed)}" if missed else ""))
    return benchmark


def hardware(device: torch.device) -> str:
    """The machine in words."""
    name = platform.machine()
    try:
        rows = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((row.partition(":")[2].strip() for row in rows if row.startswith("model name")), name)
    except OSError:
        pass  # not Linux
    cpu = f"{len(os.sched_getaffinity(0))} cores of {name}"
    return f"{torch.cuda.get_device_name(device)}, {cpu}" if device.type == "cuda" else cpu
