"""Sums over ranks in a few fused all-reduces, and the count of their bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed

BUCKET = 32 << 20
"""Bytes of one fused all-reduce; a larger tensor goes alone, without a copy."""

_IN_FLIGHT = 4
"""Buckets whose copies are held at a time."""


@dataclass
class Traffic:
    """What a rank has given to all-reduces: `bytes` of payload in `calls` calls. What a link carries is up to twice it
    (2 (N - 1) / N in a ring of N)."""

    bytes: int = 0
    calls: int = 0


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model.

    Attributes:
        group: of `torch.distributed`.
        traffic: counts up for as long as the group is used.
    """

    group: distributed.ProcessGroup
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.group.size()

    @torch.no_grad()
    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over the ranks, in place; every rank gives the same shapes and dtypes in one order.

        The result has the same bits on every rank.
        """
        waiting = []
        for bucket in _buckets(tensors):
            alone = len(bucket) == 1 and bucket[0].is_contiguous()
            flat = bucket[0] if alone else torch.cat([t.reshape(-1) for t in bucket])
            self.traffic.bytes += flat.numel() * flat.element_size()
            self.traffic.calls += 1
            waiting.append((bucket, flat, distributed.all_reduce(flat, group=self.group, async_op=True)))
            if len(waiting) == _IN_FLIGHT:
                _finish(*waiting.pop(0))
        for one in waiting:
            _finish(*one)

    def agree(self, number: Tensor) -> Tensor:
        """Return whether an int64 number (any shape) is the same on all ranks, bool: equal on all of them."""
        # -x - 1 turns the order round without overflow: max and min by one call.
        both = torch.stack([number, -number - 1])
        distributed.all_reduce(both, distributed.ReduceOp.MAX, group=self.group)
        return both[0] == -both[1] - 1

    @torch.no_grad()
    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Give every rank the values of the group's rank 0, in place."""
        source = distributed.get_global_rank(self.group, 0)
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            distributed.broadcast(whole, source, group=self.group)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.copy_(whole)


def _finish(bucket: list[Tensor], flat: Tensor, work: distributed.Work) -> None:
    work.wait()
    if flat is not bucket[0]:
        parts = torch.split(flat, [t.numel() for t in bucket])
        torch._foreach_copy_(bucket, [part.view(t.shape) for part, t in zip(parts, bucket, strict=True)])


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one dtype and device together, up to BUCKET bytes."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for some in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in some:
            own = tensor.numel() * tensor.element_size()
            if bucket and size + own > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += own
        yield bucket


def checksum(tensors: Sequence[Tensor]) -> Tensor:
    """Return a 0-dim int64 that tells tensors with other bits apart, but for accidents; no copy of them is made."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    # Integer sums do not depend on their order; the odd factors tell tensors from each other.
    device = tensors[0].device
    sums = [t.detach().reshape(-1).view(kinds[t.element_size()]).sum(dtype=torch.int64) for t in tensors]
    total: Tensor = sum((2 * i + 1) * value.to(device) for i, value in enumerate(sums))  # type: ignore[assignment]
    return total
