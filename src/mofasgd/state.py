"""What optimizer state is: names, shapes, dtypes. Tensors only, so `torch.load(weights_only=True)` reads it.

========= ===========  =================  ======================================================================
algorithm name         shape              meaning
========= ===========  =================  ======================================================================
mofasgd   U            (*lead, m, r)      left factor, orthonormal columns; zeros while pending
mofasgd   s            (*lead, r)         singular values, falling
mofasgd   V            (*lead, n, r)      right factor, orthonormal columns; zeros while pending
mofasgd   initialized  (*lead,), bool     False until the matrix has seen a non-zero gradient ("pending")
adamw     exp_avg      as the parameter   first moment
adamw     exp_avg_sq   as the parameter   second moment
both      step         (), float32        updates taken; float32 as in torch.optim, which no loader casts
========= ===========  =================  ======================================================================

`lead` are the stacked dimensions of layout "stack", () otherwise. Floating tensors have the optimizer's
`state_dtype`, whatever the dtype of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mofasgd.layout import MatrixShape


def factored_shapes(shape: MatrixShape, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a factored parameter's state."""
    lead = shape.lead
    return {
        "U": (*lead, shape.m, rank),
        "s": (*lead, rank),
        "V": (*lead, shape.n, rank),
        "initialized": lead,
        "step": (),
    }


def adamw_shapes(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an AdamW parameter's state."""
    return {"exp_avg": shape, "exp_avg_sq": shape, "step": ()}


def new_factored(param: Tensor, shape: MatrixShape, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a pending matrix's state: final shapes, zeros."""
    dtypes = {"initialized": torch.bool, "step": torch.float32}
    return {
        name: torch.zeros(size, dtype=dtypes.get(name, dtype), device=param.device)
        for name, size in factored_shapes(shape, rank).items()
    }


def new_adamw(param: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return AdamW's state before the first step."""
    return {
        "exp_avg": torch.zeros_like(param, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(param, dtype=dtype),
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
    }


def check_saved(entry: Any, expected: dict[str, tuple[int, ...]], name: str) -> None:
    """Raise ValueError unless a loaded parameter's state has the names and shapes of `expected`."""
    if not isinstance(entry, dict) or set(entry) != set(expected):
        found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(
            f"state of {name} should hold {sorted(expected)} but holds {found}: this state_dict was saved by "
            "another optimizer, or its parameter groups assign the algorithms differently"
        )
    for key, size in expected.items():
        saved = entry[key]
        if not isinstance(saved, Tensor) or tuple(saved.shape) != size:
            what = tuple(saved.shape) if isinstance(saved, Tensor) else type(saved).__name__
            raise ValueError(
                f"state {key!r} of {name} should have shape {size} but is {what}: the model or the rank differs "
                "from the saved run's, or the file is damaged"
            )


def restore(entry: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return a copy of saved state on `device` with its own dtypes; the saved tensors stay the caller's."""
    return {key: value.detach().clone().to(device) for key, value in entry.items()}
