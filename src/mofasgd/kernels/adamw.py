"""AdamW for a list of same-sized parameters: weight, gradient and moments are read once, weight and moments written.

Equals `mofasgd.adamw.adamw_step`, bfloat16 weights and their random rounding included: every operation on an element
is rounded by itself as IEEE says, here and there (no fused multiply-add, no approximate division). Two exceptions of
one float32 ulp of the update: the bias corrections' float64 powers of beta come from other routines and may, once in
a million, round otherwise; and on a CPU torch's square roots are not all rounded right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mofasgd.kernels import cdiv, pointers
from mofasgd.kernels.common import matrix_at, random_words, stochastic_bfloat16

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_BLOCK = 1024
_PARAMS = 128
_COLUMNS = tl.constexpr(10)


@triton.jit
def nearest_bfloat16(value):
    """Round float32 to the nearest bfloat16, ties to even; Triton's interpreter would truncate."""
    odd = (value.to(tl.uint32, bitcast=True) >> 16) & 1
    return stochastic_bfloat16(value, 0x7FFF + odd)


@triton.jit(do_not_specialize=["count"])
def _advance(counters, active, numbers, factor, rows, count, CLIPPED: tl.constexpr, PARAMS: tl.constexpr):
    """Count the step of the active ones of PARAMS parameters, and write down what all elements of each share."""
    param = tl.program_id(0) * PARAMS + tl.arange(0, PARAMS)
    moves = tl.load(active + param, mask=param < count, other=0) != 0
    counter = tl.load(counters + param, mask=moves, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(counter, mask=moves, other=0.0) + 1.0
    tl.store(counter, step, mask=moves)

    lr, beta1, beta2 = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    eps, decay = tl.load(numbers + 3), tl.load(numbers + 4)
    t = step.to(tl.float64)
    # beta = 0 gives 2^-inf = 0.
    size = lr / (1.0 - tl.exp2(t * tl.log2(beta1)))
    root = 1.0 / tl.sqrt(1.0 - tl.exp2(t * tl.log2(beta2)))
    row = rows + param * _COLUMNS
    tl.store(row, step, mask=moves)
    tl.store(row + 1, tl.load(factor).to(tl.float32) if CLIPPED else 1.0, mask=moves)
    tl.store(row + 2, (1.0 - lr * decay).to(tl.float32), mask=moves)
    tl.store(row + 3, beta1.to(tl.float32), mask=moves)
    tl.store(row + 4, (1.0 - beta1).to(tl.float32), mask=moves)
    tl.store(row + 5, beta2.to(tl.float32), mask=moves)
    tl.store(row + 6, (1.0 - beta2).to(tl.float32), mask=moves)
    tl.store(row + 7, eps.to(tl.float32), mask=moves)
    tl.store(row + 8, size.to(tl.float32), mask=moves)
    tl.store(row + 9, root.to(tl.float32), mask=moves)


@triton.jit(do_not_specialize=["count", "offset"])
def _adamw(
    table, active, rows, keys, numel, count, offset,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of one parameter."""
    blocks = tl.cdiv(numel, BLOCK)
    param, block = (tl.program_id(0) // blocks).to(tl.int32), tl.program_id(0) % blocks
    if tl.load(active + param) == 0:
        return
    element = (block.to(tl.int64) if WIDE else block) * BLOCK + tl.arange(0, BLOCK)
    inside = element < numel
    W = matrix_at(table + param, WEIGHT, ALIGNED) + element
    G = matrix_at(table + count + param, GRAD, ALIGNED) + element
    M = matrix_at(table + 2 * count + param, tl.float32, ALIGNED) + element
    V = matrix_at(table + 3 * count + param, tl.float32, ALIGNED) + element
    value = tl.load(W, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(G, mask=inside, other=0.0).to(tl.float32)
    first = tl.load(M, mask=inside, other=0.0)
    second = tl.load(V, mask=inside, other=0.0)
    row = rows + param * _COLUMNS

    g = g * tl.load(row + 1)
    first = first * tl.load(row + 3) + g * tl.load(row + 4)
    second = second * tl.load(row + 5) + g * (g * tl.load(row + 6))
    tl.store(M, first, mask=inside)
    tl.store(V, second, mask=inside)
    update = tl.div_rn(first, tl.sqrt_rn(second) * tl.load(row + 9) + tl.load(row + 7)) * tl.load(row + 8)
    value = value * tl.load(row + 2) - update

    if STOCHASTIC:
        # Neighbours share a word; a block starts at an even element.
        pairs = (offset // 2 + block.to(tl.int64) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)).to(tl.int32)
        words = random_words(keys + 2 * param, tl.load(row), pairs)
        tl.store(W, stochastic_bfloat16(value, tl.interleave(words & 0xFFFF, words >> 16)), mask=inside)
    else:
        tl.store(W, nearest_bfloat16(value) if WEIGHT is tl.bfloat16 else value, mask=inside)


def adamw_list(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    steps: Sequence[Tensor],
    active: Tensor,
    numbers: Tensor,
    factor: Tensor | None,
    keys: Tensor | None,
    offset: int = 0,
) -> None:
    """Take one AdamW step with every parameter of `weights`, in place, in two launches whatever their number.

    Args:
        weights: contiguous parameters of one dtype (float32 or bfloat16), of one size below 2^33 elements.
        grads: their gradients, contiguous, of one dtype (float32, bfloat16 or float16); read only.
        exp_avg, exp_avg_sq: their moments, float32, contiguous.
        steps: their counters, 0-dim float32.
        active: (len(weights),), bool; where it is False nothing is read or written.
        numbers: (5,) float64 on the device: lr, beta1, beta2, eps, weight_decay.
        factor: of the gradients, one element on the device, or None for 1.
        keys: (len(weights), 2) int32, rows of `rng.key_tensor`, by which bfloat16 is rounded at random; None: nearest.
        offset: elements of each parameter before the first of its weight, which is a part of it; even.
    """
    count, numel, device = len(weights), weights[0].numel(), weights[0].device
    table, aligned = pointers([*weights, *grads, *exp_avg, *exp_avg_sq], 1, 0, device)
    counters, _ = pointers(steps, 1, 0, device)
    flags = active.view(torch.uint8)
    rows = torch.empty(count, _COLUMNS.value, dtype=torch.float32, device=device)
    # Triton launches on the current device, which need not be the parameters'.
    with torch.cuda.device_of(rows):
        _advance[(cdiv(count, _PARAMS),)](
            counters, flags, numbers, numbers if factor is None else factor, rows, count,
            CLIPPED=factor is not None, PARAMS=_PARAMS, enable_fp_fusion=False,
        )  # fmt: skip
        _adamw[(cdiv(numel, _BLOCK) * count,)](
            table, flags, rows, rows if keys is None else keys, numel, count, offset,
            WEIGHT=_TYPES[weights[0].dtype], GRAD=_TYPES[grads[0].dtype],
            STOCHASTIC=keys is not None and weights[0].dtype is torch.bfloat16,
            ALIGNED=aligned, WIDE=numel > 2**31 - _BLOCK, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    torch.autograd.graph.increment_version(weights)
