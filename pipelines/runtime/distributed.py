"""The processes of one training, as torchrun starts them; a single one exchanges nothing."""

import datetime
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.errors import UserError

# Timeout until all processes have started.
START = datetime.timedelta(minutes=10)
# Timeout of an exchange within a step, before which a slower process may have decoded videos.
STEP = datetime.timedelta(minutes=30)
# Timeout while rank 0 indexes videos and validates, which the control group waits for.
PATIENCE = datetime.timedelta(hours=2)


@dataclass(frozen=True)
class Processes:
    """The processes of one training.

    Attributes:
        rank: of this process, from 0.
        count: world size.
        here: number of them on this machine.
        store: keys and values that all of them see; None for a single one.
    """

    rank: int = 0
    count: int = 1
    here: int = 1
    store: "dist.Store | None" = field(default=None, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """This process's rows of a global batch of `batch` rows."""
        each = batch // self.count
        return slice(self.rank * each, (self.rank + 1) * each)

    def check_batch(self, batch: int, parts: int, key: str) -> None:
        """Refuse a batch that can't be split evenly.

        Args:
            parts: number of parts that each process computes its rows in.
            key: configuration key of the batch size.
        Raises:
            UserError: names a size that works.
        """
        if batch % (self.count * parts):
            unit = self.count * parts
            raise UserError(
                f"{key}: a batch of {batch} can't be split over {self.count} process(es) in {parts} part(s) each: "
                f"use a multiple of {unit}, such as {max(1, round(batch / unit)) * unit}"
            )

    def sum_(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def mean_(self, tensor: Tensor) -> None:
        """Average a tensor over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
            tensor /= self.count

    def all_true(self, flag: Tensor) -> Tensor:
        """Whether a flag (scalar bool) is True in all processes; the host does not wait for it."""
        if self.count == 1:
            return flag
        flags = flag.float()
        dist.all_reduce(flags, dist.ReduceOp.MIN)
        return flags.bool()

    def gather(self, rows: Tensor) -> Tensor:
        """The rows [n, ...] of all processes in order of rank: [count n, ...]."""
        if self.count == 1:
            return rows
        rows = rows.contiguous()  # NCCL writes to its outputs as if they were contiguous
        parts = [torch.empty_like(rows) for _ in range(self.count)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    def any_asks(self, number: int) -> int:
        """The maximum over all processes, exchanged on the CPU, so that no process waits for a device."""
        if self.count == 1:
            return number
        shared = torch.tensor(number)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=_control_group())
        return int(shared)

    def agree(self, answer: bool) -> bool:
        """Whether all processes answer yes."""
        return self.any_asks(int(not answer)) == 0

    def wait(self) -> None:
        """Barrier."""
        if self.count > 1:
            dist.barrier(group=_control_group())

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Run the block in rank 0 first, then in the others, which find on disk what it wrote."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def distribute(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model to call in training: DDP, which averages gradients over all processes."""
        if self.count == 1:
            return model
        self.wait()  # rank 0 may have prepared its validation for longer than the timeout of what follows
        return nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    def without_exchange(self, model: nn.Module, active: bool) -> AbstractContextManager[None]:
        """Skip the gradient exchange in the block if `active`: for all parts of a batch but the last."""
        return model.no_sync() if active and self.count > 1 else nullcontext()

    def own_device(self, device: torch.device) -> torch.device:
        """Make this process's device the current one.

        Args:
            device: as the user asked for.
        Returns:
            The device: of several processes, each has a GPU of its own.
        Raises:
            UserError: fewer GPUs than processes on this machine, or one GPU named for all of them.
        """
        if device.type == "cuda" and self.count > 1:
            if device.index is not None:
                raise UserError(
                    f"--device {device} names one GPU, and each of {self.count} processes needs its own: use --device "
                    "cuda, and choose the GPUs by CUDA_VISIBLE_DEVICES"
                )
            if self.here > torch.cuda.device_count():
                raise UserError(
                    f"{self.here} processes on this machine, but {torch.cuda.device_count()} GPU(s): start one process "
                    f"per GPU (NUM_GPUS={torch.cuda.device_count()}), or use --device cpu"
                )
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        return device

    def connect(self, device: torch.device) -> None:
        """Connect the processes: by NCCL between GPUs, else by gloo.

        Args:
            device: of this process.
        Raises:
            UserError: a process runs on another type of device.
            ConnectionError, TimeoutError: a process failed, or did not start.
        """
        if self.count == 1 or dist.is_initialized():
            return
        self.store.set(f"device/{self.rank}", device.type)
        types = self._values("device")
        if len(set(types)) > 1:
            where = ", ".join(f"process {rank} on {name}" for rank, name in enumerate(types))
            raise UserError(f"the processes need devices of one type, but run {where}: name it by --device")
        groups = dist.PrefixStore("groups", self.store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=groups, rank=self.rank, world_size=self.count, timeout=STEP)
        _groups["control"] = dist.new_group(backend="gloo", timeout=PATIENCE)

    @contextmanager
    def sharing_failures(self) -> Iterator[None]:
        """Tell the other processes why the block failed in this one.

        They notice the failure because this process closes its connections, which ends whatever they exchange with it.

        Raises:
            ConnectionError: another process failed or was lost; says why it failed, as far as it is known.
        """
        try:
            yield
        except BaseException as error:
            if self.count == 1:
                raise
            lost, reason = _is_lost(error), str(error) or type(error).__name__
            told = None
            with suppress(RuntimeError):  # the store may be gone with the process that held it
                if not lost:
                    self.store.compare_set(_FAILURE, "", f"process {self.rank} of {self.count} failed: {reason}")
                told = self._failure()
            _close_control_group()
            if not lost:
                raise
            what = reason.partition("\n")[0].partition(". ")[0]  # advice for programmers follows
            raise ConnectionError(
                told
                or f"lost the connection to another of {self.count} processes ({what}): its output may say why, or the "
                "kernel's log if memory ran out; the same command resumes from the last checkpoint"
            ) from error

    def _failure(self) -> str | None:
        """The first failure of any process, as a sentence."""
        return self.store.get(_FAILURE).decode() if self.store.check([_FAILURE]) else None

    def _values(self, name: str) -> list[str]:
        """What each process has set under `name/<rank>`, once all have.

        Raises:
            ConnectionError: a process failed meanwhile.
            TimeoutError: a process has set nothing within `START`.
        """
        keys, end = [f"{name}/{rank}" for rank in range(self.count)], time.monotonic() + START.total_seconds()
        while missing := [rank for rank, key in enumerate(keys) if not self.store.check([key])]:
            if failure := self._failure():
                raise ConnectionError(failure)
            if time.monotonic() > end:
                names = ", ".join(map(str, missing))
                raise TimeoutError(f"process {names} of {self.count} did not start within {START}")
            time.sleep(0.05)
        return [self.store.get(key).decode() for key in keys]


ALONE = Processes()


def join_processes() -> Processes:
    """The processes that torchrun started, this one among them, with their store; not yet connected.

    Raises:
        TimeoutError: not all of them started, or their store can't be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=START))
        store = own_part(dist.PrefixStore("river", store), rank, count)
    except dist.DistError as error:
        raise TimeoutError(
            f"not all of {os.environ['WORLD_SIZE']} processes started within {START}, or their store can't be reached: "
            f"{error}"
        ) from error
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    return Processes(rank, count, here, store)


def own_part(store: "dist.Store", rank: int, count: int) -> "dist.Store":
    """A part of a store in which nobody but the processes that start now has written, the same for all of them.

    torchrun keeps its store when it starts processes again (`--max-restarts`, nodes that come or go), with all that
    earlier ones wrote, and tells no process that it is not the first of its rank.

    Raises:
        DistError: not all of them are there within `START`.
    """
    mine, end = uuid.uuid4().hex, time.monotonic() + START.total_seconds()
    if rank == 0:  # names the part, and says in it whose answers it has seen
        answers = [f"{mine}/{other}" for other in range(1, count)]
        store.set("part", mine)
        store.wait(answers, START)
        store.set(f"{mine}/seen", " ".join(store.get(answer).decode() for answer in answers))
        return dist.PrefixStore(mine, store)
    while time.monotonic() < end:
        part = store.get("part").decode()  # perhaps still that of earlier processes, which have not seen this one
        store.set(f"{part}/{rank}", mine)
        if store.check([f"{part}/seen"]) and mine in store.get(f"{part}/seen").decode().split():
            return dist.PrefixStore(part, store)
        time.sleep(0.05)
    raise dist.DistStoreError(f"process 0 has not seen process {rank}")


def leave_processes() -> None:
    """Destroy the process groups."""
    if dist.is_available() and dist.is_initialized():
        _groups.clear()
        dist.destroy_process_group()


# Key of the first failure.
_FAILURE = "failure"
_groups: dict[str, "dist.ProcessGroup"] = {}


def _control_group() -> "dist.ProcessGroup":
    """A gloo group of all processes."""
    return _groups["control"]


def _close_control_group() -> None:
    if "control" in _groups:
        dist.destroy_process_group(_groups.pop("control"))


def _is_lost(error: BaseException) -> bool:
    """Whether an exchange ended because another process is gone, or did not answer in time."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
