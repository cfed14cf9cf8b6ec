"""This machine and this folder in a screen of text, for bug reports."""

import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import torch

import latent_cache
from latent_cache import StoreError
from pipelines import __version__
from pipelines.bench.benchmark import hardware
from pipelines.bench.device_check import commit, gpu_versions
from pipelines.config import PathsConfig
from pipelines.errors import UserError
from pipelines.evaluation.measures.networks import I3D, VGG16
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.files import free_bytes, size_text, stored_bytes
from pipelines.runtime.run_folder import describe_progress, software_versions

PROJECT = "river-two-stage"
# They change how fast this program is, or what it finds.
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TORCH_HOME", "DEVICE", "WORLD_SIZE")
MOST_LINES = 12  # of runs, and of stores


def describe_machine(paths: PathsConfig, device: torch.device) -> Iterator[str]:
    """Lines about versions, devices, disks, extras and weights, then about data sets, stores and runs.

    Whatever is damaged is described as damaged.

    Args:
        device: where networks would run.
    """
    versions = software_versions() | gpu_versions(device)
    yield f"river      {__version__}" + (f", commit {found}" if (found := commit()) else "")
    yield f"software   {', '.join(f'{name} {version}' for name, version in versions.items())}"
    yield f"system     {platform.platform()}"
    yield f"device     {device}: {hardware(device)}, {size_text(_memory())} of memory"
    yield f"threads    {torch.get_num_threads()} of torch; {_products()}"
    if named := [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]:
        yield f"variables  {', '.join(named)}"
    yield f"extras     {', '.join(_extras())}"
    weights = [f"{file.name} {'is there' if file.path.exists() else 'missing'}" for file in (VGG16, I3D)]
    yield f"weights    {', '.join(weights)} ({VGG16.path.parent})"
    roots = (paths.data, paths.latents, paths.runs)
    yield f"free       {', '.join(f'{root} {size_text(free_bytes(Path(root)))}' for root in roots)}"
    yield f"folder     {Path.cwd()}"
    names = sorted(path.name for path in Path(paths.data).glob("*") if path.is_dir())
    yield f"  {paths.data}: {', '.join(names) or 'nothing'}"
    yield from _shortened([_store_line(store) for store in sorted(Path(paths.latents).glob("*.zarr"))])
    runs = sorted({file.parent for depth in ("*", "*/*") for file in Path(paths.runs).glob(f"{depth}/config.yaml")})
    yield from _shortened([_run_line(run) for run in runs])


def without_home(text: str) -> str:
    """A text in which the user's home folder is `~`."""
    return re.sub(rf"{re.escape(str(Path.home()))}(?=/|\b)", "~", text)


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _products() -> str:
    """The vector instructions that torch uses, and whether the processor multiplies bf16 by itself."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    native = [name for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16") if known.get(name)]
    return f"{torch.backends.cpu.get_cpu_capability()}, bf16 {'native: ' + ', '.join(native) if native else 'emulated'}"


def _extras() -> Iterator[str]:
    """Extras of this package, and which of their packages are missing."""
    try:
        required = importlib.metadata.requires(PROJECT) or []
    except importlib.metadata.PackageNotFoundError:
        yield "unknown, since the package is not installed"
        return
    packages: dict[str, list[str]] = {}
    for line in required:
        if match := re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", line):
            packages.setdefault(match[2], []).append(match[1])
    for extra, names in packages.items():
        missing = [name for name in names if not _is_installed(name)]
        yield f"{extra}: {'not ' + ', '.join(missing) if missing else 'yes'}"


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _shortened(lines: list[str]) -> list[str]:
    left_out = len(lines) - MOST_LINES
    return lines if left_out <= 0 else [*lines[:MOST_LINES], f"  and {left_out} more"]


def _store_line(store: Path) -> str:
    try:
        if not latent_cache.is_complete(store):
            return f"  {store}: not complete"
        caches = [latent_cache.open(store, split) for split in latent_cache.splits(store)]
    except StoreError as error:
        return f"  {error}"
    videos, frames = (sum(numbers) for numbers in zip(*((len(c.video_ids), c.frames) for c in caches), strict=True))
    return f"  {store}: {videos} videos, {frames} frames, {size_text(stored_bytes(store))}"


def _run_line(run: Path) -> str:
    trained = []
    for folder in sorted(run.glob("*/checkpoints")):
        try:
            newest = CheckpointFolder(folder).latest(warns=False)
            text = "no whole checkpoint" if newest is None else describe_progress(newest)
        except UserError as error:
            text = str(error)
        trained.append(f"{folder.parent.name} {text}")
    return f"  {run}: {', '.join(trained) or 'nothing is trained'}"
