"""State of same-shaped parameters side by side in memory, so that one launch works on all of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
