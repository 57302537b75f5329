"""Hooks on a parameter's accumulated gradient: sketch it and free it, or step with it at once.

They fire after autograd has added a backward pass's contributions into `p.grad`. Under every sketched parameter the
first one is a net for dense gradients that bypass the layer's forward: `nn.MultiheadAttention` and fused losses read
the weight itself, a weight penalty is a function of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mofasgd.attach.window import Window
from mofasgd.options import Group


class ReleaseHook:
    """Adds `p.grad` to the parameter's window and frees it."""

    def __init__(self, window: Window) -> None:
        self.window = window

    def __call__(self, param: Tensor) -> None:
        """Take the gradient of `param`, if nobody has freed it before."""
        grad = param.grad
        if grad is None:
            return
        if grad.is_sparse:
            raise ValueError(f"{self.window.name!r} has a sparse gradient: build its embedding with sparse=False")
        self.window.add(grad)
        param.grad = None


class StepHook(ReleaseHook):
    """Takes the parameter's whole step while its gradient exists, then frees that."""

    def __init__(self, window: Window, step: Callable[[int, Tensor, Group], None], index: int, group: Group) -> None:
        super().__init__(window)
        self._step, self._index, self._group = step, index, group

    @torch.no_grad()
    def __call__(self, param: Tensor) -> None:
        """Step `param`.

        Raises:
            RuntimeError: if it has been stepped since the last `step()`.
        """
        if param.grad is None:
            return
        if self.window.stepped:
            raise RuntimeError(
                f"a second gradient of {self.window.name!r} before step(): with step_in_backward=True the weight has "
                "already moved by the first, so micro-batches (or a weight used in two reentrant checkpoints) would "
                "take several steps instead of one. Use one backward per step, or attach without step_in_backward"
            )
        self.window.stepped = True
        self._step(self._index, param, self._group)
        param.grad = None
