"""The authors' published optimizer, for comparison: what their code does where it differs from their paper.

`AuthorsMFSGD` follows `MomentumFactorizedSGD` of the authors' repository (commit 9538be3), in dense mode.
Zero and non-finite gradients, clipping and weight decay follow the rules of `MoFaSGD`.
G is the gradient and (U, s, V) are the factors after the update:

    start     (U, s, V) = SVD_r(W)                                   the weight's own factors
    update    (U, s, V) <- SVD_r(beta M + Ghat)                      as in the paper
    step      W <- W - lr (eta1 U diag(h(s)) V' + eta2 (I - P) G (I - Q))
              h(s) = 0 where s <= eps, else min(1/s, max_value); with use_ones_for_nonzero_s: 1
              P = U U', Q = V V': of the new factors with use_current_projection, else of the old ones
    nesterov  the step's U, s, V come from a second update with the same G, which is not stored
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mofasgd.buckets import Member, Owned
from mofasgd.dist.shards import whole
from mofasgd.factored import Displace, Displacement
from mofasgd.layout import as_matrices
from mofasgd.momentum import Factors, sketch, truncated_svd, update_factors
from mofasgd.optimizer import MoFaSGD
from mofasgd.options import Group, check_flag, check_number
from mofasgd.precision import true_float32
from mofasgd.state import factored_shape


class AuthorsMFSGD(MoFaSGD):
    """The authors' MFSGD step on the state, checkpoints and checks of `MoFaSGD`.

    Args:
        params: matrices, or groups of them with `lr`, `rank`, `beta`.
        lr, rank, beta: as in `MoFaSGD`.
        eta1: factor of the momentum's step.
        eta2: factor of the raw complement of the gradient.
        use_current_projection: complement of the new factors instead of the old ones.
        use_ones_for_nonzero_s: singular values 1 instead of 1/s.
        eps: directions with s <= eps do not move.
        nesterov: step along a second update with the same gradient.
        max_value: largest reciprocal 1/s.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        *,
        rank: int = 2,
        beta: float = 0.9,
        eta1: float = 1.0,
        eta2: float = 1.0,
        use_current_projection: bool = False,
        use_ones_for_nonzero_s: bool = False,
        eps: float = 1e-4,
        nesterov: bool = False,
        max_value: float = 10000,
    ) -> None:
        # None, which MoFaSGD takes for a default of its own, is no value here.
        for name, value in {"eta1": eta1, "eta2": eta2, "eps": eps}.items():
            check_number(name, value, 0.0)
        check_number("max_value", max_value, 0.0, open_low=True)
        check_flag("use_current_projection", use_current_projection)
        check_flag("use_ones_for_nonzero_s", use_ones_for_nonzero_s)
        check_flag("nesterov", nesterov)
        self.eta2, self.nesterov = eta2, nesterov
        self.use_current_projection = use_current_projection
        self.use_ones_for_nonzero_s = use_ones_for_nonzero_s
        super().__init__(
            params,
            lr,
            rank=rank,
            beta=beta,
            update="reciprocal",
            lr_scale="none",
            eta1=eta1,
            clip_eps=eps,
            max_value=max_value,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of matrices, or one with algorithm="adamw"; keys that the authors' step lacks are refused."""
        for key in ("update", "lr_scale", "complement", "transposed"):
            if isinstance(param_group, dict) and key in param_group:
                raise ValueError(f"{key}={param_group[key]!r} has no effect in AuthorsMFSGD: drop it, or use MoFaSGD")
        super().add_param_group(param_group)

    def _make(self, owned: Sequence[Owned]) -> None:
        super()._make(owned)
        for _, param, group in owned:
            if group["algorithm"] != "mofasgd":
                continue
            state, (shape, rank) = self.state[param], factored_shape(param, group)
            weight = as_matrices(whole(param.detach()), shape).to(self.state_dtype)
            for name, value in zip(Factors._fields, truncated_svd(weight, rank), strict=True):
                state[name].copy_(value.view(state[name].shape))
            state["initialized"].fill_(True)

    def _reads_gradient(self, group: Group) -> str | None:
        named = {"eta2": self.eta2, "nesterov": self.nesterov}
        return next((f"{name}={value}" for name, value in named.items() if value), None)

    @property
    def _displace(self) -> Displace:
        return self._authors_step

    def _authors_step(self, member: Member, before: Factors, after: Factors, active: Tensor) -> Displacement:
        group = member.group
        U, s, V = after
        if self.nesterov:
            G = self._gradient(member, active)
            U, s, V = update_factors(*after, *sketch(G, after.U, after.V), group["beta"])
        height = 1.0 if self.use_ones_for_nonzero_s else (1 / s).clamp(max=group["max_value"])
        coefficients = torch.where(s > group["clip_eps"], group["eta1"] * height, 0.0)
        extra = None
        if self.eta2:
            G = self._gradient(member, active)
            left, right = (U, V) if self.use_current_projection else (before.U, before.V)
            with true_float32(G.device.type):
                R = G - left @ (left.mT @ G)
                extra = self.eta2 * (R - (R @ right) @ right.mT)
        return Displacement(U * coefficients[:, None, :], V, extra, 1.0)

    def _gradient(self, member: Member, active: Tensor) -> Tensor:
        G = torch.where(active[:, None, None], member.dense().to(self.state_dtype), 0.0)
        return G if member.factor is None else G * member.factor

    def __getstate__(self) -> dict[str, Any]:
        own = ("eta2", "nesterov", "use_current_projection", "use_ones_for_nonzero_s")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in own}}
