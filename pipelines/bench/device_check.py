"""`gpu-check`: whether the device computes what the CPU computes, and how fast it is; `gpu_check.json` and `.md`."""

import itertools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict

from pipelines.bench.benchmark import hardware
from pipelines.bench.comparisons import CheckRow, Story, first_line, run_checks, story_config
from pipelines.bench.flow_speed import predict, random_store, step_seconds
from pipelines.bench.measurement import Benchmark, Measurement
from pipelines.bench.workbench import Workbench
from pipelines.config import RiverConfig, load_config
from pipelines.errors import CheckFailed, StoppedBySignal, UserError
from pipelines.prediction.rollouts import FieldRollouts
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import write_json, write_text
from pipelines.runtime.progress import is_quiet, say, set_quiet
from pipelines.runtime.run_folder import software_versions
from stage2_flow.config import SamplingConfig
from stage2_flow.vector_field import VectorField

# Frames per second of KTH, which a real-time prediction has to reach.
REAL_TIME = 25.0
COMPILED = ", compiled"


@dataclass(frozen=True)
class CheckSizes:
    """Amounts of work. The defaults suit a GPU, with the CPU it is compared to.

    Attributes:
        videos, steps: of the story that is compared, see `story_config`.
        compiles: whether compiled trainings and predictions are compared and measured.
        presets: name -> preset whose sizes are measured; the largest first.
        batches: of the measured training steps.
        frames: per measured prediction.
        seconds: per measurement.
        store_bytes: of the store of random latents that steps are measured on.
    """

    videos: int = 24
    steps: int = 50
    compiles: bool = True
    presets: tuple[tuple[str, str], ...] = (("paper's size", "kth"), ("demo's size", "shapes"))
    batches: tuple[int, ...] = (16, 64, 256)
    frames: int = 16
    seconds: float = 1.0
    store_bytes: int = 20_000_000


# What takes minutes on a CPU and tells nothing about a GPU is left out there.
REHEARSAL = CheckSizes(compiles=False, presets=(("demo's size", "shapes"),), batches=(16,), frames=4)


class GpuCheck(Benchmark):
    """Content of `gpu_check.json`.

    Attributes:
        commit: of the program, where git knows it.
        device: as PyTorch names it.
        seconds: that all took, without the installation.
        checks: in the order in which they were made.
        left_out: what was not measured -> why.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")

    commit: str | None
    device: str
    seconds: float
    checks: list[CheckRow]
    left_out: dict[str, str]

    def table(self) -> str:
        """Both tables in Markdown."""
        versions = ", ".join(f"{name} {version}" for name, version in self.software.items())
        counts = {state: sum(row.state == state for row in self.checks) for state in ("passed", "failed", "skipped")}
        lines = [
            f"{self.hardware}; {versions}; commit {self.commit or 'unknown'}; {self.date}; {self.seconds:.0f} s:",
            ", ".join(f"{count} {state}" for state, count in counts.items()) + ".",
            "",
            "| check | state | measured | bound | why |",
            "|---|---|---|---|---|",
        ]
        for row in self.checks:
            state = "**failed**" if row.state == "failed" else row.state
            lines.append(_row(row.name, state, _number(row.measured), _number(row.bound), row.why))
        lines += ["", "| speed | measured | compared with | ratio |", "|---|---|---|---|"]
        for each in self.measurements:
            lines.append(_row(each.name, f"{each.value:.4g} {each.unit}", each.reference, _number(each.ratio)))
        if self.left_out:
            lines += ["", "Not measured: " + "; ".join(f"{name} ({why})" for name, why in self.left_out.items()) + "."]
        return "\n".join(lines)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def check_device(
    config: RiverConfig, run_context: RunContext, minutes: float, sizes: CheckSizes | None = None
) -> GpuCheck:
    """Compare the device with the CPU, measure its speed; print a table, and write it beside `gpu_check.json`.

    Everything is made in a temporary folder from procedural videos and random weights.

    Args:
        config: its networks are those of the compared story; its run's folder is written to.
        minutes: after which nothing more is measured; all comparisons are made, however long they take.
        sizes: by default those of the device's type.
    Raises:
        CheckFailed: a deviation outside its bound, or an exception in a check; the files are written.
        UserError: the machine has a GPU that PyTorch cannot use, and nobody asked for a rehearsal.
    """
    started, device = time.perf_counter(), run_context.device
    if device.type == "cpu" and run_context.asked_device == "auto" and (driver := driver_version()) is not None:
        raise UserError(
            f"this machine has an NVIDIA driver, version {driver}, but torch {torch.__version__} finds no GPU: install "
            "a build of torch for that driver (pip's --index-url https://download.pytorch.org/whl/..., or remove .venv "
            "and `make setup TORCH_INDEX=...`), or rehearse with --device cpu"
        )
    sizes = sizes or (CheckSizes() if device.type == "cuda" else REHEARSAL)
    if device.type == "cuda":  # read when cuBLAS starts: without it, its sums have no fixed order
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    rehearsal = "" if device.type == "cuda" else "; a rehearsal: the CPU is compared with itself"
    say(f"gpu-check: {hardware(device)}{rehearsal}")
    checks: list[CheckRow] = []
    measurements: list[Measurement] = []
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="river-gpu-check-") as name:
        folder = Path(name)
        story_of = story_config(config, folder, videos=sizes.videos, steps=sizes.steps)
        rows = run_checks(Story(story_of, device, sizes.compiles))
        for row in _quietly(rows):
            say(f"  {row.state:8} {_number(row.measured):>9} {_number(row.bound):>9}  {row.name}")
            checks.append(row)
        for measurement in _quietly(speeds(run_context, folder, sizes, started + 60 * minutes, left_out)):
            say(measurement.line())
            measurements.append(measurement)
    result = GpuCheck(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=hardware(device),
        software=software_versions() | gpu_versions(device),
        commit=commit(),
        device=str(device),
        seconds=time.perf_counter() - started,
        checks=checks,
        measurements=measurements,
        left_out=left_out,
    )
    path = config.run_path / "gpu_check.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    write_text(path.with_suffix(".md"), result.table() + "\n")
    say(f"\n{result.table()}\n\ngpu-check: {path} and {path.with_suffix('.md').name}")
    if failed := [row.name for row in checks if row.state == "failed"]:
        raise CheckFailed(f"{len(failed)} of {len(checks)} checks failed, see {path}: {'; '.join(failed)}")
    return result


def _quietly(rows: Iterator[Any]) -> Iterator[Any]:
    """The rows, while nothing is printed about how they are made."""
    before = is_quiet()
    while True:
        set_quiet(True)
        try:
            row = next(rows)
        except StopIteration:
            return
        finally:
            set_quiet(before)
        yield row


def speeds(
    run_context: RunContext, folder: Path, sizes: CheckSizes, deadline: float, left_out: dict[str, str]
) -> Iterator[Measurement]:
    """Training steps and predictions of one clip, eager ones first, until the deadline.

    Args:
        left_out: gets what was not measured, and why.
    """
    rates: dict[str, float] = {}
    for name, unit, measure in _speed_jobs(run_context, folder, sizes):
        if time.perf_counter() > deadline:
            left_out[name] = "out of time"
            continue
        try:
            rates[name] = rate = measure()
        except StoppedBySignal:
            raise
        except Exception as error:
            left_out[name] = first_line(error)
            continue
        finally:
            if name.endswith(COMPILED):
                torch.compiler.reset()  # a compiled method is compiled again at most eight times
        if (eager := rates.get(name.removesuffix(COMPILED), rate)) != rate:
            yield Measurement(name, rate, unit, f"eager: {eager:.4g}", rate / eager)
        elif unit == "frames/s":
            yield Measurement(name, rate, unit, f"real time: {REAL_TIME:g}", rate / REAL_TIME)
        else:
            yield Measurement(name, rate, unit)


def _speed_jobs(
    run_context: RunContext, folder: Path, sizes: CheckSizes
) -> Iterator[tuple[str, str, Callable[[], float]]]:
    """Name, unit, and what measures the rate."""
    benches, stores = {}, {}
    for size, preset in sizes.presets:
        place = folder / preset
        place.mkdir(exist_ok=True)
        benches[size] = bench = Workbench(
            load_config(preset), run_context, place, seconds=sizes.seconds, store_bytes=sizes.store_bytes
        )
        stores[size] = cache(lambda bench=bench: random_store(bench))
    for compiled in (False, True) if sizes.compiles else (False,):
        word = COMPILED if compiled else ""
        for (size, bench), (solver, nfe) in itertools.product(benches.items(), (("euler", 4), ("midpoint", 8))):
            options = SamplingConfig(solver=solver, nfe=nfe, batch_size=1, compile=compiled)
            yield (
                f"latents of 1 clip, {size}, {solver}, {nfe} NFE{word}",
                "frames/s",
                partial(prediction_rate, bench, options, sizes.frames),
            )
        for (size, bench), batch, precision in itertools.product(benches.items(), sizes.batches, ("fp32", "bf16")):
            training = {"batch_size": batch, "precision": precision, "compile": compiled}
            yield (
                f"flow step, {size}, batch {batch}, {precision}{word}",
                "steps/s",
                lambda size=size, bench=bench, training=training: 1 / step_seconds(bench, stores[size](), **training),
            )


def prediction_rate(bench: Workbench, options: SamplingConfig, frames: int) -> float:
    """Frames of latents per second that are predicted for one clip, from random weights; draws are included."""
    torch.manual_seed(0)
    field = VectorField(bench.config.flow.model, bench.latent_shape[0]).to(bench.device).eval().requires_grad_(False)
    rollouts = FieldRollouts(field, bench.device)
    context = torch.randn(1, 10, *bench.latent_shape, device=bench.device)
    (seconds,) = bench.in_turn(lambda: predict(rollouts, context, frames, options))
    return frames / seconds


def gpu_versions(device: torch.device) -> dict[str, str]:
    """Versions of CUDA and of the driver; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {"CUDA": str(torch.version.cuda), "driver": driver_version() or "unknown"}


def driver_version() -> str | None:
    """Of NVIDIA's driver; None without one."""
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def commit() -> str | None:
    """The commit of this program, with a + if files were changed; None outside a git checkout."""
    here = str(Path(__file__).parent)
    if _output("git", "-C", here, "ls-files", "--error-unmatch", __file__) is None:
        return None  # installed into the folder of another project
    found = _output("git", "-C", here, "rev-parse", "--short", "HEAD")
    return found and found + (
        "+" if _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no") else ""
    )


def _output(*words: str) -> str | None:
    """The first line that a program prints; None if it fails or does not exist."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip()
