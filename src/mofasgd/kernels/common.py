"""What several kernels share: matrices by their addresses, and random words equal to those of `mofasgd.rng`."""

from __future__ import annotations

import triton
import triton.language as tl


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
