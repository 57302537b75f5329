"""Group keys of the two algorithms: defaults, and checks whose errors name the value and the fix."""

from __future__ import annotations

import difflib
import warnings
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from mofasgd.dist.shards import check_kind
from mofasgd.layout import LAYOUTS, matrix_shape

Group = dict[str, Any]

ALGORITHMS = ("mofasgd", "adamw")
UPDATES = ("polar", "reciprocal")
LR_SCALES = ("none", "spectral", "match_rms_adamw")
RECIPROCAL_DEFAULTS: Group = {"eta1": 1.0, "clip_eps": 1e-4, "max_value": 1e4}
"""The authors' class defaults; keys that only update='reciprocal' reads."""

_WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16)

FACTORED_KEYS = (
    "lr",
    "rank",
    "beta",
    "weight_decay",
    "complement",
    "update",
    "lr_scale",
    "layout",
    "transposed",
    *RECIPROCAL_DEFAULTS,
)
ADAMW_KEYS = ("lr", "betas", "eps", "weight_decay")
# Written into groups by torch's schedulers and by logging callbacks; they change nothing here.
_FOREIGN_KEYS = (
    *("params", "param_names", "algorithm", "name", "nonfinite_steps"),
    *("initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "base_momentum"),
)


def did_you_mean(word: str, known: tuple[str, ...]) -> str:
    """Return "; did you mean 'x'?" for the nearest of `known`, or the list of them."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown{did_you_mean(str(value), known)}")


def check_number(name: str, value: object, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """Raise ValueError unless low <= value < high (low < value if `open_low`). Tensors pass: reading one would wait."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} is a tensor of shape {tuple(value.shape)}: give one number")
        return
    inside = isinstance(value, Real) and not isinstance(value, bool) and low <= float(value) < high
    if not inside or (open_low and value == low):
        raise ValueError(f"{name}={value!r} should be a number in {'(' if open_low else '['}{low:g}, {high:g})")


def check_whole(name: str, value: object, low: int | None = None) -> None:
    """Raise ValueError unless `value` is a whole number of at least `low`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or (low is not None and value < low):  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} should be a whole number" + ("" if low is None else f" of at least {low}"))


def check_flag(name: str, value: object) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} should be True or False")


def number(value: float | Tensor) -> float | Tensor:
    """Return a group's number for arithmetic: a tensor of any one-element shape as 0-dim."""
    return value.reshape(()) if isinstance(value, Tensor) else value


def check_polar(options: Group) -> None:
    """Raise ValueError if `options` hold a key that update="polar" does not read."""
    for key in RECIPROCAL_DEFAULTS:
        if key in options:
            raise ValueError(f"{key}={options[key]!r} takes effect with update='reciprocal' only: drop it")


def _check_factored(group: Group) -> None:
    check_number("lr", group["lr"], 0.0)
    check_number("beta", group["beta"], 0.0, 1.0)
    check_number("weight_decay", group["weight_decay"], 0.0)
    check_number("complement", group["complement"], 0.0)
    check_whole("rank", group["rank"], 1)
    check_choice("update", group["update"], UPDATES)
    check_choice("lr_scale", group["lr_scale"], LR_SCALES)
    if group["layout"] is not None:
        check_choice("layout", group["layout"], LAYOUTS)
    check_flag("transposed", group["transposed"])
    if group["update"] == "polar":
        check_polar(group)
        return
    check_number("eta1", group["eta1"], 0.0)
    check_number("clip_eps", group["clip_eps"], 0.0)
    check_number("max_value", group["max_value"], 0.0, open_low=True)
    if group["lr_scale"] == "match_rms_adamw":
        raise ValueError(
            "lr_scale='match_rms_adamw' assumes a step of singular values 1; with update='reciprocal' use "
            "lr_scale='none' or 'spectral'"
        )


def _check_adamw(group: Group) -> None:
    check_number("lr", group["lr"], 0.0)
    check_number("eps", group["eps"], 0.0)
    check_number("weight_decay", group["weight_decay"], 0.0)
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas={betas!r} should be a pair of numbers in [0, 1)")
    check_number("betas[0]", betas[0], 0.0, 1.0)
    check_number("betas[1]", betas[1], 0.0, 1.0)


def check_group(group: Group) -> None:
    """Raise ValueError for a value of a completed group that is missing or out of range."""
    try:
        (_check_factored if group["algorithm"] == "mofasgd" else _check_adamw)(group)
    except KeyError as error:
        raise ValueError(f"a group with algorithm={group['algorithm']!r} lacks its key {error}") from None


def complete(group: Group, factored: Group, adamw: Group) -> Group:
    """Return `group` with the defaults of its algorithm filled in, checked.

    Args:
        group: as the user gave it; `algorithm` defaults to "mofasgd".
        factored, adamw: defaults of the two algorithms.

    Raises:
        ValueError: for an unknown key, a key that its algorithm would ignore, or a value out of range.
    """
    algorithm = group.get("algorithm", "mofasgd")
    check_choice("algorithm", algorithm, ALGORITHMS)
    own, other = (FACTORED_KEYS, ADAMW_KEYS) if algorithm == "mofasgd" else (ADAMW_KEYS, FACTORED_KEYS)
    for key in group:
        if key in own or key in _FOREIGN_KEYS:
            continue
        if key in other:
            raise ValueError(f"{key!r} has no effect in a group with algorithm={algorithm!r}: drop it")
        raise ValueError(f"group key {key!r} is unknown{did_you_mean(key, own)}")
    defaults = dict(factored if algorithm == "mofasgd" else adamw)
    if algorithm == "mofasgd":
        polar = group.get("update", defaults["update"]) == "polar"
        defaults = {k: v for k, v in defaults.items() if not (polar and k in RECIPROCAL_DEFAULTS)}
        if not polar:
            defaults = RECIPROCAL_DEFAULTS | defaults
    completed = defaults | group | {"algorithm": algorithm}
    check_group(completed)
    return {key: _plain(value) for key, value in completed.items()}


def _plain(value: Any) -> Any:
    """Return Python's number for one of NumPy's, which torch.load would refuse to read from a checkpoint."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, (bool, Tensor)) else value


def check_parameters(group: Group) -> None:
    """Raise ValueError for a parameter of a completed group that its algorithm cannot train; warn of lowered ranks."""
    before: set[int] = set()
    for position, param in enumerate(group["params"]):
        names = group.get("param_names")
        name = f"parameter {names[position]!r}" if names else f"parameter {position} of its group"
        if id(param) in before:
            raise ValueError(f"{name} is in its group twice: list each parameter once")
        before.add(id(param))
        check_kind(param, name)
        if param.dtype not in _WEIGHT_DTYPES:
            hint = "" if param.dtype.is_floating_point else " (quantized weights: dequantize them, or freeze them)"
            raise ValueError(f"{name} is {param.dtype}: train weights in bfloat16, float32 or float64{hint}")
        if group["algorithm"] == "adamw":
            continue
        try:
            shape = matrix_shape(group["layout"], tuple(param.shape))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if min(shape.m, shape.n) < group["rank"]:
            warnings.warn(
                f"{name} is {shape.m} x {shape.n}: its rank is lowered from {group['rank']} to {min(shape.m, shape.n)}",
                stacklevel=5,
            )
