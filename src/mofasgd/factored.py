"""One step of the factored parameters, in two phases around the global norm.

Constructing an `Update` (or a `start.Start`) reads the window's gradient into sketches and says what each matrix adds
to the norm; `take` advances the momenta by the clipped sketches and moves the weights. Masks decide on the device which
matrices move, so that nothing is read back, except by torch's own SVD on CUDA.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mofasgd.apply import Rounding, apply_update
from mofasgd.buckets import Bucket, Member
from mofasgd.complement import complement_scale, normalized_complement
from mofasgd.dist.shards import Part, local
from mofasgd.gradient import dense_tensors, sketch_all
from mofasgd.kernels import usable
from mofasgd.layout import MatrixShape, as_matrices
from mofasgd.momentum import Factors, moving
from mofasgd.options import Group, number
from mofasgd.residual import complement_square_norm, residual_factors, row_scales
from mofasgd.solver import ExactProblem, GramProblem, Products, measure, problem, replace_in, store


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
        solver: name of what updates the factors (`mofasgd.solver`).
        displace: turns one parameter's factors before and after the update into a step of another kind than the
            package's own (`mofasgd.paper`), or None.
        seed: of the random numbers.
        stochastic_rounding: of bfloat16 weights.
        gate: 0-dim bool tensor or None; False skips the whole step (GradScaler's found_inf).
    """

    solver: str
    displace: Displace | None
    seed: int
    stochastic_rounding: bool
    gate: Tensor | None

    def gated(self, active: Tensor) -> Tensor:
        """Return `active`, all False if the gate is closed."""
        return active if self.gate is None else active & self.gate.to(active.device)


def lr_factor(group: Group, shape: MatrixShape, square_norm: Tensor | None) -> float | Tensor:
    """Return the factor of lr for weights of `shape` (`lr_scale`).

    Args:
        group: with `lr_scale` and `transposed`.
        shape: m and n are used.
        square_norm: (B,), |D|_F^2 of the step, equal to the number of directions that move if it is U V' alone;
            only "match_rms_adamw" reads it.

    Returns:
        "none": 1. "spectral": sqrt(max(1, out / in)). "match_rms_adamw": what makes the root mean square of the
        update 0.2 lr, a tensor (B,).
    """
    if group["lr_scale"] == "none":
        return 1.0
    if group["lr_scale"] == "spectral":
        out, inp = (shape.n, shape.m) if group["transposed"] else (shape.m, shape.n)
        return math.sqrt(max(1.0, out / inp))
    assert square_norm is not None
    # A step that is zero needs no scale; the bound only keeps 0 * inf away.
    return 0.2 * (shape.m * shape.n / square_norm.clamp(min=0.5)).sqrt()


def heights(group: Group, s: Tensor) -> Tensor:
    """Return what each direction moves by (B, r), of singular values s: polar 1, reciprocal 1/s, noise 0."""
    live = moving(s)
    if group["update"] == "polar":
        return live.to(s.dtype)
    inside = live & (s > group["clip_eps"])
    return torch.where(inside, group["eta1"] * (1 / s).clamp(max=group["max_value"]), 0.0)


def displacement(member: Member, after: Factors, active: Tensor) -> Displacement:
    """Return the step of `member`'s group, with the normalized complement if it is asked for."""
    group, shape = member.group, member.shape
    height = heights(group, after.s)
    square_norm = height.square().sum(dim=-1)
    extra = None
    if member.spaces is not None:
        Q, P = member.spaces
        G = clean(member.dense(), active)
        # Rows of E are outputs; a transposed weight keeps those in columns.
        extra = normalized_complement(P, Q, G.mT).mT if group["transposed"] else normalized_complement(Q, P, G)
        extra *= complement_scale(group["complement"], shape.m, shape.n)
        square_norm = square_norm + extra.square().sum(dim=(-2, -1))
    return Displacement(after.U * height[:, None, :], after.V, extra, lr_factor(group, shape, square_norm))


def clean(observed: Tensor, active: Tensor) -> Tensor:
    """Return `observed` (B, ., .) with zeros where the matrix does not move: LAPACK refuses NaN."""
    return torch.where(active[:, None, None], observed, 0.0)


class Update:
    """Parameters of one shape and one group whose matrices have a momentum: one batch of small algebra.

    There are `count` parameters of b matrices each, B = count * b.

    Attributes:
        stored: factors in the memory of the state, (B, m, r), (B, r), (B, n, r).
        problem: the sketches, and how the factors follow from them.
        finite: bool (count,), whether a parameter's sketch is; after `take`, also whether its new momentum is.
        active: bool (B,), the matrices that move: finite and with a non-zero sketch.
        square_norms: (B,) float64, |Ghat|^2 of the active matrices, 0 elsewhere.
    """

    problem: ExactProblem | GramProblem | None
    starts = False
    _squares: Tensor | None = None

    def __init__(self, bucket: Bucket, context: Context) -> None:
        self.bucket, self.members, self.context = bucket, bucket.members, context
        first = bucket.members[0]
        self.group, self.shape, self.b = first.group, first.shape, first.shape.batch
        self.stored = Factors(*(self._matrices(key) for key in Factors._fields))
        self.sketch()

    def sketch(self) -> None:
        """Sketch the gradients: set `problem`."""
        (U, _, V), gradients = self.stored, [member.gradient for member in self.members]
        GV, GtU, self._squares = sketch_all(gradients, U, V, self.b, measure=bool(self.group["complement"]))
        self.problem = problem(self.context.solver, self.stored, GV, GtU, self.beta)

    def observe(self) -> None:
        """Set `finite`, `active` and `square_norms` by the sketches, once their problem has been measured."""
        assert self.problem is not None
        self.judge(self.problem.finite, self.problem.moves, self.problem.square_norms)

    def judge(self, finite: Tensor, moves: Tensor, squares: Tensor) -> None:
        """Decide which matrices move: a parameter is skipped as a whole, a zero slice of a stack on its own.

        Args:
            finite, moves: (B,), whether a matrix's sketch is finite; and not zero either.
            squares: (B,) float64, |Ghat|^2, 0 where it does not move.
        """
        self.finite = self._by_parameter(finite)
        if self._each():
            self.active, self.square_norms = moves, squares
            return
        self.active = self.context.gated(self._by_matrix(self.finite) & moves)
        self.square_norms = torch.where(self.active, squares, 0.0)

    def _each(self) -> bool:
        """Whether every matrix is a parameter, and no gate closes: nothing but its sketch decides then."""
        return self.b == 1 and self.context.gate is None

    def _by_parameter(self, flags: Tensor) -> Tensor:
        """Return whether all matrices of a parameter have the flag (count,)."""
        return flags if self.b == 1 else flags.view(-1, self.b).all(dim=1)

    def _by_matrix(self, flags: Tensor) -> Tensor:
        """Return flags of parameters as flags of their matrices (B,)."""
        return flags if self.b == 1 else flags.repeat_interleave(self.b)

    @property
    def beta(self) -> float | Tensor:
        """Momentum decay of the group."""
        return number(self.group["beta"])

    def before(self) -> Factors:
        """Return the real columns of the factors that the gradient was sketched by."""
        assert self.problem is not None
        return self.problem.before

    def spaces(self) -> tuple[Tensor, Tensor]:
        """Return what the complement leaves out."""
        assert self.problem is not None
        return self.problem.spaces(torch.where(self.active, self.sizes, 0.0))

    @functools.cached_property
    def sizes(self) -> Tensor:
        """|G|_F (B,) float64."""
        if tensors := self._gradients():
            from mofasgd.kernels.norm import norms_of

            return norms_of(tensors, len(self.active), self._squares)
        matrices = [matrix for member in self.members for matrix in member.dense().unbind(0)]
        return torch.stack(torch._foreach_norm(matrices, 2, dtype=torch.float64))

    def after(self, factor: Tensor | None) -> Factors | Products:
        """Return the factors after the step, anything where not `active`; `factor` (0-dim) scales the gradient."""
        if isinstance(self.problem, GramProblem) and self._moves_at_once:
            return self.problem.products(factor)
        return self.solved(factor)

    def solved(self, factor: Tensor | None) -> Factors:
        """Return what `after` does as tensors."""
        assert self.problem is not None
        return self.problem.solve(factor, self.active)

    def _matrices(self, key: str) -> Tensor:
        """Return an entry of all states as a batch of matrices; it shares their memory."""
        stack, lead = self.bucket.stack(key), self.shape.lead
        return stack.view(-1, *stack.shape[1 + len(lead) :]) if lead else stack

    def parts(self) -> Iterator[tuple[slice, Member]]:
        """Yield every member with its part of the batch."""
        for i, member in enumerate(self.members):
            yield slice(i * self.b, (i + 1) * self.b), member

    def take(self, after: Factors | Products, factor: Tensor | None) -> None:
        """Advance momenta and weights; `factor` (0-dim) has scaled the gradient of the factors `after`."""
        active = self._remaining(after)
        before = None if self.context.displace is None else self.before()
        spaces = self.spaces() if self.group["complement"] else None
        if self._moves_at_once:
            self._move_all(after, active, spaces)
            return
        assert isinstance(after, Factors)
        self._store(after, active)
        for part, member in self.parts():
            member.factor = factor
            if spaces is not None:
                member.spaces = (spaces[0][part], spaces[1][part])
            self._move(member, part, before, active[part])

    def _remaining(self, after: Factors | Products) -> Tensor:
        """Return the matrices that move (B,), less those of a parameter whose momentum overflows."""
        known = self.problem.outcome() if self.problem is not None and self._each() else None
        if known is not None:
            self.finite, active = known
            return active
        # Finite sketches may still add up to a momentum beyond the largest number.
        fits = self._by_parameter((after.s.sum(dim=-1) < math.inf) | ~self.active)
        self.finite = self.finite & fits
        return self.active & self._by_matrix(fits)

    def _store(self, after: Factors, active: Tensor) -> None:
        """Put `after` into the state where active."""
        for new, old in zip(after, self.stored, strict=True):
            replace_in(old, new, active)
        self._count(active)

    def _count(self, active: Tensor) -> None:
        """Count the step of the parameters that take it."""
        if self.starts:
            self.bucket.stack("initialized").view(-1).logical_or_(active)
        self.steps = self.bucket.stack("step")
        self.steps += active if self.b == 1 else active.view(-1, self.b).any(dim=1)

    @functools.cached_property
    def _moves_at_once(self) -> bool:
        """Whether kernels move all members in one launch."""
        known = self.context.displace is None and self._has_kernel()
        return known and (not self.group["complement"] or bool(self._gradients()))

    def _gradients(self) -> list[Tensor | None]:
        """Return the gradients as tensors if kernels read them as they are, else nothing."""
        return dense_tensors([member.gradient for member in self.members], self.stored.U.dtype)

    def _has_kernel(self) -> bool:
        """Whether one kernel moves all weights: float32 or bfloat16 on CUDA, contiguous, factors in float32."""
        param, U = self.members[0].param, self.stored.U
        plain = param.dtype in (torch.float32, torch.bfloat16) and U.dtype is torch.float32
        small = param.numel() < 1 << 33
        if not (plain and small and usable(param.device)):
            return False
        return all((m.param if m.part is None else local(m.param)).is_contiguous() for m in self.members)

    def _rates(self, active: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor | None]:
        """Return lr * scale where active (B,), and what decay leaves of each matrix (B,), None: all."""
        moves = active.to(torch.promote_types(self.members[0].param.dtype, self.stored.s.dtype))
        lr, decay = number(self.group["lr"]), number(self.group["weight_decay"])
        # A decay of 0 saves a pass over the weight; as a tensor it cannot be read here.
        none = isinstance(decay, (int, float)) and decay == 0
        return moves * (lr * scale), None if none else 1 - moves * (lr * decay)

    def _move_all(self, after: Factors | Products, active: Tensor, spaces: tuple[Tensor, Tensor] | None) -> None:
        """Take the step of all members in one launch; with the complement of gradients outside `spaces`, if given."""
        from mofasgd.kernels.apply import apply_factored
        from mofasgd.kernels.complement import apply_complement

        gradients = [] if spaces is None else self._gradients()
        # Nothing of the state changes before all that may run out of memory has been made.
        polar = self.group["update"] == "polar"
        height = after.live if polar and isinstance(after, Products) else heights(self.group, after.s)
        # Most rules of lr do not read it.
        square_norm = height.square().sum(dim=-1) if self.group["lr_scale"] == "match_rms_adamw" else None
        if spaces is not None:
            transposed = self.group["transposed"]
            c = complement_scale(self.group["complement"], self.shape.m, self.shape.n)
            Q, P = (space.contiguous() for space in spaces)
            # The first halves of Q and P are the stored factors, by which G has been sketched, but at a start M_1's.
            known = None if self.starts or self.problem is None else (self.problem.GV, self.problem.GtU)
            residual = residual_factors(gradients, Q, P, self.sizes, known)
            scales = row_scales(gradients, residual, transposed=transposed)
            square_norm = None if square_norm is None else square_norm + c * c * complement_square_norm(scales)
        rates, keep = self._rates(active, lr_factor(self.group, self.shape, square_norm))
        keep = self.bucket.ones(rates) if keep is None else keep
        keys = self.bucket.rounding_keys(self.context.seed)
        weights = [member.param for member in self.members]
        left, right = store(self.stored, after, active, height * rates[:, None], weights[0].dtype)
        replace_in(self.stored.s, after.s, active)
        self._count(active)
        how = self.context.stochastic_rounding
        first = self.members[0]
        if first.part is not None:
            if local(first.param).numel():
                held = [local(weight) for weight in weights]
                step = (*self._held(first.part, left, right, keep), keys, self.steps)
                apply_factored(held, *step, stochastic=how, offset=first.part.offset(first.param.shape))
            return
        if spaces is None:
            apply_factored(weights, left, right, keep, keys, self.steps, stochastic=how)
            return
        step = (left, right, keep, keys, self.steps)
        scales = scales * (c * rates[:, None])
        apply_complement(weights, gradients, residual, scales, *step, stochastic=how, transposed=transposed)

    def _held(self, part: Part, left: Tensor, right: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what moves the rows that this rank holds of every member, of what moves all."""
        matrices, rows = part.slices(self.shape)
        count = len(self.members)
        left, right = (t.view(count, self.b, *t.shape[1:])[:, matrices].flatten(0, 1) for t in (left, right))
        return left[:, rows], right, keep.view(count, self.b)[:, matrices].flatten()

    def _move(self, member: Member, part: slice, before: Factors | None, active: Tensor) -> None:
        """Take the step of one member."""
        after = Factors(*(t[part] for t in self.stored))
        if before is None or self.context.displace is None:
            move = displacement(member, after, active)
        else:
            move = self.context.displace(member, Factors(*(t[part] for t in before)), after, active)
        rates, keep = self._rates(active, move.scale)
        extra = None if move.extra is None else move.extra.mul_(rates[:, None, None])
        rounding = Rounding.of(self.context.stochastic_rounding, self.context.seed, member.index, member.state["step"])
        left = move.left * rates[:, None, None]
        if member.part is not None:
            self._move_part(member, member.part, left, move.right, extra, keep, rounding)
            return
        weight = as_matrices(member.param, member.shape)
        apply_update(weight, left, move.right, extra, keep, rounding)
        if weight.data_ptr() != member.param.data_ptr():
            # The layout is no view of these strides (a channels-last convolution): the copy was updated.
            member.param.copy_(weight.view(member.param.shape))

    def _move_part(
        self,
        member: Member,
        part: Part,
        left: Tensor,
        right: Tensor,
        extra: Tensor | None,
        keep: Tensor | None,
        rounding: Rounding,
    ) -> None:
        """Move the rows that this rank holds."""
        held = local(member.param)
        if not held.numel():
            return
        matrices, rows = part.slices(member.shape)
        shape = MatrixShape((matrices.stop - matrices.start,), rows.stop - rows.start, member.shape.n)
        weight, rounding = as_matrices(held, shape), replace(rounding, offset=part.offset(member.param.shape))
        keep, extra = (None if t is None else t[own] for t, own in ((keep, matrices), (extra, (matrices, rows))))
        apply_update(weight, left[matrices, rows], right[matrices], extra, keep, rounding)
        if weight.data_ptr() != held.data_ptr():
            held.copy_(weight.view(held.shape))


def observe_all(updates: Sequence[Update]) -> None:
    """Decide which matrices of all updates move, and what they add to the norm."""
    measure([update.problem for update in updates if update.problem is not None])
    for update in updates:
        update.observe()


def take_all(updates: Sequence[Update], factor: Tensor | None) -> None:
    """Advance the momenta and weights of all updates; `factor` (0-dim) scales the gradients."""
    for update in updates:
        own = None if factor is None else factor.to(update.active.device)
        update.take(update.after(own), own)
        for member in update.members:
            member.forget()
