"""Frobenius norms of a list of same-shaped matrices in one launch, whatever their scale.

Equals `torch.linalg.matrix_norm` in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mofasgd.kernels import cdiv, pointers
from mofasgd.kernels.common import TYPES, matrix_at

_CHUNK, _BLOCK = 1 << 16, 1 << 13

_RARE = 1 << 19
"""Elements of a chunk where hardly a matrix is read: programs that do nothing take time as well."""

_LEAST = 2.0**-60
"""Float32 sums of squares from here on are right: elements whose squares vanish, below 2^-63, add nothing to them."""


@triton.jit
def _norms(
    matrices, known, parts, size, least, CHUNK: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """The squared length of CHUNK elements of matrix program_id(1); none where KNOWN and `least` <= known < inf."""
    batch, first = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * CHUNK
    A = matrix_at(matrices + batch, DTYPE, ALIGNED)
    exists = tl.load(matrices + batch) != 0
    total = tl.full((), 0.0, tl.float64)
    last = CHUNK
    if KNOWN:
        square = tl.load(known + batch)
        right = (square >= least) & (square < float("inf"))
        total = tl.where(right & (first == 0), square, total)
        last = tl.where(right, 0, tl.minimum(size - first, CHUNK))
    for start in tl.range(0, last, BLOCK, num_stages=3):
        at = first + start + tl.arange(0, BLOCK)
        value = tl.load(A + at, mask=(at < size) & exists, other=0.0).to(tl.float32)
        # Float32 squares of a block relative to its largest element neither overflow nor vanish.
        unit = tl.maximum(tl.max(tl.abs(value), 0), 1e-37)
        value = value * (1 / unit)
        total += tl.sum(value * value, 0).to(tl.float64) * unit.to(tl.float64) * unit.to(tl.float64)
    tl.store(parts + batch * tl.num_programs(0) + tl.program_id(0), total)


def norms_of(tensors: Sequence[Tensor | None], batch: int, squares: Tensor | None = None) -> Tensor:
    """Return |G|_F (batch,) float64 of the matrices of `tensors`: contiguous, of one shape and dtype; None is zero.

    Args:
        tensors: as above.
        batch: matrices of all of them.
        squares: |G|_F^2 (batch,) float64, of sums in float32; matrices that have left its range are read. None: all.
    """
    some = next(t for t in tensors if t is not None)
    slices = batch // len(tensors)
    size = some.numel() // slices
    table, aligned = pointers(tensors, slices, size * some.element_size(), some.device)
    chunk = _CHUNK if squares is None else _RARE
    count = cdiv(size, chunk)
    parts = torch.empty(batch, count, dtype=torch.float64, device=some.device)
    with torch.cuda.device_of(some):
        _norms[(count, batch)](
            table, parts if squares is None else squares, parts, size, _LEAST, CHUNK=chunk, BLOCK=_BLOCK,
            DTYPE=TYPES[some.dtype], ALIGNED=aligned, KNOWN=squares is not None, num_warps=8,
        )  # fmt: skip
    return parts.sum(dim=1).sqrt()
