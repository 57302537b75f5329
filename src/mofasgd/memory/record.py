"""Every tensor storage that training makes and frees, by what it is for, on any device.

Storages are seen as operations return them (a `TorchDispatchMode`, in backward too), and what each is for is known
later: a storage found in `p.grad` before a step is a gradient over its whole life. What an operation allocates and
frees within itself is not seen; `torch.cuda.max_memory_allocated` has it.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mofasgd.optimizer import MoFaSGD

CATEGORIES = ("weights", "optimizer state", "gradients", "sketches", "activations", "temporaries")
"""In the order of a picture, from below. Activations are what forward leaves for backward; temporaries the rest: what
lives within forward, backward or the step only, gradients that are sketched and dropped within backward included."""

Event = tuple[float, int, int]
"""Seconds since the start, number of the storage, bytes (negative: freed)."""


class Timeline(NamedTuple):
    """What was alive when.

    Attributes:
        times: seconds since the start, one an event, rising.
        sizes: by category, the bytes alive after each event.
        steps: (begin, end) of the optimizer's steps, in seconds.
    """

    times: list[float]
    sizes: dict[str, list[int]]
    steps: list[tuple[float, float]]

    def total(self) -> list[int]:
        """Return the bytes alive after each event."""
        return [sum(row) for row in zip(*self.sizes.values(), strict=True)]


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the memory of training while it is entered.

    Args:
        model: whose parameters and buffers are the weights.
        optimizer: whose state, and if it is an attached MoFaSGD whose sketches, are told from the rest.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.optimizer = model, optimizer
        self.device = next(model.parameters()).device
        self.events: list[Event] = []
        self.steps: list[tuple[float, float]] = []
        self._alive: dict[int, int] = {}
        self._sizes: list[int] = []
        self._category: dict[int, str] = {}
        self._forward: set[int] = set()
        self._phase = "forward"
        self._hooks: list[Any] = []
        self._begin = time.perf_counter()

    def __enter__(self) -> Recorder:
        self._begin = time.perf_counter()
        self._mark("weights", [*self.model.parameters(), *self.model.buffers()])
        self._mark("optimizer state", tree_leaves(list(self.optimizer.state.values())))
        self._mark("gradients", [p.grad for p in self.model.parameters()])
        self._mark("sketches", sketches(self.optimizer))
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._phase != "step":
            backward = torch._C._current_graph_task_id() != -1
            if backward and self._phase == "forward":
                self._keep_activations()
            self._phase = "backward" if backward else "forward"
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def _now(self) -> float:
        return time.perf_counter() - self._begin

    def _see(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor's storage, which is an event if it is new; None on another device."""
        if tensor.device != self.device or tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._alive:
            number = len(self._sizes)
            self._alive[address] = number
            self._sizes.append(storage.nbytes())
            self.events.append((self._now(), number, self._sizes[number]))
            if self._phase == "forward":
                self._forward.add(number)
            # The Python object of a storage lives as long as the storage does.
            weakref.finalize(storage, self._freed, address, number).atexit = False
        return self._alive[address]

    def _freed(self, address: int, number: int) -> None:
        if self._alive.get(address) == number:
            del self._alive[address]
            self.events.append((self._now(), number, -self._sizes[number]))

    def _mark(self, category: str, tensors: Iterable[Any]) -> None:
        """Say what storages are for, unless that is known."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and (number := self._see(tensor)) is not None:
                self._category.setdefault(number, category)

    def _keep_activations(self) -> None:
        """Backward begins: what forward has made and is alive has been kept for it."""
        for number in self._alive.values():
            if number in self._forward and number not in self._category:
                self._category[number] = "activations"
        self._forward.clear()

    def _before_step(self, *_: Any) -> None:
        self._forward.clear()
        self._mark("gradients", [p.grad for p in self.model.parameters()])
        self._mark("sketches", sketches(self.optimizer))
        self._phase = "step"
        self.steps.append((self._now(), self._now()))

    def _after_step(self, *_: Any) -> None:
        self._mark("optimizer state", tree_leaves(list(self.optimizer.state.values())))
        self._phase = "forward"
        self.steps[-1] = (self.steps[-1][0], self._now())

    def timeline(self) -> Timeline:
        """Return what was alive when, by category."""
        sizes: dict[str, list[int]] = {category: [] for category in CATEGORIES}
        now = dict.fromkeys(CATEGORIES, 0)
        for _, number, change in self.events:
            now[self._category.get(number, "temporaries")] += change
            for category, held in now.items():
                sizes[category].append(held)
        return Timeline([when for when, _, _ in self.events], sizes, self.steps)


def sketches(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield the tensors of an attached MoFaSGD's windows: sketches, and what layers need to make them."""
    handle = optimizer.handle if isinstance(optimizer, MoFaSGD) else None
    for window in () if handle is None else handle._windows.values():
        for value in tree_leaves([v for k, v in vars(window).items() if k not in ("param", "state", "first")]):
            if isinstance(value, Tensor):
                yield value
                if value.grad is not None:
                    yield value.grad
