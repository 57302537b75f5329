"""Test matrices of the start in one launch; equals `mofasgd.rng.gaussian` bit by bit."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mofasgd.kernels import cdiv
from mofasgd.kernels.common import random_words

_DEVIATION: tl.constexpr = tl.constexpr(1 / math.sqrt(8 * (256**2 - 1) / 12))


@triton.jit
def _bytes(word):
    """Return the sum of the four bytes of uint32 words."""
    halves = (word & 0x00FF00FF) + ((word >> 8) & 0x00FF00FF)
    return (halves & 0xFFFF) + (halves >> 16)


@triton.jit
def _gaussian(result, keys, count, BLOCK: tl.constexpr):
    """BLOCK elements of matrix program_id(1), of `count` elements each."""
    matrix = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    step = (matrix * 0).to(tl.int32)
    total = _bytes(random_words(keys + 2 * matrix, step, 2 * element))
    total += _bytes(random_words(keys + 2 * matrix, step, 2 * element + 1))
    value = (total.to(tl.int32) - 8 * 255 // 2).to(tl.float32) * _DEVIATION
    # To the nearest bfloat16, half way to the even one.
    bits = value.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    value = bits.to(tl.float32, bitcast=True)
    tl.store(result + matrix * count + element, value.to(result.dtype.element_ty), mask=element < count)


def fill_gaussian(result: Tensor, keys: Tensor) -> None:
    """Fill contiguous matrices (p, rows, columns) of at most 2^30 elements each by keys (p, 2), `rng.key_tensor`."""
    count = result[0].numel()
    with torch.cuda.device_of(result):
        _gaussian[(cdiv(count, 1024), len(result))](result, keys, count, BLOCK=1024)
