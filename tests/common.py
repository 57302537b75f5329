"""Weights, gradients and a loop for the optimizer's tests."""

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mofasgd import algebra, columns

F64 = {"state_dtype": torch.float64}


def weight(*shape, dtype=torch.float64, seed=0):
    return nn.Parameter(
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    )


def gradients(shape, steps, seed=1):
    rng = np.random.default_rng(seed)
    drift = rng.standard_normal(shape)
    return [drift + rng.standard_normal(shape) for _ in range(steps)]


def run(opt, params, grads):
    for g in grads:
        for p, value in zip(params, g if isinstance(g, tuple) else (g,), strict=True):
            p.grad = torch.as_tensor(value).to(p.dtype)
        opt.step()


class NoReadback(TorchFunctionMode):
    """Fail on every method by which a tensor's value reaches the host.

    A CPU may look at its own memory, as two shortcuts do: here it goes the way of other devices.
    """

    NAMES = frozenset(
        {"item", "tolist", "numpy", "cpu", "nonzero"} | {f"__{n}__" for n in ("bool", "int", "float", "index")}
    )

    def __enter__(self):
        self.shortcuts = columns._in_order, algebra._idle
        columns._in_order, algebra._idle = columns._by_pivots, lambda close: False
        return super().__enter__()

    def __exit__(self, *error):
        columns._in_order, algebra._idle = self.shortcuts
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert getattr(func, "__name__", "") not in self.NAMES, func
        return func(*args, **(kwargs or {}))
