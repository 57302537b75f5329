"""One step of the factored parameters, in two phases around the global norm.

Constructing an `Update` or a `Start` reads the window's gradient into sketches and says what each matrix adds to the
norm; `take` advances the momentum by the clipped sketches and moves the weights. Masks decide on the device which
matrices move, so that nothing is read back, except by torch's own SVD on CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mofasgd.apply import Rounding, apply_update
from mofasgd.complement import complement_scale, normalized_complement, seen_spaces
from mofasgd.gradient import FirstWindow, Gradient
from mofasgd.layout import MatrixShape, as_matrices
from mofasgd.momentum import Factors, moving, power_of_two, real_columns, real_factors, sketch, tangent_square_norm
from mofasgd.options import Group, number
from mofasgd.solver import Solver


@dataclass
class Member:
    """A factored parameter in this step.

    Attributes:
        index: number of the parameter in the optimizer, as in its state_dict.
        param, group, state: the weight, its group, its state (`mofasgd.state`).
        shape: how it is cut into matrices; b of them below.
        gradient: of this window, not scaled by `factor`.
        factor: of the gradient (clipping and GradScaler's scale), 0-dim, once it is known; None: 1.
        spaces: what the complement leaves out, (b, m, 2r) and (b, n, 2r), once it is known and if it is asked for.
    """

    index: int
    param: Tensor
    group: Group
    state: dict[str, Tensor]
    shape: MatrixShape
    gradient: Gradient
    factor: Tensor | None = None
    spaces: tuple[Tensor, Tensor] | None = None

    def factors(self) -> Factors:
        """Return U (b, m, r), s (b, r), V (b, n, r) of the state."""
        b = self.shape.batch
        lead = len(self.shape.lead)
        return Factors(*(self.state[k].reshape(b, *self.state[k].shape[lead:]) for k in Factors._fields))


class Displacement(NamedTuple):
    """What is subtracted from a weight (b, m, n) before lr: scale * (left right' + extra)."""

    left: Tensor
    right: Tensor
    extra: Tensor | None
    scale: float | Tensor


Displace = Callable[[Member, Factors, Factors, Tensor], Displacement]


@dataclass(frozen=True)
class Context:
    """What every parameter of a step shares.

    Attributes:
        solver: updates a batch of factors.
        displace: turns factors before and after the update into the step.
        seed: of the random numbers.
        stochastic_rounding: of bfloat16 weights.
        gate: 0-dim bool tensor or None; False skips the whole step (GradScaler's found_inf).
    """

    solver: Solver
    displace: Displace
    seed: int
    stochastic_rounding: bool
    gate: Tensor | None


def lr_factor(group: Group, shape: MatrixShape, square_norm: Tensor) -> float | Tensor:
    """Return the factor of lr for weights of `shape` (`lr_scale`, DESIGN section 2).

    Args:
        group: with `lr_scale` and `transposed`.
        shape: m and n are used.
        square_norm: (b,), |D|_F^2 of the step, equal to the number of directions that move if it is U V' alone.

    Returns:
        "none": 1. "spectral": sqrt(max(1, out / in)). "match_rms_adamw": what makes the root mean square of the
        update 0.2 lr, a tensor (b, 1, 1).
    """
    if group["lr_scale"] == "none":
        return 1.0
    if group["lr_scale"] == "spectral":
        out, inp = (shape.n, shape.m) if group["transposed"] else (shape.m, shape.n)
        return math.sqrt(max(1.0, out / inp))
    # A step that is zero needs no scale; the bound only keeps 0 * inf away.
    return 0.2 * (shape.m * shape.n / square_norm.clamp(min=0.5)).sqrt()[:, None, None]


def displacement(member: Member, before: Factors, after: Factors, active: Tensor) -> Displacement:
    """Return the step of `member`'s group: polar or reciprocal, with the normalized complement if it is asked for.

    `before` is for other steps than the package's own (`mofasgd.paper`).
    """
    group, shape = member.group, member.shape
    live = moving(after.s)
    if group["update"] == "polar":
        coefficients = live.to(after.s.dtype)
    else:
        inside = live & (after.s > group["clip_eps"])
        coefficients = torch.where(inside, group["eta1"] * (1 / after.s).clamp(max=group["max_value"]), 0.0)
    square_norm = coefficients.square().sum(dim=-1)
    extra = None
    if member.spaces is not None:
        Q, P = member.spaces
        G = _clean(member.gradient.dense(), active)
        # Rows of E are outputs; a transposed weight keeps those in columns.
        extra = normalized_complement(P, Q, G.mT).mT if group["transposed"] else normalized_complement(Q, P, G)
        extra *= complement_scale(group["complement"], shape.m, shape.n)
        square_norm = square_norm + extra.square().sum(dim=(-2, -1))
    left = after.U * coefficients[:, None, :]
    return Displacement(left, after.V, extra, lr_factor(group, shape, square_norm))


def _clean(observed: Tensor, active: Tensor) -> Tensor:
    """Return `observed` (B, ., .) with zeros where the matrix does not move: LAPACK refuses NaN."""
    return torch.where(active[:, None, None], observed, 0.0)


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.isfinite().all(dim=-1).all(dim=-1) for t in tensors]).all(dim=0)


def _any_nonzero(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([(t != 0).any(dim=-1).any(dim=-1) for t in tensors]).any(dim=0)


def _sizes(G: Tensor) -> Tensor:
    """Return |G|_F of each matrix (B, m, n) in float64."""
    sizes: Tensor = torch.linalg.vector_norm(G, dim=(-2, -1), dtype=torch.float64)
    return sizes


def _pick(mask: Tensor, yes: Factors, no: Factors) -> Factors:
    """Return the factors of `yes` where mask (B,), those of `no` elsewhere."""
    wide = mask[:, None, None]
    return Factors(
        torch.where(wide, yes.U, no.U),
        torch.where(mask[:, None], yes.s, no.s),
        torch.where(wide, yes.V, no.V),
    )


class Update:
    """Parameters of one shape and one group whose matrices have a momentum: one batch of small algebra.

    There are `count` parameters of b matrices each, B = count * b.

    Attributes:
        stored, before: factors as in the state, and their real columns, whose sketches count.
        finite: bool (count,), whether a parameter's sketch is; after `take`, also whether its new momentum is.
        active: bool (B,), the matrices that move: finite and with a non-zero sketch.
        square_norms: (B,) float64, |Ghat|^2 of the active matrices, 0 elsewhere.
    """

    def __init__(self, members: list[Member], context: Context) -> None:
        self.members, self.context = members, context
        self.b = members[0].shape.batch
        self.stored = Factors(*(torch.cat(parts) for parts in zip(*(m.factors() for m in members), strict=True)))
        self.before = real_factors(*self.stored)
        # Products with G run per matrix: gradients are never stacked.
        sketches = [
            member.gradient.sketches(self.stored.U[part], self.stored.V[part]) for part, member in self._parts()
        ]
        kept = real_columns(self.stored.s)[:, None, :]
        GV, GtU = (torch.where(kept, torch.cat(parts), 0.0) for parts in zip(*sketches, strict=True))
        # A parameter is skipped as a whole, a zero slice of a stack on its own.
        self.finite = _all_finite((GV, GtU)).view(-1, self.b).all(dim=1)
        self.active = self._gated(self.finite.repeat_interleave(self.b) & _any_nonzero((GV, GtU)))
        self.GV, self.GtU = _clean(GV, self.active), _clean(GtU, self.active)
        self._measure(tangent_square_norm(self.before.U, self.GV, self.GtU))

    def _parts(self) -> Iterator[tuple[slice, Member]]:
        """Yield every member with its part of the batch."""
        for i, member in enumerate(self.members):
            yield slice(i * self.b, (i + 1) * self.b), member

    def _measure(self, squares: Tensor) -> None:
        """Set `square_norms`; a parameter whose norm is beyond float64 is not finite."""
        self.finite = self.finite & squares.isfinite().view(-1, self.b).all(dim=1)
        self.active = self.active & self.finite.repeat_interleave(self.b)
        self.square_norms = torch.where(self.active, squares, 0.0)

    def _gated(self, active: Tensor) -> Tensor:
        gate = self.context.gate
        return active if gate is None else active & gate.to(active.device)

    def advance(self, factor: Tensor | None) -> Factors:
        """Return the factors after this step where active, else anything; `factor` (0-dim) scales the gradient."""
        GV, GtU = (self.GV, self.GtU) if factor is None else (self.GV * factor, self.GtU * factor)
        return self.context.solver(*self.before, GV, GtU, number(self.members[0].group["beta"]))

    def spaces(self) -> tuple[Tensor, Tensor]:
        """Return what the complement leaves out (`complement.seen_spaces`)."""
        sizes = torch.cat([_sizes(_clean(m.gradient.dense(), self.active[part])) for part, m in self._parts()])
        return seen_spaces(self.before.U, self.before.V, self.GV, self.GtU, sizes)

    def take(self, factor: Tensor | None) -> None:
        """Advance momentum and weights of all members; `factor` (0-dim) scales the gradient."""
        after = self.advance(factor)
        # Finite sketches may still add up to a momentum beyond the largest number.
        fits = after.s.isfinite().all(dim=-1) | ~self.active
        self.finite = self.finite & fits.view(-1, self.b).all(dim=1)
        active = self.active & self.finite.repeat_interleave(self.b)
        after = _pick(active, after, self.stored)
        spaces = self.spaces() if self.members[0].group["complement"] else None
        for part, member in self._parts():
            member.factor = factor
            member.spaces = None if spaces is None else (spaces[0][part], spaces[1][part])
            before_i, after_i = (Factors(*(t[part] for t in f)) for f in (self.before, after))
            _finish(member, before_i, after_i, active[part], self.context)


class Start(Update):
    """A parameter in its first window: the momentum becomes M_1. A stack may hold started matrices as well."""

    def __init__(self, member: Member, pending: list[int], context: Context) -> None:
        """Observe `member`, whose matrices number `pending` (in its batch) have no momentum yet."""
        # Pending matrices have zero factors, hence zero sketches and no part in this.
        super().__init__([member], context)
        device = self.stored.U.device
        every = len(pending) == self.b
        self.pending = torch.arange(self.b, device=device) if every else torch.tensor(pending, device=device)
        how = FirstWindow(context.seed, member.index, member.shape, self.stored.s.shape[-1], self.stored.U.dtype)
        observed = member.gradient.start(how, None if every else self.pending)
        self.finite = self.finite & _all_finite(observed).all()
        starts = self._gated(self.finite & _any_nonzero(observed))
        self.active = self.active.index_copy(0, self.pending, starts)
        # M_1 is found at a power of two of its size, which may be out of range until the gradient is clipped.
        clean = [_clean(t, starts) for t in observed]
        scale = power_of_two(*clean)
        self.first = how.factors([t / scale for t in clean])
        self.s = self.first.s.double() * scale[..., 0]
        self._measure(self.square_norms.index_copy(0, self.pending, self.s.square().sum(dim=-1)))

    def advance(self, factor: Tensor | None) -> Factors:
        """Return M_1 of the matrices that start, the update of those that have started."""
        s = self.s if factor is None else self.s * factor
        first = self.first._replace(s=s.to(self.first.s.dtype))
        after = first if len(self.pending) == self.b else self._with(super().advance(factor), first)
        # M_1 has no factors before it; the complement is then taken of its own.
        self.before = self._with(self.before, real_factors(*first))
        return after

    def _with(self, factors: Factors, first: Factors) -> Factors:
        """Return `factors` with `first` in the pending places."""
        return Factors(*(old.index_copy(0, self.pending, new) for old, new in zip(factors, first, strict=True)))

    def spaces(self) -> tuple[Tensor, Tensor]:
        """Return what the complement leaves out; the matrices that start are sketched by M_1."""
        G = _clean(self.members[0].gradient.dense(), self.active)
        G = G / power_of_two(G)
        return seen_spaces(self.before.U, self.before.V, *sketch(G, self.before.U, self.before.V), _sizes(G))


def _finish(member: Member, before: Factors, after: Factors, active: Tensor, context: Context) -> None:
    """Store `after` and move the weight where `active` (b,)."""
    group, state = member.group, member.state
    move = context.displace(member, before, after, active)
    for name, value in zip(Factors._fields, after, strict=True):
        state[name].copy_(value.view(state[name].shape))
    state["initialized"].logical_or_(active.view(state["initialized"].shape))
    state["step"] += active.any()

    compute = torch.promote_types(member.param.dtype, move.left.dtype)
    moves = active.to(compute)
    lr, decay = number(group["lr"]), number(group["weight_decay"])
    rate = moves[:, None, None] * (lr * move.scale)
    left = move.left * rate
    extra = None if move.extra is None else move.extra.mul_(rate)
    # A decay of 0 saves a pass over the weight; as a tensor it cannot be read here.
    keep = None if isinstance(decay, (int, float)) and decay == 0 else 1 - moves * (lr * decay)
    rounding = Rounding.of(context.stochastic_rounding, context.seed, member.index, state["step"])
    weight = as_matrices(member.param, member.shape)
    apply_update(weight, left, move.right, extra, keep, rounding)
    if weight.data_ptr() != member.param.data_ptr():
        # The layout is no view of these strides (a channels-last convolution): the copy was updated.
        member.param.copy_(weight.view(member.param.shape))
