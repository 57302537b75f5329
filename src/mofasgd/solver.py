"""How the factors of a batch of matrices follow from the sketches of their gradients.

"svd" is the exact reference (`momentum.update_factors`), "gram" the same update by Gram matrices (`mofasgd.algebra`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mofasgd.algebra import Weights, by_gram, combine, extended, gram, observed, polished, seen, seen_columns, solve
from mofasgd.complement import seen_spaces
from mofasgd.momentum import Factors, moving, real_columns, real_factors, tangent_square_norm, update_factors


class Problem(Protocol):
    """B matrices of one shape with a momentum, and the sketches of their gradients, by which `measure` says more."""

    @property
    def finite(self) -> Tensor:
        """Bool (B,): the sketches and their squares are; those by completion columns do not count."""

    @property
    def moves(self) -> Tensor:
        """Bool (B,): finite, and some sketch is not zero."""

    @property
    def square_norms(self) -> Tensor:
        """(B,) float64: |Ghat|^2, 0 where it does not move."""

    def outcome(self) -> tuple[Tensor, Tensor] | None:
        """Return, once solved, `finite` and `moves` less what the momentum's overflow takes away; None: not known."""

    @property
    def before(self) -> Factors:
        """The stored factors with zeros in place of completion columns."""

    def spaces(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the complement leaves out (`complement.seen_spaces`); `sizes` (B,) are |G|_F in float64."""

    def solve(self, factor: Tensor | None, active: Tensor) -> Factors:
        """Return the factors after the step where `active` (B,), anything elsewhere; `factor` (0-dim) scales G."""


class Products(NamedTuple):
    """Factors after a step that stand as products: new U = [U GV] left, new V = [V GtU] right; on a GPU, in float32.

    Attributes:
        stored, sketches: U, s and V of the state, contiguous; GV and GtU.
        weights: `algebra.Weights` of these matrices.
        live: `momentum.moving` of their s, 1 or 0 in its dtype, (B, r).
    """

    stored: Factors
    sketches: tuple[Tensor, Tensor]
    weights: Weights
    live: Tensor

    @property
    def s(self) -> Tensor:
        """Singular values after the step (B, r)."""
        return self.weights.s

    def store(self, active: Tensor, scale: Tensor, left: Tensor, right: Tensor) -> None:
        """Put U and V into the state where `active` (B,).

        Args:
            active: the matrices that move.
            scale: (B, r) float32.
            left: becomes U diag(scale), (B, m, r), in its dtype; zeros where not active.
            right: becomes V', (B, r, n), in its dtype, zeros where not active.
        """
        from mofasgd.kernels.gram import advance

        (U, _, V), (GV, GtU) = self.stored, self.sketches
        advance(U, GV, self.weights.left, active, scale, left)
        advance(V, GtU, self.weights.right, active, None, right)
        # Autograd does not see what kernels write, and graphs that hold the factors are stale now.
        torch.autograd.graph.increment_version((U, V))


class ExactProblem:
    """QR of the tall matrices and LAPACK's SVD of the core, in the dtype of the state."""

    def __init__(self, stored: Factors, GV: Tensor, GtU: Tensor, beta: float | Tensor) -> None:
        self.beta, self.before = beta, real_factors(*stored)
        kept = real_columns(stored.s)[:, None, :]
        GV, GtU = torch.where(kept, GV, 0.0), torch.where(kept, GtU, 0.0)
        finite = GV.isfinite().all(-1).all(-1) & GtU.isfinite().all(-1).all(-1)
        # LAPACK refuses NaN.
        mask = finite[:, None, None]
        self.GV, self.GtU = torch.where(mask, GV, 0.0), torch.where(mask, GtU, 0.0)
        nonzero = (self.GV != 0).any(-1).any(-1) | (self.GtU != 0).any(-1).any(-1)
        squares = tangent_square_norm(self.before.U, self.GV, self.GtU)
        self.finite = finite & squares.isfinite()
        self.moves = self.finite & nonzero
        self.square_norms = torch.where(self.moves, squares, 0.0)

    def spaces(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """See `Problem`."""
        return seen_spaces(self.before.U, self.before.V, self.GV, self.GtU, sizes)

    def solve(self, factor: Tensor | None, active: Tensor) -> Factors:
        """See `Problem`."""
        mask = active[:, None, None]
        GV, GtU = torch.where(mask, self.GV, 0.0), torch.where(mask, self.GtU, 0.0)
        if factor is not None:
            GV, GtU = GV * factor.to(GV.device), GtU * factor.to(GV.device)
        return update_factors(*self.before, GV, GtU, self.beta)

    def outcome(self) -> None:
        """See `Problem`."""


class GramProblem:
    """Gram matrices of the tall matrices; the small algebra is that of a `GramBatch`, which `measure` makes."""

    batch: GramBatch
    number: int
    finite: Tensor
    moves: Tensor
    square_norms: Tensor

    def __init__(self, stored: Factors, GV: Tensor, GtU: Tensor, beta: float | Tensor) -> None:
        self.stored, self.GV, self.GtU, self.beta = stored, GV, GtU, beta

    @property
    def before(self) -> Factors:
        """See `Problem`."""
        return real_factors(*self.stored)

    def spaces(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """See `Problem`."""
        lengths, weights, kept = self.batch.seen[self.number]
        left, right = seen(lengths, weights, sizes)
        return extended(self.stored.U, self.GV, left, kept), extended(self.stored.V, self.GtU, right, kept)

    def solve(self, factor: Tensor | None, active: Tensor) -> Factors:
        """See `Problem`."""
        left, s, right = self.batch.solutions(factor)[self.number]
        return Factors(
            combine(self.stored.U, self.GV, left, active), s, combine(self.stored.V, self.GtU, right, active)
        )

    def products(self, factor: Tensor | None) -> Products:
        """Return what `solve` does, before it is multiplied."""
        weights = self.batch.solutions(factor)[self.number]
        return Products(self.stored, (self.GV, self.GtU), weights, self.batch.live[self.number])

    def outcome(self) -> tuple[Tensor, Tensor]:
        """See `Problem`."""
        return self.batch.outcomes[self.number]


class GramBatch:
    """The small algebra of problems of equal rank, device and beta, whatever their shapes.

    Attributes:
        small: what is read of all their tall matrices.
        finite, moves, square_norms: as in `Problem`, of all their matrices.
        outcome: the same, once there is a solution.
    """

    outcome: tuple[Tensor, Tensor]

    def __init__(self, members: Sequence[GramProblem]) -> None:
        self.beta, self._sizes = members[0].beta, [len(member.stored.s) for member in members]
        s = torch.cat([member.stored.s for member in members])
        self.dtype, (total, rank) = s.dtype, s.shape
        grams = torch.empty(2, total, 2 * rank, 2 * rank, dtype=torch.float64, device=s.device)
        for member, left, right in zip(members, *map(self._split, grams), strict=True):
            gram(member.stored.U, member.GV, left)
            gram(member.stored.V, member.GtU, right)
        self.small, self.finite, self.moves, self.square_norms = observed(grams, s)
        self._left, self._right = ([(m.stored[i], m.GV if i == 0 else m.GtU) for m in members] for i in (0, 2))
        self._solution: Weights | None = None
        self._solutions: list[Weights] | None = None
        flags = map(self._split, (self.finite, self.moves, self.square_norms))
        for number, (member, *own) in enumerate(zip(members, *flags, strict=True)):
            member.batch, member.number = self, number
            member.finite, member.moves, member.square_norms = own

    def _split(self, whole: Tensor, dim: int = 0) -> Sequence[Tensor]:
        """Return the problems' parts of a tensor: one call, where a slice each would be dozens a step."""
        return torch.split(whole, self._sizes, dim)

    @functools.cached_property
    def seen(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """`algebra.seen_columns`, which the complement asks for, and `Small.real`, of each problem."""
        lengths, weights = seen_columns(self.small)
        return list(zip(self._split(lengths, 1), self._split(weights, 1), self._split(self.small.real), strict=True))

    def solutions(self, factor: Tensor | None) -> list[Weights]:
        """Return `solution` of each problem."""
        if self._solutions is None:
            self._solutions = [Weights(*own) for own in zip(*map(self._split, self.solution(factor)), strict=True)]
        return self._solutions

    @functools.cached_property
    def live(self) -> Sequence[Tensor]:
        """`Products.live` of each problem, once there is a solution."""
        assert self._solution is not None
        return self._split(moving(self._solution.s).to(self.dtype))

    @functools.cached_property
    def outcomes(self) -> list[tuple[Tensor, Tensor]]:
        """`outcome` of each problem."""
        return list(zip(*map(self._split, self.outcome), strict=True))

    def solution(self, factor: Tensor | None) -> Weights:
        """Return the weights of all problems, s in the dtype of the state.

        The first call decides on the `factor` (0-dim) of the gradients.
        """
        if self._solution is None:
            here = None if factor is None else factor.to(self.finite.device, torch.float64)
            (left, s, right), closest = solve(self.small, self.beta, here)
            s = s.to(self.dtype)
            of_left, of_right = closest.chunk(2)
            left, right = polished(self._left, left, of_left), polished(self._right, right, of_right)
            self._solution = Weights(left, s, right)
            # Finite sketches may still add up to a momentum beyond the largest number.
            fits = s.sum(dim=-1) < math.inf
            self.outcome = self.finite & (fits | ~self.moves), self.moves & fits
        return self._solution


def replace_in(old: Tensor, new: Tensor, active: Tensor) -> None:
    """Put `new` (B, ...) in place of `old` where active (B,)."""
    torch.where(active.view(-1, *[1] * (old.dim() - 1)), new.view(old.shape), old, out=old)


def store(
    stored: Factors, after: Factors | Products, active: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Put U and V of `after` in place of the stored ones where active (B,); return what moves the weights there.

    That is U diag(scale) (B, m, r) in `dtype`, rounded once; and V (B, n, r), which may come in `dtype`, its transpose
    contiguous, as kernels read it. `scale` is (B, r).
    """
    U, _, V = stored
    left = torch.empty_like(U, dtype=dtype)
    if isinstance(after, Products):
        right = left.new_empty(len(V), V.shape[2], V.shape[1])
        after.store(active, scale, left, right)
        return left, right.mT
    replace_in(U, after.U, active)
    replace_in(V, after.V, active)
    torch.mul(U, scale[:, None, :], out=left)
    return left, V


def problem(solver: str, stored: Factors, GV: Tensor, GtU: Tensor, beta: float | Tensor) -> ExactProblem | GramProblem:
    """Return the problem of one batch; `solver` is a name of `SOLVERS`."""
    kind = GramProblem if by_gram(solver, stored.U, stored.V) else ExactProblem
    return kind(stored, GV, GtU, beta)


def measure(problems: Sequence[ExactProblem | GramProblem]) -> None:
    """Set what the problems by Gram matrices say of their sketches; those of equal rank and beta in one batch."""
    groups: dict[tuple[object, ...], list[GramProblem]] = {}
    for one in problems:
        if isinstance(one, GramProblem):
            beta = id(one.beta) if isinstance(one.beta, Tensor) else one.beta
            groups.setdefault((one.stored.s.shape[-1], one.stored.s.device, beta), []).append(one)
    for members in groups.values():
        GramBatch(members)
