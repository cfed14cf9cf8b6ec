"""The processes of one training, as torchrun starts them; a single one exchanges nothing."""

import datetime
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.errors import UserError

# Timeout while rank 0 indexes videos and validates.
PATIENCE = datetime.timedelta(hours=2)


@dataclass(frozen=True)
class Processes:
    """The processes of one training.

    Attributes:
        rank: of this process, from 0.
        count: world size.
    """

    rank: int = 0
    count: int = 1

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
        return nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    def without_exchange(self, model: nn.Module, active: bool) -> AbstractContextManager[None]:
        """Skip the gradient exchange in the block if `active`: for all parts of a batch but the last."""
        return model.no_sync() if active and self.count > 1 else nullcontext()


ALONE = Processes()


def join_processes(device: torch.device) -> tuple[Processes, torch.device]:
    """Join the process group if torchrun started this process.

    Args:
        device: as the user asked for.
    Returns:
        The processes, and the device of this one: its own GPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return Processes(dist.get_rank(), dist.get_world_size()), device


def leave_processes() -> None:
    """Destroy the process group."""
    if dist.is_available() and dist.is_initialized():
        _groups.clear()
        dist.destroy_process_group()


_groups: dict[str, object] = {}


def _control_group() -> object:
    """A gloo group of all processes."""
    if "control" not in _groups:
        _groups["control"] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _groups["control"]
