"""Row-normalized SGD, a control: what a step without any state can do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mofasgd.app.per_parameter import PerParameter
from mofasgd.complement import complement_scale


class RowNormSGD(PerParameter):
    """W <- (1 - lr wd) W - lr scale E, the rows of E being those of the gradient at equal length, |E|_F = 1.

    The scale, sqrt(min(m, n)) * sqrt(max(1, m / n)), is that of MoFaSGD's complement at c = 1 and lr_scale "spectral".

    Args:
        params: matrices (m, n), or groups of them.
        lr: learning rate.
        weight_decay: decoupled.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.04, *, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def _step_one(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        m, n = param.shape
        scale = complement_scale(1.0, m, n) * max(1.0, m / n) ** 0.5
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(F.normalize(grad, dim=1), alpha=-group["lr"] * scale / m**0.5)
