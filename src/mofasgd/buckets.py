"""Which factored parameters step together: those of one group, shape, dtype and device, their state side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from mofasgd.dist.shards import Part, part_of
from mofasgd.gradient import Gradient
from mofasgd.layout import MatrixShape
from mofasgd.options import Group
from mofasgd.rng import ROUNDING, key_of, keys_on
from mofasgd.state import factored_shape

Owned = tuple[int, Tensor, Group]
"""A parameter: its number in the optimizer, itself, its group."""


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
        self._stacks: dict[str, tuple[list[Tensor], Tensor]] = {}

    def stack(self, key: str) -> Tensor:
        """Return an entry of all members' state as one tensor (count, ...) that shares their memory."""
        parts = [member.state[key] for member in self.members]
        known, stack = self._stacks.get(key, ((), None))
        if stack is None or not all(map(is_, parts, known)) or parts[-1].data_ptr() != stack[-1].data_ptr():
            stack = stacked([member.state for member in self.members], key)
            self._stacks[key] = [member.state[key] for member in self.members], stack
        return stack

    def rounding_keys(self, seed: int) -> Tensor:
        """Return the members' random keys, rows of `rng.key_tensor`."""
        keys = tuple(key_of(seed, ROUNDING, member.index) for member in self.members)
        return keys_on(keys, self.members[0].param.device)


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
        parameters: Iterable[Owned],
        states: Mapping[Tensor, dict[str, Tensor]],
        pending: Mapping[Tensor, list[int]],
    ) -> None:
        """Arrange `parameters` by their `states` (those without any are left out).

        Raises:
            ValueError: if a group's rank is no longer that of a parameter's state.
        """
        owned = list(parameters)
        self.unfactored = [(i, p, group) for i, p, group in owned if group["algorithm"] == "adamw"]
        # Held, so that their ids stay theirs.
        self._of = [(p, group, states.get(p)) for _, p, group in owned], pending
        self._seen = _look(owned, states)
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
            waiting = tuple(pending.get(param, ()))
            alone = index if 0 < len(waiting) < shape.batch else None
            part = part_of(param)
            key = (id(group), shape, param.device, param.dtype, waiting, alone, part)
            buckets.setdefault(key, []).append(Member(index, param, group, state, shape, part=part))
        self.buckets = [Bucket(members) for key, members in buckets.items() if not key[4]]
        self.starting = [(members, list(key[4])) for key, members in buckets.items() if key[4]]

    def fits(
        self,
        parameters: Iterable[Owned],
        states: Mapping[Tensor, dict[str, Tensor]],
        pending: Mapping[Tensor, list[int]],
    ) -> bool:
        """Whether these arguments of the constructor would make the same."""
        return pending is self._of[1] and _look(parameters, states) == self._seen


def _look(parameters: Iterable[Owned], states: Mapping[Tensor, dict[str, Tensor]]) -> list[tuple[Any, ...]]:
    """Return what an arrangement depends on."""
    return [
        (id(p), id(group), id(states.get(p)), p.dtype, p.device, p.shape, group.get("rank"), group.get("layout"))
        for _, p, group in parameters
    ]


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
