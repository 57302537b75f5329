"""What several kernels share: matrices by their addresses, and random words equal to those of `mofasgd.rng`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mofasgd.kernels import interpreted, next_power_of_2

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def operand(dtype: torch.dtype) -> tl.dtype:
    """Return the type in which matrices of `dtype` are multiplied."""
    # The interpreter multiplies the bits of bfloat16; in float32 the products are the same.
    return tl.float32 if interpreted() else TYPES[dtype]


def precision(dtype: torch.dtype) -> str:
    """Return how matrices of `dtype` are multiplied."""
    # Three products of TF32 parts are as good as one in float32, and a tensor core makes them.
    return "tf32x3" if dtype is torch.float32 else "tf32"


class Tiles(NamedTuple):
    """How a kernel is cut: rows M, columns N, factors' columns R at a time; columns of a program; warps, stages."""

    M: int
    N: int
    R: int
    chunk: int
    warps: int
    stages: int


def block(columns: int, most: int) -> int:
    """Return how many of the factors' `columns` are multiplied at a time: a power of two, `most` at most."""
    return min(most, max(16, next_power_of_2(columns)))


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


@triton.jit
def tile_halves(key, step, before, rows, first, n, N: tl.constexpr, EVEN: tl.constexpr):
    """Return 16-bit random numbers for `rows` by the columns first .. first + N - 1 of a matrix with n columns.

    `before` (int64) elements of the parameter lie before the matrix. EVEN: n is. Equals `rng.random_halves`.
    """
    if EVEN:
        # Neighbours share a word, and a word takes longer than the rest of the element.
        pairs = first // 2 + tl.arange(0, N // 2)
        number = (before // 2).to(tl.int32) + rows[:, None] * (n // 2) + pairs[None, :]
        words = random_words(key, step, number)
        halves = tl.interleave(words & 0xFFFF, words >> 16)
    else:
        columns = first + tl.arange(0, N)
        element = before + rows[:, None].to(tl.int64) * n + columns[None, :]
        words = random_words(key, step, (element >> 1).to(tl.int32))
        halves = tl.where((element & 1) == 0, words & 0xFFFF, words >> 16)
    return halves
