"""Counter-based random numbers: functions of a key and a position, never of a generator's state.

A number depends on (seed, purpose, index of the parameter, step, element) only, so it is the same on every rank and
device, in every mode and after a resume, and drawing it leaves torch's global generators alone. Everything up to the
last operation is 32-bit integer arithmetic, hence bit-equal on CPU, GPU and in a Triton kernel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mofasgd.kernels import usable

ROUNDING, START_RIGHT, START_LEFT = 1, 2, 3
"""Purposes: stochastic rounding; the start's test matrices Omega (right) and Psi (left)."""

# Multipliers of a two-round xorshift-multiply hash with the lowest avalanche bias known for 32 bits; they come from
# the public hash-prospector search (rounds: xor >> 16, multiply, xor >> 15, multiply, xor >> 15).
_MULTIPLIERS = (0x21F0AAAD, 0xD35A2D97)
_MASK = 0xFFFFFFFF

_TILE = 1 << 20
"""Numbers that are made at a time; bounds the temporaries, which are several times as large."""


def _signed(word: int) -> int:
    return word - (1 << 32) if word & 0x80000000 else word


def hash_word(word: int) -> int:
    """Hash one unsigned 32-bit word (a bijection)."""
    word ^= word >> 16
    word = word * _MULTIPLIERS[0] & _MASK
    word ^= word >> 15
    word = word * _MULTIPLIERS[1] & _MASK
    return word ^ word >> 15


def hash_words(words: Tensor) -> Tensor:
    """Hash int32 words; equals `hash_word` on their unsigned values. Shape and dtype are kept."""
    # Shifts of int32 keep the sign bit; masking it off makes them logical.
    words = words ^ ((words >> 16) & 0xFFFF)
    words = words * _signed(_MULTIPLIERS[0])
    words = words ^ ((words >> 15) & 0x1FFFF)
    words = words * _signed(_MULTIPLIERS[1])
    return words ^ ((words >> 15) & 0x1FFFF)


@functools.lru_cache(maxsize=4096)
def key_of(seed: int, purpose: int, index: int) -> int:
    """Fold a 64-bit seed, a purpose and a parameter's index into one unsigned 32-bit key."""
    key = hash_word(purpose)
    for word in (seed & _MASK, (seed >> 32) & _MASK, index & _MASK):
        key = hash_word(key ^ word)
    return key


def key_tensor(keys: Sequence[int], device: torch.device) -> Tensor:
    """Return keys for `random_words` as int32 (len(keys), 2): each with its hash, so that no code depends on them."""
    words = [[_signed(key), _signed(hash_word(key))] for key in keys]
    return torch.tensor(words, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=1024)
def keys_on(keys: tuple[int, ...], device: torch.device) -> Tensor:
    """Return `key_tensor`, made once: a step copies nothing to the device that it has copied before."""
    return key_tensor(keys, torch.device("cpu")).to(device, non_blocking=True)


def random_words(key: int | Tensor, step: int | Tensor, start: int, count: int, device: torch.device) -> Tensor:
    """Return uniform int32 words for the elements start .. start + count - 1, shape (count,).

    Args:
        key: from `key_of`, or a row of `key_tensor`.
        step: number of the step; a 0-dim tensor stays on its device.
        start: index of the first element; 64 bits.
        count: number of elements.
        device: where the words are made.
    """
    if not isinstance(step, Tensor):
        step = torch.full((), step, device=device)
    # Two keys, so that two steps do not merely permute the same words.
    word, hashed = (_signed(key), _signed(hash_word(key))) if isinstance(key, int) else key.unbind()
    first = hash_words(step.to(device, torch.int32) ^ word)
    second = hash_words(first ^ hashed)
    elements = torch.arange(start, start + count, dtype=torch.int64, device=device)
    low, high = elements.to(torch.int32), (elements >> 32).to(torch.int32)
    # One hash a word: the rest of a weight's update takes a GPU no longer than this.
    return hash_words(low ^ first ^ hash_words(high)) ^ second


def random_halves(key: int, step: Tensor, start: int, count: int, device: torch.device) -> Tensor:
    """Return uniform 16-bit numbers, int32 (count,), for elements from `start` on: two elements share a word."""
    words = random_words(key, step, start // 2, (start + count + 1) // 2 - start // 2, device)
    halves = torch.stack([words & 0xFFFF, (words >> 16) & 0xFFFF], dim=-1).flatten()
    return halves[start % 2 : start % 2 + count]


def gaussian(rows: int, columns: int, key: int | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a (rows, columns) matrix of independent, nearly normal bfloat16 numbers: mean 0, variance 1.

    Each is the scaled sum of the eight bytes of two random words (Irwin-Hall; excess kurtosis -0.15), because a
    logarithm or a cosine would differ between devices in the last bit. It is rounded to bfloat16 whatever `dtype`
    says: a layer under autocast then multiplies by the very matrix that the step inverts in float32.
    """
    result = torch.empty(rows, columns, dtype=dtype, device=device)
    if usable(device) and result.numel() < 1 << 30:
        from mofasgd.kernels.gaussian import fill_gaussian

        fill_gaussian(result[None], keys_on((key,), device) if isinstance(key, int) else key[None])
        return result
    tile = max(1, _TILE // columns)
    for row in range(0, rows, tile):
        part = result[row : row + tile]
        words = random_words(key, 0, 2 * row * columns, 2 * part.numel(), device).view(*part.shape, 2)
        # Two bytes a half word at first, then the half words: sums of up to 8 * 255 fit.
        halves = ((words & 0x00FF00FF) + ((words >> 8) & 0x00FF00FF)).sum(dim=-1, dtype=torch.int32)
        total = (halves & 0xFFFF) + (halves >> 16)
        # A product, not a quotient: CUDA divides by a number through its reciprocal, which rounds otherwise than the
        # CPU.
        value = (total - 8 * 255 // 2).to(torch.float32) * (1 / math.sqrt(8 * (256**2 - 1) / 12))
        part.copy_(value.to(torch.bfloat16))
    return result


def gaussians(rows: int, columns: int, keys: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return `gaussian` matrices of several keys (len(keys), rows, columns)."""
    if not usable(device) or rows * columns >= 1 << 30:
        return torch.stack([gaussian(rows, columns, key, device, dtype) for key in keys])
    from mofasgd.kernels.gaussian import fill_gaussian

    result = torch.empty(len(keys), rows, columns, dtype=dtype, device=device)
    fill_gaussian(result, keys_on(tuple(keys), device))
    return result
