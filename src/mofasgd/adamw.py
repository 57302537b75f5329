"""AdamW for what is not factored: vectors, embeddings, heads. torch.optim.AdamW's formula, in the state's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from mofasgd.apply import Rounding

Scalar = float | Tensor


def adamw_step(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    *,
    lr: Scalar,
    betas: tuple[Scalar, Scalar],
    eps: float,
    weight_decay: float,
    active: Tensor,
    rounding: Rounding,
) -> None:
    """Take one AdamW step in place; where `active` (0-dim bool) is False, leave weight and state as they were.

    Args:
        param: weight of any shape, float32, float64 or bfloat16.
        grad: gradient of the same shape, already clipped; read only.
        state: `exp_avg`, `exp_avg_sq` (shape of param) and `step` (0-dim), changed in place.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        active: decided on the device, so that nothing here waits for it.
        rounding: how a bfloat16 weight is written; decay is rounded with the step.
    """
    first, second, step = state["exp_avg"], state["exp_avg_sq"], state["step"]
    beta1, beta2 = betas
    # A skipped parameter has weight 0: then every factor below is the identity, and no host has to know.
    weight = active.to(first.dtype)
    grad = torch.where(active, grad.to(first.dtype), 0.0)
    step += active
    first.lerp_(grad, weight * (1 - beta1))
    second.mul_(1 - weight * (1 - beta2)).addcmul_(grad, grad * (1 - beta2))
    count = step.clamp(min=1).to(first.dtype)
    step_size = weight * lr / (1 - beta1**count)
    denominator = (second.sqrt() / (1 - beta2**count).sqrt()).add_(eps)

    compute = torch.promote_types(param.dtype, first.dtype)
    in_place = param.dtype is compute
    value = param if in_place else param.to(compute)
    value.mul_((1 - weight * (lr * weight_decay)).to(compute))
    value.sub_(first / denominator * step_size)
    if not in_place:
        rounding.write(param, value)
