"""Which parameter of a model is attached in which mode, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mofasgd.attach.release import ReleaseHook
from mofasgd.attach.sketch import mixin_for, why_not
from mofasgd.dist.shards import is_sharded
from mofasgd.options import Group


class Owner(Protocol):
    """What a handle asks of its optimizer."""

    seed: int
    state_dtype: torch.dtype
    state: Any
    _pending: dict[Tensor, list[int]] | None

    def _parameters(self) -> list[tuple[int, Tensor, Group]]:
        """Return (number, parameter, group) of all; the same list until they change."""

    def _waiting(self) -> dict[Tensor, list[int]]:
        """Make missing state; return the numbers of the matrices without a momentum, by parameter."""

    def _step_in_backward(self, index: int, param: Tensor, group: Group) -> None: ...

    def _refuse_full_gradient(self, group: Group) -> None: ...

    def _detached(self) -> None: ...

    def _meet(self) -> None:
        """Begin as rank 0 does, unless that has been done."""


class Stacked(Protocol):
    """Parameters of one shape whose state lies side by side (`buckets.Bucket`)."""

    @property
    def members(self) -> Sequence[Any]:
        """Of each `param`."""

    def stack(self, key: str) -> Tensor:
        """Return an entry of all members' state as one tensor (count, ...)."""


class Row(NamedTuple):
    """One trainable parameter: its name, how its gradient is kept and why, and the layers that sketch it."""

    name: str
    param: Tensor
    mode: str
    why: str
    layers: list[nn.Module]


def plan(model: nn.Module, owner: Owner, mode: str, stepping: bool) -> list[Row]:
    """Return how each trainable parameter of `model` is served; arguments and errors as in `MoFaSGD.attach`."""
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters() if param.requires_grad}
    groups = {param: group for _, param, group in owner._parameters()}
    for param, name in names.items():
        if param not in groups:
            raise ValueError(
                f"{name!r} of the model is trainable but the optimizer does not own it: build the groups with "
                "mofasgd.param_groups(model), add it with add_param_group, or freeze it with requires_grad_(False)"
            )
    for index, own, group in owner._parameters():
        if group["algorithm"] == "mofasgd" and own.requires_grad and own not in names:
            raise ValueError(
                f"parameter {_name_of(index, own, group)} of the optimizer is not in the model: attach the module "
                "that holds all of its factored parameters"
            )
    sharded = next((name for p, name in names.items() if stepping and is_sharded(p)), None)
    if sharded is not None:
        raise ValueError(
            f"step_in_backward=True: {sharded!r} is sharded (FSDP2), and its step would wait for other ranks in the "
            "middle of FSDP's own communication; use mode='release' without it"
        )
    layers: dict[Tensor, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        if mixin_for(module) is not None:
            for weight in module.parameters(recurse=False):
                layers.setdefault(weight, []).append((path, module))
    for factored in (p for p in names if groups[p]["algorithm"] == "mofasgd" and not stepping):
        owner._refuse_full_gradient(groups[factored])
    return [_row(name, p, groups[p], layers.get(p, []), mode, stepping) for p, name in names.items()]


def hookable(param: Tensor) -> bool:
    """Whether hooks of `Tensor.register_hook` are ever called: FSDP2 calls those after accumulation only."""
    return not is_sharded(param)


def _name_of(index: int, param: Tensor, group: Group) -> str:
    names = group.get("param_names")
    place = next(i for i, p in enumerate(group["params"]) if p is param)
    return repr(names[place]) if names else f"{index} ({' x '.join(map(str, param.shape))})"


def _row(name: str, param: Tensor, group: Group, layers: list[tuple[str, nn.Module]], mode: str, stepping: bool) -> Row:
    if group["algorithm"] == "adamw":
        return Row(name, param, "p.grad", "trained by AdamW", [])
    if mode == "release":
        why = "step_in_backward=True" if stepping else "mode='release'"
        return Row(name, param, "step" if stepping else "release", why, [])
    reasons = {path: why_not(module, param) for path, module in layers}
    able = [module for path, module in layers if reasons[path] is None]
    refusal = next((reason for reason in reasons.values() if reason), "not the weight of a linear or embedding layer")
    others = [h for h in (param._post_accumulate_grad_hooks or {}).values() if not isinstance(h, ReleaseHook)]
    if (hookable(param) and param._backward_hooks) or others:
        # They would never be called.
        able, refusal = [], "has hooks on its gradient"
    if able:
        return Row(name, param, "sketch", ", ".join(sorted({type(module).__name__ for module in able})), able)
    if mode == "sketch":
        raise ValueError(f"mode='sketch' cannot serve {name!r}: {refusal}; use mode='auto' or 'release'")
    return Row(name, param, "release", refusal, [])
