"""AdamW for what is not factored: vectors, embeddings, heads. torch.optim.AdamW's formula, in the state's dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mofasgd.apply import TILE, Rounding
from mofasgd.options import Group, number

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
    beta1, beta2 = betas
    dtype = state["exp_avg"].dtype
    compute = torch.promote_types(param.dtype, dtype)
    # A skipped parameter has weight 0: then every factor below is the identity, and no host has to know.
    weight = active.to(dtype)
    state["step"] += active
    count = state["step"].clamp(min=1).to(dtype)
    step_size = weight * lr / (1 - beta1**count)
    correction = (1 - beta2**count).sqrt()
    keep = (1 - weight * (lr * weight_decay)).to(compute)

    for start, (p, g, first, second) in _tiles(param, grad, state["exp_avg"], state["exp_avg_sq"]):
        g = g.to(dtype) if factor is None else g.to(dtype) * factor
        g = torch.where(active, g, 0.0)
        first.lerp_(g, weight * (1 - beta1))
        second.mul_(1 - weight * (1 - beta2)).addcmul_(g, g * (1 - beta2))
        update = first / (second.sqrt() / correction).add_(eps) * step_size
        # `to` copies a lower-precision weight only; the others change in place here.
        value = p.to(compute).mul_(keep).sub_(torch.where(active, update, 0.0))
        if p.dtype is not compute:
            rounding.write(p, value, start)


class AdamWUpdate:
    """One AdamW parameter in a step, in the two phases of `factored.Update`.

    Attributes:
        finite: bool (1,), whether its gradient is.
        active: bool (1,), whether it moves.
        square_norms: (1,) float64, |g|^2, 0 where it does not move.
    """

    def __init__(self, param: Tensor, group: Group, state: dict[str, Tensor], rounding: Rounding, gate: Tensor | None):
        """Measure `param.grad`; `gate` is a 0-dim bool tensor or None, False skips the step."""
        assert param.grad is not None
        self.param, self.grad, self.group, self.state, self.rounding = param, param.grad, group, state, rounding
        # As the step will read it: a float64 gradient may not fit the moments. A sum of squares in float64 is finite
        # exactly if its float32 or bfloat16 elements are.
        moment = state["exp_avg"].dtype
        seen = self.grad.to(moment) if self.grad.dtype is torch.float64 else self.grad
        norm = torch.linalg.vector_norm(seen, dtype=torch.float64).reshape(1)
        self.finite = norm.isfinite()
        self.active = self.finite if gate is None else self.finite & gate.to(norm.device)
        self.square_norms = torch.where(self.active, norm.square(), 0.0)

    def take(self, factor: Tensor | None) -> None:
        """Advance moments and weight; `factor` (0-dim) scales the gradient."""
        beta1, beta2 = (number(beta) for beta in self.group["betas"])
        adamw_step(
            self.param,
            self.grad,
            self.state,
            lr=number(self.group["lr"]),
            betas=(beta1, beta2),
            eps=number(self.group["eps"]),
            weight_decay=number(self.group["weight_decay"]),
            factor=factor,
            active=self.active.reshape(()),
            rounding=self.rounding,
        )


def _tiles(*tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yield (index of the first element, pieces): flat views of at most TILE elements, which bounds temporaries."""
    if not all(t.is_contiguous() for t in tensors):
        yield 0, tensors
        return
    flat = [t.view(-1) for t in tensors]
    for start in range(0, max(1, flat[0].numel()), TILE):
        yield start, tuple(t[start : start + TILE] for t in flat)
