"""Options of a command besides its configuration, the videos it skipped, its device, threads and precision."""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from pipelines.errors import UserError
from pipelines.runtime.distributed import ALONE, Processes, join_processes
from pipelines.runtime.progress import say
from stage1_autoencoder.precision import float32_products
from stage2_flow.config import SamplingConfig

# Seconds that measuring numbers of threads takes, and the size of work that is measured, by one thread.
THREADS_MEASURED, THREADS_WORK = 0.3, 0.1
# Times as long with fewer threads that are taken all the same: they leave cores to others.
FEWER_THREADS = 1.1

Method, Result = ParamSpec("Method"), TypeVar("Result")


@dataclass
class RunContext:
    """One command of a user.

    Attributes:
        device: where networks run.
        threads: of a CPU, as the user says; None: rollouts measure how many are fastest, all else uses all cores.
        strict: a broken video stops the command (exit code 2) instead of being skipped (exit code 3).
        overwrite: replace a store that conflicts with the configuration.
        restart: train again from step 0; the existing training is moved to a backup folder.
        resume: checkpoint to resume from: `auto` (the newest whole one), or its step or folder.
        fine_tune: `train-flow` starts from the weights of the existing flow.
        training_minutes: that the training of the command takes, if it begins; None: as its configuration says.
        mirror: a folder or URL that holds the data set's archives.
        scheduler: address of the dask scheduler whose workers encode; None: this process does.
        download: download missing public weights; without it nothing but `data` uses the network.
        processes: all processes of this training.
        asked_device: what the user asked for; with `auto` each cluster worker finds its own.
        skipped: broken videos, id -> reason.
    """

    device: torch.device
    threads: int | None = None
    strict: bool = False
    overwrite: bool = False
    restart: bool = False
    resume: str = "auto"
    fine_tune: bool = False
    training_minutes: float | None = None
    mirror: str | None = None
    scheduler: str | None = None
    download: bool = False
    processes: Processes = ALONE
    asked_device: str = "auto"
    skipped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> "RunContext":
        """From a parsed command line, whose command need not have all options; joins torchrun's processes.

        Raises:
            UserError: no such device on this machine.
            ConnectionError, TimeoutError: another process failed, or did not start.
        """
        processes = join_processes()
        with processes.sharing_failures():
            device = processes.own_device(resolve_device(options.device))
            processes.connect(device)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        taken = (
            "threads",
            "strict", "overwrite", "restart", "resume", "fine_tune", "training_minutes",
            "mirror", "scheduler", "download",
        )  # fmt: skip
        given = {name: getattr(options, name) for name in taken if hasattr(options, name)}
        return cls(device=device, processes=processes, asked_device=options.device, **given)

    @property
    def asks_for_more(self) -> bool:
        """Whether a stage is asked to replace or redo something instead of finishing what is left."""
        return self.begins_anew or self.resume != "auto"

    @property
    def begins_anew(self) -> bool:
        """Whether a stage is asked to replace what is there, by the configuration's settings."""
        return self.overwrite or self.restart or self.fine_tune

    def for_prerequisites(self) -> "RunContext":
        """The same command while it builds prerequisites: missing ones are built, nothing is replaced."""
        return replace(self, overwrite=False, restart=False, resume="auto", fine_tune=False, training_minutes=None)

    def skip(self, video_id: str, reason: str) -> None:
        """Note a broken video, once; with `strict` raise instead."""
        if self.strict:
            raise UserError(f"video {video_id}: {reason} (--strict: nothing is skipped)")
        if video_id not in self.skipped:
            self.skipped[video_id] = reason
            say(f"skipped video {video_id}: {reason}")


def image_memory_format(device: torch.device) -> torch.memory_format:
    """The layout of images and kernels. On a CPU the contiguous one trains 12 % faster and encodes 12 % slower."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` to bf16 on a GPU that computes in it and fp32 elsewhere; others as they are."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    # Emulated, as on GPUs before Ampere, it is slower than fp32.
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def resolve_device(name: str) -> torch.device:
    """Resolve `auto`, `cpu`, `cuda` or `cuda:1` to a device of this machine.

    Raises:
        UserError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: allowed are auto, cpu, cuda, cuda:<number>") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device


def sampling_precision(options: SamplingConfig, device: torch.device) -> str:
    """What matrix products are computed in: `fp32`, `tf32` or `bf16`."""
    if options.precision == "auto" and options.preset == "official":
        return "fp32"
    return resolve_precision(options.precision, device)


@contextmanager
def training_in(precision: str, *, measure_kernels: bool = False) -> Iterator[None]:
    """Float32 products of a training inside: in full for `fp32`, else in TF32. What was set before is restored.

    Autocast is left to the steps: held around several of them it would keep casts of weights that have changed.

    Args:
        measure_kernels: choose cuDNN's convolutions by measuring each new shape. Faster where shapes are fixed, but the
            last digits then vary from process to process.
    """
    before = torch.backends.cudnn.benchmark
    full = precision == "fp32"
    with float32_products(matrices=full, convolutions=full):
        torch.backends.cudnn.benchmark = measure_kernels
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before


@contextmanager
def computing_in(precision: str, device: torch.device, threads: int | None = None) -> Iterator[None]:
    """Inference in `fp32`, `tf32` or `bf16` inside, whatever was set before, which is restored afterwards.

    Args:
        threads: of a CPU; None: as they are.
    """
    # Without the cache of casts: a CUDA graph recorded inside would go on reading it when it is gone.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
    before = torch.get_num_threads()
    with training_in(precision), autocast:
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            if threads is not None:
                torch.set_num_threads(before)


def in_full_precision(method: Callable[Method, Result]) -> Callable[Method, Result]:
    """Decorate a method of an object with a `device`, and perhaps `threads`: it is `computing_in` fp32."""

    @wraps(method)
    def computed(*arguments: Method.args, **options: Method.kwargs) -> Result:
        with computing_in("fp32", arguments[0].device, getattr(arguments[0], "threads", None)):
            return method(*arguments, **options)

    return computed


def fastest_threads(work: Callable[[int], object], size: int) -> int:
    """The number of threads of a CPU that does some work in the least time now, beside all else that the machine does.

    More threads are often slower: they wait for each other, and where other programs use a core, for these.

    Args:
        work: of a size. What takes a thread longer than `THREADS_WORK` is measured at a smaller one.
        size: at least 1.
    Returns:
        1, 2, 4, ... or all cores, without a measurement if work of size 1 takes longer than `THREADS_MEASURED`.
    """
    cores, before = len(os.sched_getaffinity(0)), torch.get_num_threads()
    counts = {2**power for power in range(cores.bit_length())} | {cores}
    seconds = dict.fromkeys(sorted(counts), 0.0)

    def measured(threads: int, size: int) -> float:
        torch.set_num_threads(threads)
        started = time.perf_counter()
        work(size)
        return time.perf_counter() - started

    try:
        one = min(measured(1, 1) for _ in range(2))  # the first one warms up
        if one > THREADS_MEASURED:
            return cores
        size, started, turns = max(1, min(size, int(THREADS_WORK / one))), time.perf_counter(), 0
        while len(seconds) > 1 and (turns < 3 or time.perf_counter() - started < THREADS_MEASURED):
            turns += 1
            for threads in list(seconds):
                seconds[threads] += measured(threads, size)
            seconds = {count: spent for count, spent in seconds.items() if spent < 2 * min(seconds.values())}
    finally:
        torch.set_num_threads(before)
    # The sum and not the least: what is fast only while nobody disturbs it is not fast here.
    return next(count for count, spent in seconds.items() if spent <= FEWER_THREADS * min(seconds.values()))
