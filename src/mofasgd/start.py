"""The first window of factored parameters: their momenta become M_1, found from sketches of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from mofasgd.buckets import Bucket, Member
from mofasgd.complement import seen_spaces
from mofasgd.factored import Context, Update, clean
from mofasgd.gradient import FirstWindow, first_factors, start_all
from mofasgd.kernels import usable
from mofasgd.momentum import Factors, init_widths, power_of_two, real_factors, sketch

TOGETHER = 1 << 26
"""Elements of sketches that are turned into momenta at a time (256 MiB, some temporaries as large)."""


class Start(Update):
    """Parameters of one shape and group in their first window; one stack alone may hold started matrices as well."""

    starts = True

    def __init__(self, bucket: Bucket, pending: list[int], context: Context) -> None:
        """Observe parameters whose matrices number `pending` (of b each) have no momentum yet."""
        members = bucket.members
        self.every = len(pending) == members[0].shape.batch
        assert self.every or len(members) == 1
        device = members[0].param.device
        self.pending = torch.arange(len(members) * len(pending), device=device)
        self.places = None if self.every else torch.tensor(pending, device=device)
        super().__init__(bucket, context)

    @staticmethod
    def most(member: Member) -> int:
        """Return how many parameters like `member` may start together: sketches of many are held at once."""
        if not usable(member.param.device):
            return 1
        (right, left), shape = init_widths(member.state["s"].shape[-1]), member.shape
        return max(1, TOGETHER // (shape.batch * (shape.m * right + shape.n * left)))

    def sketch(self) -> None:
        """Sketch the gradients by the test matrices."""
        self.problem = None
        if not self.every:
            # Pending matrices have zero factors, hence zero sketches and no part in this.
            super().sketch()
            assert self.places is not None
            self.pending = self.places
        rank, dtype = self.stored.s.shape[-1], self.stored.U.dtype
        firsts = [FirstWindow(self.context.seed, m.index, self.shape, rank, dtype) for m in self.members]
        gradients = [member.gradient for member in self.members if member.gradient is not None]
        joined = start_all(firsts, gradients, self.places)
        # NaN is neither below infinity nor above zero.
        largest = torch.stack([torch.linalg.vector_norm(t, torch.inf, dim=(-2, -1)) for t in joined])
        finite, nonzero = (largest < torch.inf).all(dim=0), (largest > 0).any(dim=0)
        # M_1 is found at a power of two of its size, which may be out of range until the gradient is clipped.
        moves = finite & nonzero
        joined = [clean(t, moves) for t in joined]
        scale = power_of_two(*joined)
        # In place: beside what the factorization holds, the sketches as they came would be too much.
        joined = [t.div_(scale) for t in joined]
        self.first = first_factors(self.context.solver, firsts, joined)
        self.s = self.first.s.double() * scale[..., 0]
        squares = self.s.square().sum(dim=-1)
        # A factorization that failed is no number either, and would spoil the norm of all.
        finite, moves = finite & (squares < torch.inf), moves & (squares < torch.inf)
        self.found = finite, moves, torch.where(moves, squares, 0.0)

    def observe(self) -> None:
        """Set `finite`, `active` and `square_norms` by the sketches."""
        finite, moves, squares = self.found
        if self.every:
            self.judge(finite, moves, squares)
            return
        super().observe()
        # The parameter's finiteness is that of both its parts.
        all_finite = self.finite.repeat_interleave(self.b).index_copy(0, self.pending, finite)
        self.judge(
            all_finite,
            self.active.index_copy(0, self.pending, moves),
            self.square_norms.index_copy(0, self.pending, squares),
        )

    def after(self, factor: Tensor | None) -> Factors:
        """Return M_1 of the matrices that start, the update of those that have started."""
        s = self.s if factor is None else self.s * factor
        first = self.first._replace(s=s.to(self.first.s.dtype))
        return first if self.every else self._with(self.solved(factor), first)

    def before(self) -> Factors:
        """Return M_1 of the matrices that start: it has no factors before it; the complement is taken of its own."""
        first = real_factors(*self.first)
        return first if self.every else self._with(super().before(), first)

    def spaces(self) -> tuple[Tensor, Tensor]:
        """Return what the complement leaves out; the matrices that start are sketched by M_1."""
        U, _, V = self.before()
        found = []
        for part, member in self.parts():
            G = clean(member.dense(), self.active[part])
            G = G / power_of_two(G)
            size = torch.linalg.vector_norm(G, dim=(-2, -1), dtype=torch.float64)
            found.append(seen_spaces(U[part], V[part], *sketch(G, U[part], V[part]), size))
        Q, P = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Q, P

    def _with(self, factors: Factors, first: Factors) -> Factors:
        """Return `factors` with `first` in the pending places."""
        return Factors(*(old.index_copy(0, self.pending, new) for old, new in zip(factors, first, strict=True)))
