"""Test matrices of the start in one launch; equals `mofasgd.rng.gaussian` bit by bit."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mofasgd.kernels.common import random_words

_DEVIATION: tl.constexpr = tl.constexpr(1 / math.sqrt(8 * (256**2 - 1) / 12))


@triton.jit
def _bytes(word):
    """Return the sum of the four bytes of uint32 words."""
    halves = (word & 0x00FF00FF) + ((word >> 8) & 0x00FF00FF)
    return (halves & 0xFFFF) + (halves >> 16)


@triton.jit
def _gaussian(result, key, step, count, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    number = (2 * element).to(tl.int32)
    total = _bytes(random_words(key, tl.load(step), number)) + _bytes(random_words(key, tl.load(step), number + 1))
    value = (total.to(tl.int32) - 8 * 255 // 2).to(tl.float32) * _DEVIATION
    # To the nearest bfloat16, half way to the even one.
    bits = value.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    value = bits.to(tl.float32, bitcast=True)
    tl.store(result + element, value.to(result.dtype.element_ty), mask=element < count)


def fill_gaussian(result: Tensor, key: Tensor) -> None:
    """Fill a contiguous matrix of fewer than 2^31 elements; `key` is a row of `rng.key_tensor`."""
    step = torch.zeros((), dtype=torch.int32, device=result.device)
    _gaussian[(triton.cdiv(result.numel(), 1024),)](result, key, step, result.numel(), BLOCK=1024)
