"""Which factored parameters step together: those of one group, shape, dtype and device, their state side by side."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, eq, is_
from typing import Any

import torch
from torch import Tensor

from mofasgd.dist.shards import Part, is_sharded, part_of
from mofasgd.gradient import Gradient
from mofasgd.layout import MatrixShape
from mofasgd.options import Group, check_group
from mofasgd.rng import ROUNDING, key_of, keys_on
from mofasgd.state import factored_shape

Owned = tuple[int, Tensor, Group]
"""A parameter: its number in the optimizer, itself, its group."""

_CHECKED = ("algorithm", "rank", "layout", "update", "lr_scale")
"""Keys of a group whose change makes it be checked again; numbers may change at every step."""


class Inventory:
    """The parameters of an optimizer's groups, listed once for as long as they are the same objects.

    Attributes:
        owned: all of them, numbered over the groups.
        sharded: those that are DTensors.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        pairs = [(p, group) for group in groups for p in group["params"]]
        self.owned: list[Owned] = [(i, p, group) for i, (p, group) in enumerate(pairs)]
        self._params = [p for p, _ in pairs]
        self._groups, self._sizes = list(groups), [len(group["params"]) for group in groups]
        self._types = list(map(type, self._params))
        self.sharded = [p for p in self._params if is_sharded(p)]

    def holds(self, groups: Sequence[Group]) -> bool:
        """Whether these groups have the same parameters. No tensor is hashed, which would be Python of torch's."""
        return (
            same(groups, self._groups)
            and [len(group["params"]) for group in groups] == self._sizes
            and all(map(is_, chain.from_iterable(group["params"] for group in groups), self._params))
            and all(map(is_, map(type, self._params), self._types))
        )


class Complete:
    """The state of an optimizer's parameters, all of it there, for as long as it is the same objects.

    Attributes:
        owned: the parameters (`Inventory.owned`).
    """

    def __init__(self, owned: list[Owned], states: Mapping[Tensor, dict[str, Tensor]]) -> None:
        self.owned = owned
        self._params, self._states = list(states), list(states.values())
        # Reading `optimizer.state[p]` leaves an empty one.
        self._filled = list(map(bool, self._states))
        self._without = [param for _, param, _ in owned if not states.get(param)]

    def keeps(self, states: Mapping[Tensor, dict[str, Tensor]]) -> bool:
        """Whether these are the same states, of the same parameters."""
        return same(states, self._params) and same(states.values(), self._states)

    def holds(self, owned: list[Owned], states: Mapping[Tensor, dict[str, Tensor]]) -> bool:
        """Whether these parameters still have these states, and no other needs one."""
        return (
            owned is self.owned
            and self.keeps(states)
            and list(map(bool, self._states)) == self._filled
            and not any(param.requires_grad or param.grad is not None for param in self._without)
        )


def same(these: Collection[Any], those: Collection[Any]) -> bool:
    """Whether two collections hold the same objects, in the same order."""
    return len(these) == len(those) and all(map(is_, these, those))


@dataclass
class Member:
    """A factored parameter, and what one step says of it.

    Attributes:
        index: number of the parameter in the optimizer, as in its state_dict.
        param, group, state: the weight, its group, its state (`mofasgd.state`).
        shape: how it is cut into matrices; b of them below.
        gradient: of this window, not scaled by `factor`; None without one.
        factor: of the gradient (clipping and GradScaler's scale), 0-dim, once it is known; None: 1.
        spaces: what the complement leaves out, (b, m, 2r) and (b, n, 2r), once it is known and if it is asked for.
        part: the rows that this rank holds of a sharded weight; None: all.
    """

    index: int
    param: Tensor
    group: Group
    state: dict[str, Tensor]
    shape: MatrixShape
    gradient: Gradient | None = None
    factor: Tensor | None = None
    spaces: tuple[Tensor, Tensor] | None = None
    part: Part | None = None

    def dense(self) -> Tensor:
        """Return the gradient as matrices (b, m, n)."""
        if self.gradient is None:
            _, m, n = self.shape
            return torch.zeros(self.shape.batch, m, n, dtype=self.param.dtype, device=self.param.device)
        return self.gradient.dense()

    def forget(self) -> None:
        """Let go of what the step has said."""
        self.gradient = self.factor = self.spaces = None


class Bucket:
    """Parameters that step together.

    Attributes:
        members: of one group, shape, dtype and device.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self._states = [member.state for member in members]
        self._stacks: dict[str, tuple[list[Tensor], list[int], Tensor]] = {}
        self._keys: tuple[int, Tensor] | None = None
        self._ones: Tensor | None = None

    def stack(self, key: str) -> Tensor:
        """Return an entry of all members' state as one tensor (count, ...) that shares their memory."""
        parts = [state[key] for state in self._states]
        known, at, stack = self._stacks.get(key, ((), [], None))
        # `part.data = ...` moves a part in memory, whose stack then is another's.
        if stack is None or not all(map(is_, parts, known)) or [part.data_ptr() for part in parts] != at:
            stack = stacked(self._states, key)
            parts = [state[key] for state in self._states]
            self._stacks[key] = parts, [part.data_ptr() for part in parts], stack
        return stack

    def rounding_keys(self, seed: int) -> Tensor:
        """Return the members' random keys, rows of `rng.key_tensor`."""
        if self._keys is None or self._keys[0] != seed:
            keys = tuple(key_of(seed, ROUNDING, member.index) for member in self.members)
            self._keys = seed, keys_on(keys, self.members[0].param.device)
        return self._keys[1]

    def ones(self, like: Tensor) -> Tensor:
        """Return ones like a tensor (B,) of the members' matrices, made once."""
        if self._ones is None or self._ones.dtype is not like.dtype:
            self._ones = torch.ones_like(like)
        return self._ones


class Arrangement:
    """How an optimizer's parameters step together, as long as they, their groups and their state stay the same.

    Attributes:
        unfactored: what AdamW trains.
        buckets: factored parameters all of whose matrices have a momentum.
        starting: the other factored parameters, and the numbers of the matrices without a momentum, equal for all of
            a bucket; stacks that have started in part are alone.
    """

    def __init__(
        self,
        complete: Complete,
        states: Mapping[Tensor, dict[str, Tensor]],
        pending: Mapping[Tensor, list[int]],
    ) -> None:
        """Arrange the parameters of `complete` by their `states` (those without any are left out).

        Raises:
            ValueError: if a group has a value out of range, or another rank than a parameter's state, or a parameter
                another shape.
        """
        owned = complete.owned
        self.unfactored = [(i, p, group) for i, p, group in owned if group["algorithm"] == "adamw"]
        self._of = complete, pending
        self._params = [p for _, p, _ in owned]
        self._groups = list({id(group): group for _, _, group in owned}.values())
        for group in self._groups:
            check_group(group)
        self._seen = list(self._look())
        buckets: dict[tuple[Any, ...], list[Member]] = {}
        for index, param, group in owned:
            state = states.get(param)
            if group["algorithm"] == "adamw" or not state:
                continue
            shape, rank = factored_shape(param, group)
            if state["s"].shape[-1] != rank:
                raise ValueError(
                    f"parameter {index} has a momentum of rank {state['s'].shape[-1]} but its group now says {rank}: "
                    "the rank of a running optimizer is fixed"
                )
            if state["U"].shape[-2] != shape.m or state["V"].shape[-2] != shape.n:
                raise ValueError(
                    f"parameter {index} is {shape.m} x {shape.n} but its momentum {state['U'].shape[-2]} x "
                    f"{state['V'].shape[-2]}: make a new optimizer for weights of another shape"
                )
            waiting = tuple(pending.get(param, ()))
            alone = index if 0 < len(waiting) < shape.batch else None
            part = part_of(param)
            key = (id(group), shape, param.device, param.dtype, waiting, alone, part)
            buckets.setdefault(key, []).append(Member(index, param, group, state, shape, part=part))
        self.buckets = [Bucket(members) for key, members in buckets.items() if not key[4]]
        self.starting = [(members, list(key[4])) for key, members in buckets.items() if key[4]]

    def fits(self, complete: Complete, pending: Mapping[Tensor, list[int]]) -> bool:
        """Whether these arguments of the constructor would make the same; each is one object until it changes."""
        return complete is self._of[0] and pending is self._of[1] and all(map(eq, self._look(), self._seen))

    def _look(self) -> Iterator[Any]:
        """Yield what else an arrangement depends on, of each parameter and group."""
        of_params = (map(attrgetter(name), self._params) for name in ("dtype", "device", "shape"))
        return chain(*of_params, (tuple(map(group.get, _CHECKED)) for group in self._groups))


def stacked(states: Sequence[dict[str, Tensor]], key: str) -> Tensor:
    """Return the entries `key` of all states as one tensor (len(states), ...) that shares their memory.

    Entries that do not lie side by side yet are moved there: each state then holds a view of the stack.
    """
    parts = [state[key] for state in states]
    first, size = parts[0], parts[0].numel() * parts[0].element_size()
    start, storage = first.data_ptr(), first.untyped_storage()
    inside = first.storage_offset() * first.element_size() + size * len(parts) <= storage.nbytes()
    if inside and first.is_contiguous() and all(part.data_ptr() == start + i * size for i, part in enumerate(parts)):
        return first.as_strided((len(parts), *first.shape), (first.numel(), *first.stride()))
    stack = torch.stack(parts)
    for state, part in zip(states, stack.unbind(), strict=True):
        state[key] = part
    return stack
