"""Weight updates W <- (1 - decay) W - (L R' + E), with stochastic rounding for bfloat16 weights.

Nearest rounding loses the step of a bfloat16 weight: one step is a small fraction of the weight's last place. With
stochastic rounding the weight moves by the step in expectation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mofasgd.precision import in_true_float32
from mofasgd.rng import ROUNDING, key_of, random_halves

TILE = 1 << 24
"""Elements of a low-precision weight that are updated at a time; bounds the float32 copies (64 MiB each)."""


@dataclass(slots=True)
class Rounding:
    """How results are written into a weight of lower precision.

    Attributes:
        stochastic: round bfloat16 up or down at random, unbiased; nearest otherwise.
        key: the parameter's random key (`rng.key_of`).
        step: 0-dim tensor, the number of the step, on the weight's device.
        offset: index of the weight's first element in the parameter, of which a rank may hold a part.
    """

    stochastic: bool
    key: int
    step: Tensor
    offset: int = 0

    @classmethod
    def of(cls, stochastic: bool, seed: int, index: int, step: Tensor) -> Rounding:
        """Return the rounding of parameter number `index` under `seed` at `step`."""
        return cls(stochastic, key_of(seed, ROUNDING, index), step)

    def write(self, weight: Tensor, value: Tensor, start: int = 0) -> None:
        """Round `value` into `weight` (same shape, in place); `start` is the index of its first element."""
        if weight.dtype is torch.bfloat16 and self.stochastic:
            halves = random_halves(self.key, self.step, self.offset + start, value.numel(), value.device)
            value = stochastic_bfloat16(value.to(torch.float32), halves.view(value.shape))
        weight.copy_(value)


def stochastic_bfloat16(value: Tensor, halves: Tensor) -> Tensor:
    """Round float32 `value` to bfloat16, up with the probability that makes the mean exact.

    Args:
        value: float32, any shape.
        halves: random int32 numbers of 16 bits, of the same shape; further bits are ignored.

    Values that bfloat16 holds exactly, infinities and NaN come back unchanged.
    """
    bits = value.contiguous().view(torch.int32)
    # bfloat16 is the upper half of float32: adding 16 random bits below it carries with the right probability.
    rounded = ((bits + (halves & 0xFFFF)) & ~0xFFFF).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)


def _tiles(batch: int, rows: int, columns: int) -> Iterator[tuple[slice, slice, int]]:
    """Yield (batch slice, row slice, index of the first element); each tile is contiguous in the weight."""
    if rows * columns <= TILE:
        step = max(1, TILE // (rows * columns))
        for b in range(0, batch, step):
            yield slice(b, min(b + step, batch)), slice(0, rows), b * rows * columns
        return
    step = max(1, TILE // columns)
    for b in range(batch):
        for i in range(0, rows, step):
            yield slice(b, b + 1), slice(i, min(i + step, rows)), (b * rows + i) * columns


@in_true_float32
def apply_update(
    weight: Tensor, left: Tensor, right: Tensor, extra: Tensor | None, keep: Tensor | None, rounding: Rounding
) -> None:
    """Set weight <- keep * weight - (left right' + extra), in place.

    Args:
        weight: (b, m, n), float32, float64 or bfloat16.
        left, right: (b, m, q), (b, n, q), float32 or float64.
        extra: (b, m, n) or None.
        keep: (b,), what decay leaves of each matrix, or None for all of it.
        rounding: how a lower-precision weight is written.
    """
    compute = torch.promote_types(weight.dtype, left.dtype)
    in_place = weight.dtype is compute
    left, right = left.to(compute), right.to(compute)
    whole = [(slice(None), slice(None), 0)]
    for b, rows, start in whole if in_place else _tiles(*weight.shape):
        tile = weight[b, rows]
        value = tile if in_place else tile.to(compute)
        if keep is not None:
            value.mul_(keep[b, None, None].to(compute))
        value.baddbmm_(left[b, rows], right[b].mT, alpha=-1)
        if extra is not None:
            value.sub_(extra[b, rows])
        if not in_place:
            rounding.write(tile, value, start)
