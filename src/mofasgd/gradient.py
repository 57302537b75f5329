"""Where a step reads a factored parameter's gradient: a tensor, or the sketches that backward has summed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mofasgd.layout import MatrixShape, as_matrices
from mofasgd.momentum import (
    Factors,
    init_factors,
    init_sketch,
    init_widths,
    sketch,
    starts_from_gradient,
    truncated_svd,
)
from mofasgd.rng import START_LEFT, START_RIGHT, gaussian, key_of


@dataclass(frozen=True)
class FirstWindow:
    """How the gradient of a parameter without a momentum is sketched, and what its momentum becomes.

    Attributes:
        seed, index: of the optimizer, and of the parameter in it; they alone decide the random test matrices.
        shape, rank: of its matrices and their momentum.
        dtype: of the sketches, the optimizer's `state_dtype`.
    """

    seed: int
    index: int
    shape: MatrixShape
    rank: int
    dtype: torch.dtype

    @property
    def dense(self) -> bool:
        """Whether the gradient itself is summed, its sketches being no smaller."""
        return starts_from_gradient(self.shape.m, self.shape.n, self.rank)

    @property
    def widths(self) -> tuple[int, int]:
        """Columns (l, k) of Omega and Psi."""
        return init_widths(self.rank)

    @property
    def keys(self) -> tuple[int, int]:
        """Random keys of the test matrices Omega (n, l) and Psi (m, k), which are made where they are used."""
        return key_of(self.seed, START_RIGHT, self.index), key_of(self.seed, START_LEFT, self.index)

    def right(self, device: torch.device) -> Tensor:
        """Return Omega (n, l)."""
        return gaussian(self.shape.n, self.widths[0], self.keys[0], device, self.dtype)

    def left(self, device: torch.device) -> Tensor:
        """Return Psi (m, k)."""
        return gaussian(self.shape.m, self.widths[1], self.keys[1], device, self.dtype)

    def observe(self, G: Tensor) -> tuple[Tensor, ...]:
        """Return what the start needs of G (p, m, n): (G,), or Y (p, m, l) and Z (p, n, k). Linear in G."""
        if self.dense:
            return (G.to(self.dtype),)
        return init_sketch(G, self.right(G.device), self.left(G.device))

    def factors(self, observed: list[Tensor]) -> Factors:
        """Return the factors of M_1 from sums of what `observe` returns; finite."""
        if self.dense:
            return truncated_svd(observed[0], self.rank)
        Y, Z = observed
        return init_factors(Y, Z, self.left(Y.device), self.rank)


class Gradient(Protocol):
    """A factored parameter's gradient in a step, as b matrices; not scaled by clipping."""

    def sketches(self, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """Return (G V, G' U) by the stored factors, (b, m, r) and (b, n, r)."""

    def start(self, first: FirstWindow, places: Tensor | None) -> tuple[Tensor, ...]:
        """Return `first.observe` of the matrices number `places` (None: all). May be called once."""

    def dense(self) -> Tensor:
        """Return G (b, m, n).

        Raises:
            ValueError: if only its sketches exist.
        """


@dataclass(frozen=True)
class DenseGradient:
    """The gradient as a tensor of the parameter's shape, read only."""

    tensor: Tensor
    shape: MatrixShape

    def dense(self) -> Tensor:
        """Return G as (b, m, n)."""
        return as_matrices(self.tensor, self.shape)

    def sketches(self, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """Return (G V, G' U)."""
        return sketch(self.dense(), U, V)

    def start(self, first: FirstWindow, places: Tensor | None) -> tuple[Tensor, ...]:
        """Return the first window's sketches."""
        G = self.dense()
        return first.observe(G if places is None else G[places])
