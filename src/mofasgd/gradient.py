"""Where a step reads a factored parameter's gradient: a tensor, or the sketches that backward has summed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mofasgd.algebra import complete_frame, start
from mofasgd.kernels import usable
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
        if usable(G.device) and G.dtype is torch.bfloat16:
            return _products(G, self)
        return init_sketch(G, self.right(G.device), self.left(G.device))


def _products(G: Tensor, first: FirstWindow) -> tuple[Tensor, Tensor]:
    """Return `init_sketch` of a bfloat16 G without a copy of it: bfloat16 holds the test matrices exactly."""
    l, k = first.widths
    Omega = gaussian(first.shape.n, l, first.keys[0], G.device, G.dtype)
    Psi = gaussian(first.shape.m, k, first.keys[1], G.device, G.dtype)
    Y = torch.stack([torch.mm(g, Omega, out_dtype=first.dtype) for g in G])
    return Y, torch.stack([torch.mm(g.mT, Psi, out_dtype=first.dtype) for g in G])


def first_factors(solver: str, firsts: Sequence[FirstWindow], observed: list[Tensor]) -> Factors:
    """Return the factors of M_1 of parameters of one shape and rank, P matrices each.

    Args:
        solver: a name of `solver.SOLVERS`.
        firsts: one a parameter.
        observed: sums of what `FirstWindow.observe` returns, all parameters' one after another; finite.
    """
    if firsts[0].dense:
        return truncated_svd(observed[0], firsts[0].rank)
    each = len(observed[0]) // len(firsts)
    if solver == "gram" or (solver == "auto" and usable(observed[0].device)):
        return _first_by_gram(firsts, *observed)
    parts = zip(firsts, *(torch.split(t, each) for t in observed), strict=True)
    found = [init_factors(Y, Z, first.left(Y.device), first.rank) for first, Y, Z in parts]
    return Factors(*(torch.cat(values) for values in zip(*found, strict=True)))


def _first_by_gram(firsts: Sequence[FirstWindow], Y: Tensor, Z: Tensor) -> Factors:
    """Return what `momentum.init_factors` does, by Gram matrices."""
    each = len(Y) // len(firsts)
    YY, ZZ, PY = [], [], []
    for i, first in enumerate(firsts):
        y, z = (t[i * each : (i + 1) * each].double() for t in (Y, Z))
        YY.append(y.mT @ y), ZZ.append(z.mT @ z)
        PY.append(first.left(Y.device).double().mT @ y)
    left, s, right = start(torch.cat(YY), torch.cat(ZZ), torch.cat(PY), firsts[0].rank)
    return Factors(
        complete_frame(Y.double() @ left).to(Y.dtype), s.to(Y.dtype), complete_frame(Z.double() @ right).to(Y.dtype)
    )


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


def sketch_all(gradients: Sequence[Gradient | None], U: Tensor, V: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Return (G V, G' U) of parameters of one shape, `batch` matrices each: (B, m, r) and (B, n, r), None as zeros.

    Gradients are never stacked: products run per parameter, or in one kernel over the list of them.
    """
    tensors = [gradient.tensor for gradient in gradients if isinstance(gradient, DenseGradient)]
    if tensors and len(tensors) == sum(gradient is not None for gradient in gradients) and _have_kernel(tensors, U):
        from mofasgd.kernels.project import sketch_list

        return sketch_list([g.tensor if isinstance(g, DenseGradient) else None for g in gradients], U, V)
    parts = []
    for i, gradient in enumerate(gradients):
        u, v = U[i * batch : (i + 1) * batch], V[i * batch : (i + 1) * batch]
        parts.append((torch.zeros_like(u), torch.zeros_like(v)) if gradient is None else gradient.sketches(u, v))
    GV, GtU = (torch.cat(part) for part in zip(*parts, strict=True))
    return GV, GtU


def _have_kernel(tensors: Sequence[Tensor], U: Tensor) -> bool:
    """Whether one kernel sketches `tensors`: of one dtype below float64, contiguous, on the GPU of U in float32."""
    same = len({(t.dtype, t.device) for t in tensors} | {(tensors[0].dtype, U.device)}) == 1
    plain = tensors[0].dtype is not torch.float64 and U.dtype is torch.float32
    return same and plain and usable(U.device) and all(t.is_contiguous() for t in tensors)


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
