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

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mofasgd.dist.shards import placed_like
from mofasgd.layout import MatrixShape, matrix_shape
from mofasgd.options import ALGORITHMS, Group, check_group


def factored_shape(param: Tensor, group: Group) -> tuple[MatrixShape, int]:
    """Return how a parameter of `group` is cut into matrices, and their rank: lowered to the smaller side."""
    shape = matrix_shape(group["layout"], tuple(param.shape))
    return shape, min(group["rank"], shape.m, shape.n)


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


def new_factored(
    count: int, shape: MatrixShape, rank: int, dtype: torch.dtype, device: torch.device
) -> list[dict[str, Tensor]]:
    """Return the states of pending parameters: final shapes, zeros, those of one name side by side in memory."""
    dtypes = {"initialized": torch.bool, "step": torch.float32}
    stacks = {
        name: torch.zeros(count, *size, dtype=dtypes.get(name, dtype), device=device).unbind()
        for name, size in factored_shapes(shape, rank).items()
    }
    return [dict(zip(stacks, parts, strict=True)) for parts in zip(*stacks.values(), strict=True)]


def new_adamw(param: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return AdamW's state before the first step."""
    return {
        "exp_avg": torch.zeros_like(param, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(param, dtype=dtype),
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
    }


def waiting(states: dict[Tensor, dict[str, Tensor]]) -> dict[Tensor, list[int]]:
    """Return the numbers of the matrices without a momentum, by parameter; a parameter with none such is left out.

    Args:
        states: state of factored parameters. One transfer for each device, which the host waits for.
    """
    flags = {param: state["initialized"].reshape(-1) for param, state in states.items()}
    devices = {flag.device for flag in flags.values()}
    on_host = {d: iter(torch.cat([f for f in flags.values() if f.device == d]).tolist()) for d in devices}
    started = {param: list(islice(on_host[flag.device], flag.numel())) for param, flag in flags.items()}
    return {p: [i for i, done in enumerate(all_) if not done] for p, all_ in started.items() if not all(all_)}


def restore(loaded: Any, groups: list[Group], dtype: torch.dtype) -> dict[Tensor, dict[str, Tensor]]:
    """Return copies of the state in a loaded state_dict, by parameter, on its device, floating tensors in `dtype`.

    Args:
        loaded: a state_dict of the optimizer; its tensors stay the caller's.
        groups: of the optimizer that loads it; its parameters are matched by position.
        dtype: the optimizer's `state_dtype`.

    Raises:
        ValueError: if names, shapes or groups do not fit.
    """
    if not isinstance(loaded, dict) or not {"state", "param_groups"} <= loaded.keys():
        raise ValueError("this is no optimizer state_dict: it has no 'state' and 'param_groups'")
    saved_groups = loaded["param_groups"]
    counts, own = ([len(g["params"]) for g in some] for some in (saved_groups, groups))
    if counts != own:
        raise ValueError(
            f"the saved optimizer has groups of {counts} parameters, this one of {own}: build it from the same "
            "model and options"
        )
    known = {saved_id for group in saved_groups for saved_id in group["params"]}
    if strange := [saved_id for saved_id in loaded["state"] if saved_id not in known]:
        raise ValueError(
            f"the saved state is of parameters {strange[:3]!r}, which no saved group has: the file is damaged, or its "
            "numbers have become texts (as in JSON)"
        )
    result: dict[Tensor, dict[str, Tensor]] = {}
    index = 0
    for saved_group, group in zip(saved_groups, groups, strict=True):
        if saved_group.get("algorithm") not in ALGORITHMS:
            raise ValueError("the saved groups have no 'algorithm': this state_dict was saved by another optimizer")
        check_group(saved_group)
        for saved_id, param in zip(saved_group["params"], group["params"], strict=True):
            entry = loaded["state"].get(saved_id)
            if entry:
                _check_entry(entry, _expected_shapes(param, saved_group), f"parameter {index}")
                result[param] = {key: _copy(key, value, param, dtype) for key, value in entry.items()}
            index += 1
    return result


@contextmanager
def restored(optimizer: Optimizer, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Check what `optimizer.load_state_dict` is given, and keep floating state in `dtype`.

    torch casts it to the dtype of the weights: bfloat16 factors would be lost factors. Yields a dict that becomes what
    hooks of the user's have made of the state_dict.
    """
    kept: dict[Tensor, dict[str, Tensor]] = {}
    seen: dict[str, Any] = {}

    def check(_: Optimizer, loaded: dict[str, Any]) -> None:
        kept.update(restore(loaded, optimizer.param_groups, dtype))
        seen.update(loaded)

    def put_back(_: Optimizer) -> None:
        optimizer.state.update(kept)

    # Registered now, so that hooks of the user have run before ours and run after it, respectively.
    handles = [
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(put_back, prepend=True),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _copy(key: str, value: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    value = value.detach()
    if key.startswith("exp_avg"):
        value = placed_like(value, param)
    return value.to(param.device, None if key in ("step", "initialized") else dtype, copy=True)


def _expected_shapes(param: Tensor, saved_group: Group) -> dict[str, tuple[int, ...]]:
    if saved_group["algorithm"] == "adamw":
        return adamw_shapes(tuple(param.shape))
    return factored_shapes(*factored_shape(param, saved_group))


def _check_entry(entry: Any, expected: dict[str, tuple[int, ...]], name: str) -> None:
    """Raise ValueError unless a parameter's saved state has the names and shapes of `expected`."""
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
        if saved.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"state {key!r} of {name} is {saved.dtype}: something cast it, and factors of that precision are no "
                "longer orthonormal; save and load optimizer state in its own dtype"
            )
