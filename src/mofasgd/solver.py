"""Which routine updates a batch of factors. Each must match `momentum.update_factors` under a stated budget."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mofasgd.momentum import Factors, update_factors

Solver = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float | Tensor], Factors]

SOLVERS: dict[str, Solver] = {
    # Householder QR and LAPACK's SVD, exact for every shape and spectrum.
    "svd": update_factors,
    # The best for the device and the size: the exact one, until a faster one meets its budget.
    "auto": update_factors,
}
