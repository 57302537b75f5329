"""Frobenius norms of a list of same-shaped matrices in one launch, whatever their scale.

Equals `torch.linalg.matrix_norm` in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mofasgd.kernels import pointers
from mofasgd.kernels.common import TYPES, matrix_at

_CHUNK, _BLOCK = 1 << 16, 1 << 13


@triton.jit
def _norms(matrices, parts, size, CHUNK: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The squared length of CHUNK elements of matrix program_id(1)."""
    batch, first = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * CHUNK
    A = matrix_at(matrices + batch, DTYPE, ALIGNED)
    exists = tl.load(matrices + batch) != 0
    total = tl.full((), 0.0, tl.float64)
    for start in tl.range(0, CHUNK, BLOCK, num_stages=3):
        at = first + start + tl.arange(0, BLOCK)
        value = tl.load(A + at, mask=(at < size) & exists, other=0.0).to(tl.float32)
        # Float32 squares of a block relative to its largest element neither overflow nor vanish.
        unit = tl.maximum(tl.max(tl.abs(value), 0), 1e-37)
        value = value * (1 / unit)
        total += tl.sum(value * value, 0).to(tl.float64) * unit.to(tl.float64) * unit.to(tl.float64)
    tl.store(parts + batch * tl.num_programs(0) + tl.program_id(0), total)


def norms_of(tensors: Sequence[Tensor | None], batch: int) -> Tensor:
    """Return |G|_F (batch,) float64 of the matrices of `tensors`: contiguous, of one shape and dtype; None is zero."""
    some = next(t for t in tensors if t is not None)
    slices = batch // len(tensors)
    size = some.numel() // slices
    table, aligned = pointers(tensors, slices, size * some.element_size(), some.device)
    count = triton.cdiv(size, _CHUNK)
    parts = torch.empty(batch, count, dtype=torch.float64, device=some.device)
    with torch.cuda.device_of(some):
        _norms[(count, batch)](
            table, parts, size, CHUNK=_CHUNK, BLOCK=_BLOCK, DTYPE=TYPES[some.dtype], ALIGNED=aligned, num_warps=8
        )  # fmt: skip
    return parts.sum(dim=1).sqrt()
