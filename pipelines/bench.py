"""`bench`: what store, training and sampling are worth here, as ratios of two things measured in turn, in one run."""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from pipelines.config import RiverConfig
from pipelines.runtime.progress import say
from pipelines.runtime.runs import software_versions
from pipelines.runtime.session import Session


@dataclass(frozen=True)
class Measurement:
    """One line of the table.

    Attributes:
        name: what was measured.
        value, unit: ours.
        reference: what it is held against, in words and numbers; empty where there is nothing.
        ratio: ours to the reference, or the value itself; None where nothing is demanded of it.
        at_least, at_most: what is demanded of the ratio.
    """

    name: str
    value: float
    unit: str
    reference: str = ""
    ratio: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the demand is met; None where there is none."""
        if self.ratio is None:
            return None
        return (self.at_least is None or self.ratio >= self.at_least) and (
            self.at_most is None or self.ratio <= self.at_most
        )


def bench(config: RiverConfig, session: Session) -> list[Measurement]:
    """Measure everything, print the table, and write `benchmark.json` to the run's folder.

    Stores and videos to measure with are made in a temporary folder and removed.
    """
    from pipelines.bench_autoencoder import autoencoder_measurements
    from pipelines.bench_decode import decode_measurements
    from pipelines.bench_encode import encode_measurements
    from pipelines.bench_flow import flow_measurements
    from pipelines.bench_sampling import sampling_measurements
    from pipelines.bench_store import store_measurements

    say(f"bench: {hardware(session.device)}; a few minutes; other work on this machine spoils the numbers")
    results: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="river-bench-") as folder:
        sources: list[Callable[[], Iterator[Measurement]]] = [
            lambda: store_measurements(Path(folder), session.device),
            lambda: flow_measurements(config, session.device),
            lambda: sampling_measurements(config, session.device),
            lambda: autoencoder_measurements(config, session.device),
            lambda: decode_measurements(Path(folder)),
            lambda: encode_measurements(config, session, Path(folder)),
        ]
        for source in sources:
            for measurement in source():
                say(line(measurement))
                results.append(measurement)
    path = config.run_path / "benchmark.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(session.device),
        "software": software_versions(),
        "measurements": [asdict(measurement) | {"reached": measurement.reached} for measurement in results],
    }
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
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


def in_turn(*functions: Callable[[], object], repeats: int) -> list[float]:
    """Least seconds of each function, run in turn so that what disturbs the machine disturbs all of them."""
    least = [float("inf")] * len(functions)
    for _ in range(repeats):
        for number, function in enumerate(functions):
            started = time.perf_counter()
            function()
            least[number] = min(least[number], time.perf_counter() - started)
    return least
