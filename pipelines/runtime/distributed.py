"""Processes that train together, as torchrun starts them; one alone is the case in which nothing is exchanged."""

import datetime
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.errors import UserError

# Others wait so long for the first process, which indexes videos and validates.
PATIENCE = datetime.timedelta(hours=2)


@dataclass(frozen=True)
class Processes:
    """The processes of one training.

    Attributes:
        rank: this one's number, from 0.
        count: of all.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """This process's rows of a batch of so many."""
        each = batch // self.count
        return slice(self.rank * each, (self.rank + 1) * each)

    def check_batch(self, batch: int, parts: int, key: str) -> None:
        """Refuse a batch that can't be shared out evenly.

        Args:
            parts: that each process computes its rows in.
            key: what the user sets the batch's size with.
        Raises:
            UserError: says which sizes would do.
        """
        if batch % (self.count * parts):
            unit = self.count * parts
            raise UserError(
                f"{key}: a batch of {batch} can't be shared out to {self.count} process(es) in {parts} part(s) each: "
                f"take a multiple of {unit}, such as {max(1, round(batch / unit)) * unit}"
            )

    def sum_(self, tensor: Tensor) -> None:
        """Add up a tensor over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def mean_(self, tensor: Tensor) -> None:
        """Average a tensor over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
            tensor /= self.count

    def gather(self, rows: Tensor) -> Tensor:
        """The rows [n, ...] of all processes, in their order: [count n, ...]."""
        if self.count == 1:
            return rows
        rows = rows.contiguous()  # NCCL fills what it is given as if it were
        parts = [torch.empty_like(rows) for _ in range(self.count)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    def any_asks(self, number: int) -> int:
        """The largest of all processes' numbers, exchanged on the CPU: no process waits for a device."""
        if self.count == 1:
            return number
        shared = torch.tensor(number)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=_control_group())
        return int(shared)

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.count > 1:
            dist.barrier(group=_control_group())

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """What is inside happens in the first process, then in the others: they find what it left on the disk."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def distribute(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model to call in training: its gradients are averaged over all processes."""
        if self.count == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    def without_exchange(self, model: nn.Module, active: bool) -> AbstractContextManager[None]:
        """While a part of a batch is computed whose gradients are not the last: they are exchanged with those."""
        return model.no_sync() if active and self.count > 1 else nullcontext()


ALONE = Processes()


def join_processes(device: torch.device) -> tuple[Processes, torch.device]:
    """Meet the other processes that torchrun started, if it started any.

    Args:
        device: that the user asked for.
    Returns:
        The processes, and this one's device: its own GPU.
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
    """Let go of the others, at the end."""
    if dist.is_available() and dist.is_initialized():
        _groups.clear()
        dist.destroy_process_group()


_groups: dict[str, object] = {}


def _control_group() -> object:
    """A group of all processes that talks over the CPU."""
    if "control" not in _groups:
        _groups["control"] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _groups["control"]
