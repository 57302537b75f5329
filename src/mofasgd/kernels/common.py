"""What several kernels share: matrices by their addresses, and random words equal to those of `mofasgd.rng`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mofasgd.kernels import interpreted

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def operand(dtype: torch.dtype) -> tl.dtype:
    """Return the type in which matrices of `dtype` are multiplied."""
    # The interpreter multiplies the bits of bfloat16; in float32 the products are the same.
    return tl.float32 if interpreted() else TYPES[dtype]


def precision(dtype: torch.dtype) -> str:
    """Return how matrices of `dtype` are multiplied."""
    # Three products of TF32 parts are as good as one in float32, and a tensor core makes them.
    return "tf32x3" if dtype is torch.float32 else "tf32"


@triton.jit
def matrix_at(table, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to the matrix whose address stands at `table`."""
    matrix = tl.load(table).to(tl.pointer_type(DTYPE))
    # An address from memory says nothing of its alignment; without it every element is a load of its own.
    return tl.multiple_of(matrix, 16) if ALIGNED else matrix


@triton.jit
def hash_words(word):
    """Hash uint32 words; equals `rng.hash_words`."""
    word ^= word >> 16
    word *= 0x21F0AAAD
    word ^= word >> 15
    word *= 0xD35A2D97
    return word ^ (word >> 15)


@triton.jit
def random_words(key, step, number):
    """Return uint32 words of int32 numbers (taken as unsigned); `key` points to a row of `rng.key_tensor`."""
    first = hash_words(step.to(tl.int32).to(tl.uint32, bitcast=True) ^ tl.load(key).to(tl.uint32, bitcast=True))
    second = hash_words(first ^ tl.load(key + 1).to(tl.uint32, bitcast=True))
    return hash_words(number.to(tl.uint32, bitcast=True) ^ first) ^ second


@triton.jit
def stochastic_bfloat16(value, halves):
    """Round float32 to bfloat16 by random 16-bit numbers; equals `apply.stochastic_bfloat16`."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = ((bits + halves) & 0xFFFF0000).to(tl.float32, bitcast=True)
    # An infinity stays what it is, all its lower bits being 0; adding to a NaN might make a number of it.
    return tl.where(value == value, rounded, value).to(tl.bfloat16)
