"""AdamW for what is not factored: vectors, embeddings, heads. torch.optim.AdamW's formula, in the state's dtype."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from mofasgd.apply import TILE, Rounding
from mofasgd.kernels import usable
from mofasgd.options import Group, number
from mofasgd.rng import keys_on

Scalar = float | Tensor
"""A number, or a 0-dim tensor."""


def adamw_step(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    *,
    lr: Scalar,
    betas: tuple[Scalar, Scalar],
    eps: Scalar,
    weight_decay: Scalar,
    factor: Tensor | None,
    active: Tensor,
    rounding: Rounding,
) -> None:
    """Take one AdamW step in place; where `active` (0-dim bool) is False, leave weight and state as they were.

    Args:
        param: weight of any shape, float32, float64 or bfloat16.
        grad: gradient of the same shape; read only.
        state: `exp_avg`, `exp_avg_sq` (shape of param) and `step` (0-dim), changed in place.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        factor: of the gradient (clipping), 0-dim, or None for 1.
        active: decided on the device, so that nothing here waits for it.
        rounding: how a bfloat16 weight is written; decay is rounded with the step.
    """
    # What all elements share is found in float64 and rounded once: 1 - beta of a float32 0.999 would be 1e-5 off.
    lr, beta1, beta2, eps, weight_decay = (_double(value) for value in (lr, *betas, eps, weight_decay))
    dtype = state["exp_avg"].dtype
    compute = torch.promote_types(param.dtype, dtype)
    state["step"] += active
    # A skipped parameter has weight 0: then every factor below is the identity, and no host has to know.
    weight, count = active.double(), state["step"].clamp(min=1).double()
    keep = (1 - weight * (lr * weight_decay)).to(compute)
    new1, new2 = weight * (1 - beta1), weight * (1 - beta2)
    old1, new1, old2, new2 = (share.to(dtype) for share in (1 - new1, new1, 1 - new2, new2))
    step_size = (weight * lr / (1 - beta1**count)).to(dtype)
    root = (1 - beta2**count).sqrt().reciprocal().to(dtype)

    # Every operation is rounded by itself, on all devices alike; a lerp or an addcmul would be fused on some.
    for start, (p, g, first, second) in _tiles(param, grad, state["exp_avg"], state["exp_avg_sq"]):
        g = g.to(dtype) if factor is None else g.to(dtype) * factor.to(dtype)
        g = torch.where(active, g, 0.0)
        first.mul_(old1).add_(g * new1)
        second.mul_(old2).add_(g * (g * new2))
        update = first / second.sqrt().mul_(root).add_(eps) * step_size
        # `to` copies a lower-precision weight only; the others change in place here.
        value = p.to(compute).mul_(keep).sub_(torch.where(active, update, 0.0))
        if p.dtype is not compute:
            rounding.write(p, value, start)


@dataclass(slots=True)
class AdamWMember:
    """An AdamW parameter in this step: the weight, its gradient, its group, its state and how it is rounded.

    Attributes:
        present: whether any rank has a gradient, 0-dim bool; None: this one has.
        square: |g|^2 of the parameter, 0-dim float64, if the tensors are a rank's part of it.
    """

    param: Tensor
    grad: Tensor
    group: Group
    state: dict[str, Tensor]
    rounding: Rounding
    present: Tensor | None = None
    square: Tensor | None = None

    def bucket(self) -> tuple[Hashable, ...] | None:
        """Return what members of one kernel's launch have in common, or None if no kernel takes this one."""
        # Written out: models have hundreds of these at every step.
        param, grad, state, offset = self.param, self.grad, self.state, self.rounding.offset
        device, dtype, size = param.device, param.dtype, param.numel()
        if not usable(device):
            return None
        first, second, step = state["exp_avg"], state["exp_avg_sq"], state["step"]
        fits = (
            (dtype is torch.bfloat16 or dtype is torch.float32)
            and grad.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and first.dtype is second.dtype is step.dtype is torch.float32
            and first.device == second.device == step.device == grad.device == device
            and param.is_contiguous()
            and grad.is_contiguous()
            and first.is_contiguous()
            and second.is_contiguous()
            # The kernel numbers random words by 32 bits, and two elements share one.
            and 0 < size < (1 << 33) - offset
            # The kernel numbers pairs of elements.
            and offset % 2 == 0
        )
        return (size, dtype, grad.dtype, offset) if fits else None


class AdamWUpdate:
    """The AdamW parameters of one group and one device in a step, in the two phases of `factored.Update`.

    On CUDA the number of launches depends on the number of their sizes and dtypes only.

    Attributes:
        members: the parameters, those of one bucket together.
        finite: bool (count,), whether a parameter's gradient is.
        active: bool (count,), whether it moves.
        square_norms: (count,) float64, |g|^2, 0 where it does not move.
    """

    def __init__(self, members: Sequence[AdamWMember], gate: Tensor | None):
        """Measure the gradients of `members`; `gate` is a 0-dim bool tensor or None, False skips the step."""
        self._buckets: dict[tuple[Hashable, ...] | None, list[AdamWMember]] = {}
        for member in members:
            self._buckets.setdefault(member.bucket(), []).append(member)
        self.members = list(chain.from_iterable(self._buckets.values()))
        norms = _norms(self.members)
        self.finite = norms < math.inf
        self.active = self.finite if gate is None else self.finite & gate.to(norms.device)
        if any(member.present is not None for member in self.members):
            there = torch.ones_like(self.active[0])
            self.active &= torch.stack([there if m.present is None else m.present for m in self.members])
        self.square_norms = torch.where(self.active, norms.square(), 0.0)

    def take(self, factor: Tensor | None) -> None:
        """Advance moments and weights; `factor` (0-dim) scales the gradients."""
        # A bucket's flags are a slice, since picking them by a list would copy the list to the device.
        start = 0
        for bucket, members in self._buckets.items():
            active = self.active[start : start + len(members)]
            start += len(members)
            if bucket is None:
                _step_each(members, active, factor)
            else:
                _step_together(members, active, factor)


def _step_each(members: list[AdamWMember], active: Tensor, factor: Tensor | None) -> None:
    lr, beta1, beta2, eps, weight_decay = _options(members[0].group)
    for member, moves in zip(members, active.unbind(), strict=True):
        adamw_step(
            member.param,
            member.grad,
            member.state,
            lr=lr,
            betas=(beta1, beta2),
            eps=eps,
            weight_decay=weight_decay,
            factor=factor,
            active=moves,
            rounding=member.rounding,
        )


def _step_together(members: list[AdamWMember], active: Tensor, factor: Tensor | None) -> None:
    from mofasgd.kernels.adamw import adamw_list

    device = active.device
    stochastic = members[0].rounding.stochastic and members[0].param.dtype is torch.bfloat16
    adamw_list(
        [m.param for m in members],
        [m.grad for m in members],
        [m.state["exp_avg"] for m in members],
        [m.state["exp_avg_sq"] for m in members],
        [m.state["step"] for m in members],
        active=active,
        numbers=_options_on(members[0].group, device),
        factor=factor,
        keys=keys_on(tuple(m.rounding.key for m in members), device) if stochastic else None,
        offset=members[0].rounding.offset,
    )


def _norms(members: Sequence[AdamWMember]) -> Tensor:
    """Return |g| of each member, (count,) float64; one launch or few for each dtype of gradients."""
    norms = {i: member.square.sqrt() for i, member in enumerate(members) if member.square is not None}
    for dtype in dict.fromkeys(member.grad.dtype for member in members if member.square is None):
        which = [i for i, member in enumerate(members) if member.grad.dtype is dtype and member.square is None]
        # As the step will read it: a float64 gradient may not fit the moments. A sum of squares in float64 is finite
        # exactly if its float32 or bfloat16 elements are.
        wide = dtype is torch.float64
        seen = [m.grad.to(m.state["exp_avg"].dtype) if wide else m.grad for m in (members[i] for i in which)]
        norms |= zip(which, torch._foreach_norm(seen, dtype=torch.float64), strict=True)
    return torch.stack([norms[i] for i in range(len(members))])


def _double(value: Scalar) -> Scalar:
    return value.double() if isinstance(value, Tensor) else value


def _options(group: Group) -> list[Scalar]:
    """Return lr, beta1, beta2, eps and weight_decay."""
    return [number(value) for value in (group["lr"], *group["betas"], group["eps"], group["weight_decay"])]


def _options_on(group: Group, device: torch.device) -> Tensor:
    """Return `_options` as one tensor (5,), float64, on `device`; nothing is read back from those that are tensors."""
    options = _options(group)
    known = _numbers_on(tuple(0.0 if isinstance(value, Tensor) else float(value) for value in options), device)
    if not any(isinstance(value, Tensor) for value in options):
        return known
    return torch.stack(
        [
            value.to(device, torch.float64, non_blocking=True) if isinstance(value, Tensor) else one
            for value, one in zip(options, known.unbind(), strict=True)
        ]
    )


# Kept, as `kernels.pointers` are: a CUDA graph may then be captured once the same values have been seen.
@functools.lru_cache(maxsize=256)
def _numbers_on(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)


def _tiles(*tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yield (index of the first element, pieces): flat views of at most TILE elements, which bounds temporaries."""
    if not all(t.is_contiguous() for t in tensors):
        yield 0, tensors
        return
    flat = [t.view(-1) for t in tensors]
    for start in range(0, max(1, flat[0].numel()), TILE):
        yield start, tuple(t[start : start + TILE] for t in flat)
