"""The processes that train one run together: which of them this is, and what they agree on."""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from mofasgd.app.errors import Diverged, Stopped

T = TypeVar("T")
Problem = tuple[type[Exception], str]

_KINDS = (Diverged, Stopped, OSError, ValueError)
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def started() -> bool:
    """Whether this process is one of several that torchrun, or `gpus`, has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _attempt(work: Callable[[], T]) -> tuple[T | None, Problem | None]:
    """Return what `work` returns, or the kind and the text of its error."""
    try:
        return work(), None
    except _KINDS as error:
        # Errors with more arguments than a text could not be made again elsewhere.
        return None, (next(kind for kind in _KINDS if isinstance(error, kind)), str(error))


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them; alone without arguments.

    Methods that all ranks have to call are collective. They work on the CPU, and a rank whose own part has failed
    calls them as well: nobody waits for a rank that will not come.

    Attributes:
        rank: number of this process; rank 0, the lead, writes all files and shows what happens.
        world: number of processes.
        local_rank: number among those of this machine: of its GPU.
        local_world: processes on this machine.
        store: torch.distributed's, of the group; it lives in the launcher, whatever becomes of a rank. None: alone.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    store: Any = None

    @property
    def lead(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def highest(self, value: int) -> int:
        """Return the largest of all ranks' values; collective."""
        if self.world == 1:
            return value
        number = torch.tensor(value)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def total(self, *values: float) -> tuple[float, ...]:
        """Return the sums of all ranks' values, the same on each; collective."""
        if self.world == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return tuple(sums.tolist())

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, by rank; collective."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """Return what `work` returns; collective. An error on some rank is raised on all, named by its rank.

        Raises:
            ValueError, OSError, Stopped: what the first rank in trouble has met.
        """
        return work() if self.world == 1 else self._settled(*_attempt(work))

    def lead_first(self, work: Callable[[], T]) -> T:
        """Do as `together`, on each machine first in one process (which fills a cache), then in the others."""
        if self.world == 1:
            return work()
        value, problem = _attempt(work) if self.local_rank == 0 else (None, None)
        self.highest(0)
        if self.local_rank != 0:
            value, problem = _attempt(work)
        return self._settled(value, problem)

    def from_lead(self, work: Callable[[], T]) -> T:
        """Return, on every rank, what `work` returns on the lead, where alone it is done; collective."""
        value = self.together(lambda: work() if self.lead else None)
        if self.world == 1:
            return value  # type: ignore[return-value]
        packed = io.BytesIO()
        if self.lead:
            # torch's format: tensors that share memory, as those of a checkpoint do, are sent once.
            torch.save(value, packed)
        content = self._broadcast(packed.getvalue())
        return value if self.lead else torch.load(io.BytesIO(content), weights_only=False)  # type: ignore[return-value]

    def claim(self) -> bool:
        """Whether no other rank has claimed before: the first to fail is the one to say why."""
        if self.store is None:
            return True
        try:
            return bool(self.store.add("mofasgd/told", 1) == 1)
        except RuntimeError:  # the store went with the launcher
            return True

    def _settled(self, value: T | None, problem: Problem | None) -> T:
        if not self.highest(problem is not None):
            return value  # type: ignore[return-value]
        problems = self.gather(problem)
        rank, (kind, text) = next((i, found) for i, found in enumerate(problems) if found is not None)
        raise kind(text if rank == 0 else f"rank {rank}: {text}")

    def _broadcast(self, content: bytes) -> bytes:
        """Return the lead's bytes."""
        size = torch.tensor(len(content))
        dist.broadcast(size, 0)
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8) if self.lead else _empty(int(size))
        dist.broadcast(data, 0)
        return data.numpy().tobytes()


def _empty(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Yield this process's place among those that torchrun has started; it leaves their group in the end.

    The process then ends with status 0, 130 after Ctrl-C, or 1 after any other exception.

    Args:
        device: as in the configuration: "cpu" takes gloo, anything else also NCCL where there is a GPU.

    Raises:
        ValueError: if the environment is half that of torchrun.
    """
    if not started():
        yield Ranks()
        return
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that there are several processes, but {', '.join(missing)} "
            "is not set: start them by torchrun, or unset WORLD_SIZE"
        )
    local_rank, local_world = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    gpu = device != "cpu" and torch.cuda.is_available()
    # Both: tensors of the training travel by NCCL, what `Ranks` agrees on by gloo, without a wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    store, rank, world = next(iter(rendezvous("env://")))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    status = [1]
    # Registered before what others will, hence called after it.
    atexit.register(_end, status)
    try:
        yield Ranks(rank, world, local_rank, local_world, store)
        # Not after an error: with a rank gone this would wait for it.
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()
        status[0] = 0
    except KeyboardInterrupt:
        status[0] = 130
        raise


def _end(status: list[int]) -> None:
    """End a process that had a group, before torch's threads and destructors meet: some of these abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status[0])


def lost(error: RuntimeError) -> bool:
    """Whether another rank's end is what a collective has met."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
