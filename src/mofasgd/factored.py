"""One step of the factored parameters, in two phases around the global norm.

`observe` (the constructors) reads the window's gradient into sketches and says what each matrix adds to the norm;
`take` advances the momentum by the clipped sketches and moves the weights. Nothing here waits for the device: masks
decide there which matrices move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mofasgd.apply import Rounding, apply_update
from mofasgd.complement import complement_scale, normalized_complement
from mofasgd.layout import MatrixShape, as_matrices
from mofasgd.momentum import (
    Factors,
    init_factors,
    init_sketch,
    init_widths,
    moving,
    sketch,
    starts_from_gradient,
    tangent_square_norm,
    truncated_svd,
)
from mofasgd.options import Group
from mofasgd.rng import START_LEFT, START_RIGHT, gaussian, key_of
from mofasgd.solver import Solver


@dataclass
class Member:
    """A factored parameter in this step.

    Attributes:
        index: number of the parameter in the optimizer, as in its state_dict.
        param, group, state: the weight, its group, its state (`mofasgd.state`).
        shape: how it is cut into matrices; b of them below.
    """

    index: int
    param: Tensor
    group: Group
    state: dict[str, Tensor]
    shape: MatrixShape

    def gradient(self) -> Tensor:
        """Return the gradient as (b, m, n)."""
        assert self.param.grad is not None
        return as_matrices(self.param.grad, self.shape)

    def factors(self) -> Factors:
        """Return U (b, m, r), s (b, r), V (b, n, r) of the state."""
        b = self.shape.batch
        return Factors(*(self.state[k].reshape(b, *self.state[k].shape[len(self.shape.lead) :]) for k in "UsV"))

    def initialized(self) -> Tensor:
        """Return which matrices have a momentum, bool (b,)."""
        return self.state["initialized"].reshape(self.shape.batch)


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
        group: with `lr_scale` and `transposed` (rows are inputs, not outputs).
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
    """Return the step of `member`'s group: polar or reciprocal, with the normalized complement if it is asked for."""
    group, shape = member.group, member.shape
    live = moving(after.s)
    if group["update"] == "polar":
        coefficients = live.to(after.s.dtype)
    else:
        inside = live & (after.s > group["clip_eps"])
        coefficients = torch.where(inside, group["eta1"] * (1 / after.s).clamp(max=group["max_value"]), 0.0)
    square_norm = coefficients.square().sum(dim=-1)
    extra = None
    if group["complement"]:
        # A matrix that is not active (a NaN, say) does not move; LAPACK must not see it.
        G = torch.where(active[:, None, None], member.gradient(), 0.0)
        extra = normalized_complement(before.U, before.V, *sketch(G, before.U, before.V), G)
        extra *= complement_scale(group["complement"], shape.m, shape.n)
        square_norm = square_norm + extra.square().sum(dim=(-2, -1))
    left = after.U * coefficients[:, None, :]
    return Displacement(left, after.V, extra, lr_factor(group, shape, square_norm))


def start_matrices(seed: int, index: int, shape: MatrixShape, rank: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return Omega (n, l) and Psi (m, k) of a parameter's first window, on the device and in the dtype of `like`."""
    width, height = init_widths(rank)
    Omega = gaussian(shape.n, width, key_of(seed, START_RIGHT, index), like.device, like.dtype)
    Psi = gaussian(shape.m, height, key_of(seed, START_LEFT, index), like.device, like.dtype)
    return Omega, Psi


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.isfinite().all(dim=-1).all(dim=-1) for t in tensors]).all(dim=0)


def _any_nonzero(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([(t != 0).any(dim=-1).any(dim=-1) for t in tensors]).any(dim=0)


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

    Attributes:
        finite: bool (M,), one for each member.
        active: bool (B,), the matrices that move: finite and with a non-zero sketch.
        square_norm: 0-dim float64, |Ghat|^2 summed over the active matrices.
    """

    def __init__(self, members: list[Member], context: Context) -> None:
        self.members, self.context = members, context
        self.before = Factors(*(torch.cat(parts) for parts in zip(*(m.factors() for m in members), strict=True)))
        # Products with G run per matrix: gradients are never stacked.
        sketches = [sketch(m.gradient(), *m.factors()[::2]) for m in members]
        GV, GtU = (torch.cat(parts) for parts in zip(*sketches, strict=True))
        self.finite, self.active = self._judge((GV, GtU))
        self.GV, self.GtU = self._clean(GV), self._clean(GtU)
        self.square_norm = tangent_square_norm(self.before.U, self.GV, self.GtU).sum()

    def _judge(self, observed: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return (finite (M,), active (B,)) by the elements of what was observed, each (B, ., .)."""
        b = self.members[0].shape.batch
        # A parameter is skipped as a whole, a zero slice of a stack on its own.
        finite = _all_finite(observed).view(-1, b).all(dim=1)
        active = finite.repeat_interleave(b) & _any_nonzero(observed)
        gate = self.context.gate
        return finite, active if gate is None else active & gate.to(active.device)

    def _clean(self, observed: Tensor) -> Tensor:
        """Return `observed` (B, ., .) with zeros where the matrix does not move: LAPACK refuses NaN."""
        return torch.where(self.active[:, None, None], observed, 0.0)

    def advance(self, factor: Tensor | None) -> Factors:
        """Return the factors after this step; `factor` (0-dim) scales the gradient."""
        GV, GtU = (self.GV, self.GtU) if factor is None else (self.GV * factor, self.GtU * factor)
        after = self.context.solver(*self.before, GV, GtU, self.members[0].group["beta"])
        return _pick(self.active, after, self.before)

    def take(self, factor: Tensor | None) -> None:
        """Advance momentum and weights of all members."""
        after = self.advance(factor)
        b = self.members[0].shape.batch
        for i, member in enumerate(self.members):
            part = slice(i * b, (i + 1) * b)
            before_i, after_i = (Factors(*(t[part] for t in f)) for f in (self.before, after))
            _finish(member, before_i, after_i, self.active[part], self.context)


class Start(Update):
    """A parameter in its first window: the momentum becomes M_1. A stack may hold started matrices as well."""

    def __init__(self, member: Member, context: Context) -> None:
        self.members, self.context = [member], context
        self.before = member.factors()
        rank, shape, G = self.before.s.shape[-1], member.shape, member.gradient()
        if starts_from_gradient(shape.m, shape.n, rank):
            G = G.to(self.before.U.dtype)
            self.finite, self.active = self._judge([G])
            self.first = truncated_svd(self._clean(G), rank)
        else:
            Omega, Psi = start_matrices(context.seed, member.index, shape, rank, self.before.U)
            Y, Z = init_sketch(G, Omega, Psi)
            self.finite, self.active = self._judge([Y, Z])
            self.first = init_factors(self._clean(Y), self._clean(Z), Psi, rank)
        squares = self.first.s.double().square().sum(dim=-1)
        self.rest = None
        if shape.lead:
            self.rest = Update([member], context)
            started = member.initialized()
            self.active = torch.where(started, self.rest.active, self.active)
            rest = tangent_square_norm(self.rest.before.U, self.rest.GV, self.rest.GtU)
            squares = torch.where(started, rest, squares)
        self.square_norm = (squares * self.active).sum()

    def advance(self, factor: Tensor | None) -> Factors:
        """Return M_1 of the matrices that start, the update of those that have started."""
        first = self.first if factor is None else self.first._replace(s=self.first.s * factor)
        member = self.members[0]
        after = first if self.rest is None else _pick(member.initialized(), self.rest.advance(factor), first)
        after = _pick(self.active, after, self.before)
        # M_1 has no factors before it; the complement is then taken of its own.
        self.before = _pick(member.initialized(), self.before, after)
        return after


def _finish(member: Member, before: Factors, after: Factors, active: Tensor, context: Context) -> None:
    """Store `after` and move the weight where `active` (b,)."""
    group, state = member.group, member.state
    move = context.displace(member, before, after, active)
    for name, value in zip("UsV", after, strict=True):
        state[name].copy_(value.view(state[name].shape))
    state["initialized"].logical_or_(active.view(state["initialized"].shape))
    state["step"] += active.any()

    compute = torch.promote_types(member.param.dtype, move.left.dtype)
    moves = active.to(compute)
    rate = moves[:, None, None] * (group["lr"] * move.scale)
    left = move.left * rate
    extra = None
    if move.extra is not None:
        extra = torch.where(active[:, None, None], move.extra, 0.0) * rate
    decay = group["weight_decay"]
    # A decay of 0 saves a pass over the weight; as a tensor it cannot be read here.
    keep = None if isinstance(decay, (int, float)) and decay == 0 else 1 - moves * (group["lr"] * decay)
    rounding = Rounding.of(context.stochastic_rounding, context.seed, member.index, state["step"])
    weight = as_matrices(member.param, member.shape)
    apply_update(weight, left, move.right, extra, keep, rounding)
    if weight.data_ptr() != member.param.data_ptr():
        # The layout is no view of these strides (a channels-last convolution): the copy was updated.
        member.param.copy_(weight.view(member.param.shape))
