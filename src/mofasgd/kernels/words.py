"""Random words in kernels; equal `mofasgd.rng.random_words` bit by bit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hash_words(word):
    """Hash uint32 words; equals `rng.hash_words`."""
    word ^= word >> 16
    word *= 0x21F0AAAD
    word ^= word >> 15
    word *= 0xD35A2D97
    return word ^ (word >> 15)


@triton.jit
def random_words(key, step, element):
    """Return uint32 words of int64 elements, by two words at `key` (a row of `rng.key_tensor`) and the step."""
    first = hash_words(step.to(tl.int32).to(tl.uint32, bitcast=True) ^ tl.load(key).to(tl.uint32, bitcast=True))
    second = hash_words(first ^ tl.load(key + 1).to(tl.uint32, bitcast=True))
    low, high = element.to(tl.uint32), (element >> 32).to(tl.uint32)
    return hash_words(hash_words(low ^ first) ^ high ^ second)


@triton.jit
def stochastic_bfloat16(value, words):
    """Round float32 to bfloat16 by random words; equals `apply.stochastic_bfloat16`."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = ((bits + (words & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    # Infinities and NaN have all exponent bits set; adding to them might change what they are.
    return tl.where((bits & 0x7F800000) == 0x7F800000, value, rounded).to(tl.bfloat16)
