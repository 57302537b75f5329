"""GaLore, a baseline: AdamW on gradients projected to rank r (Zhao et al., ICML 2024, arXiv 2403.03507).

Follows the published `galore-torch` 1.0 (projection type "std") to rounding; `tests/test_galore.py` compares with its
recorded trajectory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mofasgd.app.per_parameter import PerParameter


class GaLore(PerParameter):
    """AdamW whose moments of matrices live in a rank-r subspace of the gradient, renewed every `gap` steps.

    Groups without `rank` are plain AdamW (a group key `rank` of None says so).

    Args:
        params: tensors or groups.
        lr: learning rate.
        rank: of the subspace; None for AdamW.
        gap: steps between two SVDs of the gradient.
        scale: factor of the projected-back update (the paper's alpha).
        betas, eps, weight_decay: as in AdamW; the decay acts after the step, as in the published code.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        rank: int | None = None,
        gap: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "rank": rank, "gap": gap, "scale": scale, "betas": betas, "eps": eps}
        super().__init__(params, defaults | {"weight_decay": weight_decay})

    def _step_one(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        done = int(state.setdefault("step", torch.zeros(())))
        low_rank = group["rank"] is not None
        if low_rank:
            if done % group["gap"] == 0:
                state["basis"] = _leading_basis(grad, group["rank"])
            grad = _project(grad, state["basis"])
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
        state["step"] += 1

        beta1, beta2 = group["betas"]
        first = state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = first / second.sqrt().add_(group["eps"])
        if low_rank:
            update = _project_back(update, state["basis"], param) * group["scale"]
        correction = (1 - beta2 ** (done + 1)) ** 0.5 / (1 - beta1 ** (done + 1))
        param.add_(update, alpha=-group["lr"] * correction)
        if group["weight_decay"]:
            param.mul_(1 - group["lr"] * group["weight_decay"])


def _leading_basis(grad: Tensor, rank: int) -> Tensor:
    """Return the leading singular vectors of the shorter side: (n, r) if m >= n, else (m, r)."""
    U, _, Vh = torch.linalg.svd(grad.float(), full_matrices=False)
    basis: Tensor = Vh[:rank].mT if grad.shape[0] >= grad.shape[1] else U[:, :rank]
    # A copy: the view would keep all singular vectors alive.
    return basis.to(grad.dtype).contiguous().clone()


def _project(grad: Tensor, basis: Tensor) -> Tensor:
    return grad @ basis if grad.shape[0] >= grad.shape[1] else basis.mT @ grad


def _project_back(update: Tensor, basis: Tensor, like: Tensor) -> Tensor:
    return update @ basis.mT if like.shape[0] >= like.shape[1] else basis @ update
