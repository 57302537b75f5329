"""Where a step reads a factored parameter's gradient: a tensor, or the sketches that backward has summed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mofasgd.algebra import by_gram, start
from mofasgd.columns import completed, tall_product
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
from mofasgd.rng import START_LEFT, START_RIGHT, gaussian, gaussians, key_of


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


def start_all(firsts: Sequence[FirstWindow], gradients: Sequence[Gradient], places: Tensor | None) -> list[Tensor]:
    """Return what the start needs of parameters of one shape and rank, all parameters' one after another.

    Args:
        firsts, gradients: one a parameter.
        places: numbers of the matrices that start (None: all), for a single parameter.
    """
    first, low = firsts[0], torch.bfloat16
    tensors = dense_tensors(gradients, first.dtype)
    if not tensors or tensors[0] is None or tensors[0].dtype is not low or first.dense or places is not None:
        parts = [gradient.start(own, places) for gradient, own in zip(gradients, firsts, strict=True)]
        return [torch.cat(part) for part in zip(*parts, strict=True)]
    from mofasgd.kernels.project import sketch_list

    # bfloat16 holds the test matrices exactly.
    device, (right, left) = tensors[0].device, first.widths
    Omega = gaussians(first.shape.n, right, [f.keys[0] for f in firsts], device, low)
    Psi = gaussians(first.shape.m, left, [f.keys[1] for f in firsts], device, low)
    each = first.shape.batch
    if each > 1:
        Omega, Psi = Omega.repeat_interleave(each, dim=0), Psi.repeat_interleave(each, dim=0)
    return list(sketch_list(tensors, Psi, Omega))


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
    if by_gram(solver, *observed):
        return _first_by_gram(firsts, *observed)
    parts = zip(firsts, *(torch.split(t, each) for t in observed), strict=True)
    found = [init_factors(Y, Z, first.left(Y.device), first.rank) for first, Y, Z in parts]
    return Factors(*(torch.cat(values) for values in zip(*found, strict=True)))


def _first_by_gram(firsts: Sequence[FirstWindow], Y: Tensor, Z: Tensor) -> Factors:
    """Return what `momentum.init_factors` does, by Gram matrices."""
    each, first = len(Y) // len(firsts), firsts[0]
    Psi = gaussians(first.shape.m, first.widths[1], [f.keys[1] for f in firsts], Y.device, Y.dtype).double()
    Psi = Psi if each == 1 else Psi.repeat_interleave(each, dim=0)
    tall = Y.double()
    YY, PY, ZZ = tall_product(tall, tall), tall_product(Psi, tall), Z.double()
    ZZ = tall_product(ZZ, ZZ)
    del tall, Psi
    left, s, right = start(YY, ZZ, PY, first.rank)
    U = completed(Y.double() @ left, first.shape.m)
    V = completed(Z.double() @ right, first.shape.n)
    return Factors(U.to(Y.dtype), s.to(Y.dtype), V.to(Y.dtype))


class Gradient(Protocol):
    """A factored parameter's gradient in a step, as b matrices; not scaled by clipping."""

    def sketches(self, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """Return (G V, G' U) by the stored factors, (b, m, r) and (b, n, r)."""

    def ready(self) -> tuple[Tensor, Tensor] | None:
        """Return (G V, G' U) of a single matrix, (m, r) and (n, r), if backward has left them as they are."""

    def start(self, first: FirstWindow, places: Tensor | None) -> tuple[Tensor, ...]:
        """Return `first.observe` of the matrices number `places` (None: all). May be called once."""

    def dense(self) -> Tensor:
        """Return G (b, m, n).

        Raises:
            ValueError: if only its sketches exist.
        """


def sketch_all(
    gradients: Sequence[Gradient | None], U: Tensor, V: Tensor, batch: int, *, measure: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (G V, G' U) of parameters of one shape, `batch` matrices each: (B, m, r) and (B, n, r), None as zeros.

    Gradients are never stacked: products run per parameter, or in one kernel over the list of them.

    With `measure` the third is |G|_F^2 (B,) float64 as `kernels.norm.norms_of` takes it, if it costs no read of G.
    """
    if tensors := dense_tensors(gradients, U.dtype):
        from mofasgd.kernels.project import sketch_and_measure, sketch_list

        return sketch_and_measure(tensors, U, V) if measure else (*sketch_list(tensors, U, V), None)
    ready = [pair for gradient in gradients if gradient is not None and (pair := gradient.ready()) is not None]
    if len(ready) == len(gradients):
        # A view for each of hundreds of layers would cost more than these two kernels.
        right, left = zip(*ready, strict=True)
        return torch.stack(right), torch.stack(left), None
    parts = []
    for i, gradient in enumerate(gradients):
        u, v = U[i * batch : (i + 1) * batch], V[i * batch : (i + 1) * batch]
        parts.append((torch.zeros_like(u), torch.zeros_like(v)) if gradient is None else gradient.sketches(u, v))
    GV, GtU = (torch.cat(part) for part in zip(*parts, strict=True))
    return GV, GtU, None


def dense_tensors(gradients: Sequence[Gradient | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Return the gradients as tensors if kernels read them as they are, beside factors of `dtype`; else nothing.

    They are of one dtype below float64, contiguous, on one GPU; a missing one stays None.
    """
    tensors: list[Tensor | None] = []
    for gradient in gradients:
        if gradient is not None and not isinstance(gradient, DenseGradient):
            return []
        tensors.append(None if gradient is None else gradient.tensor)
    some = [tensor for tensor in tensors if tensor is not None]
    kinds = {(tensor.dtype, tensor.device) for tensor in some}
    if len(kinds) != 1 or dtype is not torch.float32 or not all(map(Tensor.is_contiguous, some)):
        return []
    ((own, device),) = kinds
    return tensors if usable(device) and own is not torch.float64 else []


@dataclass(slots=True)
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

    def ready(self) -> None:
        """Return None: nobody has sketched it."""

    def start(self, first: FirstWindow, places: Tensor | None) -> tuple[Tensor, ...]:
        """Return the first window's sketches."""
        G = self.dense()
        return first.observe(G if places is None else G[places])
