"""How the factors of a batch of matrices follow from the sketches of their gradients.

"svd" is the exact reference (`momentum.update_factors`), "gram" the same update by Gram matrices (`mofasgd.algebra`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mofasgd.algebra import Small, Weights, by_gram, combine, gram, seen, solve
from mofasgd.complement import seen_spaces
from mofasgd.momentum import Factors, real_columns, real_factors, tangent_square_norm, update_factors


class Problem(Protocol):
    """B matrices of one shape with a momentum, and the sketches of their gradients.

    Attributes:
        finite, nonzero: bool (B,), whether the sketches are; those by completion columns do not count.
        square_norms: (B,) float64, |Ghat|^2.
        before: the stored factors with zeros in place of completion columns.
    """

    finite: Tensor
    nonzero: Tensor
    square_norms: Tensor

    @property
    def before(self) -> Factors:
        """Real columns of the stored factors."""

    def spaces(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the complement leaves out (`complement.seen_spaces`); `sizes` (B,) are |G|_F in float64."""


class ExactProblem:
    """QR of the tall matrices and LAPACK's SVD of the core, in the dtype of the state."""

    def __init__(self, stored: Factors, GV: Tensor, GtU: Tensor) -> None:
        self.before = real_factors(*stored)
        kept = real_columns(stored.s)[:, None, :]
        GV, GtU = torch.where(kept, GV, 0.0), torch.where(kept, GtU, 0.0)
        self.finite = GV.isfinite().all(-1).all(-1) & GtU.isfinite().all(-1).all(-1)
        # LAPACK refuses NaN.
        mask = self.finite[:, None, None]
        self.GV, self.GtU = torch.where(mask, GV, 0.0), torch.where(mask, GtU, 0.0)
        self.nonzero = (self.GV != 0).any(-1).any(-1) | (self.GtU != 0).any(-1).any(-1)
        self.square_norms = tangent_square_norm(self.before.U, self.GV, self.GtU)

    def spaces(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """See `Problem`."""
        return seen_spaces(self.before.U, self.before.V, self.GV, self.GtU, sizes)

    def solve(self, beta: float | Tensor, factor: Tensor | None, active: Tensor) -> Factors:
        """Return the factors after the step where `active` (B,); anything elsewhere."""
        mask = active[:, None, None]
        GV, GtU = torch.where(mask, self.GV, 0.0), torch.where(mask, self.GtU, 0.0)
        if factor is not None:
            GV, GtU = GV * factor.to(GV.device), GtU * factor.to(GV.device)
        return update_factors(*self.before, GV, GtU, beta)


class GramProblem:
    """Gram matrices of the tall matrices, and small algebra that all problems of equal rank share (`measure`)."""

    small: Small
    finite: Tensor
    nonzero: Tensor
    square_norms: Tensor

    def __init__(self, stored: Factors, GV: Tensor, GtU: Tensor) -> None:
        self.stored, self.GV, self.GtU = stored, GV, GtU
        self.grams = gram(stored.U, GV), gram(stored.V, GtU)

    @property
    def before(self) -> Factors:
        """See `Problem`."""
        return real_factors(*self.stored)

    def spaces(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """See `Problem`."""
        left, right = seen(self.small, sizes)
        U, _, V = self.before
        every = torch.ones_like(self.finite)
        Q = torch.cat([U, combine(self.stored.U, self.GV, left, every)], dim=-1)
        return Q, torch.cat([V, combine(self.stored.V, self.GtU, right, every)], dim=-1)

    def apply(self, weights: Weights, active: Tensor) -> Factors:
        """Return the factors after the step where `active` (B,); anything elsewhere."""
        U, s, V = self.stored
        return Factors(
            combine(U, self.GV, weights.left, active),
            weights.s.to(s.dtype),
            combine(V, self.GtU, weights.right, active),
        )


def problem(solver: str, stored: Factors, GV: Tensor, GtU: Tensor) -> ExactProblem | GramProblem:
    """Return the problem of one batch; `solver` is a name of `SOLVERS`."""
    if by_gram(solver, stored.U, stored.V):
        return GramProblem(stored, GV, GtU)
    return ExactProblem(stored, GV, GtU)


def measure(problems: Sequence[ExactProblem | GramProblem]) -> None:
    """Set what the problems by Gram matrices say of their sketches; those of equal rank in one batch."""
    for members in _alike([problem for problem in problems if isinstance(problem, GramProblem)]):
        left, right, s = (
            torch.cat(parts) for parts in zip(*((*member.grams, member.stored.s) for member in members), strict=True)
        )
        r = s.shape[-1]
        # Sums of squares in float64 are finite exactly if their float32 terms are.
        finite = left.isfinite().all(-1).all(-1) & right.isfinite().all(-1).all(-1)
        mask = finite[:, None, None]
        left, right = torch.where(mask, left, 0.0), torch.where(mask, right, 0.0)
        real = real_columns(s).double()
        squares = ((left.diagonal(dim1=-2, dim2=-1) + right.diagonal(dim1=-2, dim2=-1))[:, r:] * real).sum(dim=-1)
        C = left[:, :r, r:] * real[:, :, None] * real[:, None, :]
        norms = (squares - C.square().sum(dim=(-2, -1))).clamp(min=0)
        counts = [len(member.stored.s) for member in members]
        parts = (_split(t, counts) for t in (left, right, s, finite, squares > 0, norms))
        for member, part in zip(members, zip(*parts, strict=True), strict=True):
            member.small = Small(*part[:3])
            member.finite, member.nonzero, member.square_norms = part[3:]


def _split(tensor: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = torch.split_with_sizes(tensor, counts)
    return parts


def _alike(problems: Sequence[GramProblem]) -> list[list[GramProblem]]:
    """Return the problems grouped by rank and device."""
    groups: dict[tuple[int, torch.device], list[GramProblem]] = {}
    for member in problems:
        groups.setdefault((member.stored.s.shape[-1], member.stored.s.device), []).append(member)
    return list(groups.values())


Batch = tuple["ExactProblem | GramProblem", "float | Tensor", Tensor]
"""A problem, beta, and which of its matrices move (B,)."""


def solve_all(batches: Sequence[Batch], factor: Tensor | None) -> Iterator[Factors]:
    """Yield the factors of every batch after the step, in order; `factor` (0-dim) scales the gradients.

    The small algebra of all shapes of equal rank and beta is one batch; the tall results are made one by one.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (batch, beta, _) in enumerate(batches):
        if isinstance(batch, GramProblem):
            key = (batch.small.s.shape[-1], batch.small.s.device, id(beta) if isinstance(beta, Tensor) else beta)
            groups.setdefault(key, []).append(i)
    found: dict[int, Weights] = {}
    for members in groups.values():
        smalls = [batch.small for batch, _, _ in (batches[i] for i in members) if isinstance(batch, GramProblem)]
        joined = Small(*(torch.cat(parts) for parts in zip(*smalls, strict=True)))
        counts = [len(small.s) for small in smalls]
        here = None if factor is None else factor.to(joined.s.device)
        solved = solve(joined, batches[members[0]][1], here)
        parts = [_split(part, counts) for part in solved]
        found |= {i: Weights(*part) for i, part in zip(members, zip(*parts, strict=True), strict=True)}
    for i, (batch, beta, active) in enumerate(batches):
        if isinstance(batch, GramProblem):
            yield batch.apply(found.pop(i), active)
        else:
            yield batch.solve(beta, factor, active)
