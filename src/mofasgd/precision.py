"""True float32 for the small algebra, whatever the global TF32 and autocast settings say."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.backends import cuda, mkldnn

P = ParamSpec("P")
R = TypeVar("R")

# Each backend is asked by its own name: the global getter raises once a program has mixed torch's old and new
# precision settings.
_BACKENDS: tuple[Any, ...] = (cuda.matmul, mkldnn.matmul)  # type: ignore[attr-defined]


@contextmanager
def true_float32(device_type: str) -> Iterator[None]:
    """Run float32 products in float32: no TF32, no bfloat16 passes, no autocast on `device_type`.

    Global state is set and put back, as `torch.autocast` itself does; nothing here waits for the device.
    With TF32 a Gram or Cholesky factorization of the sketches loses positive definiteness and training turns
    to NaN.
    """
    saved = [backend.fp32_precision for backend in _BACKENDS]
    cast = torch.is_autocast_enabled(device_type) if torch.amp.is_autocast_available(device_type) else False
    try:
        for backend in _BACKENDS:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False) if cast else nullcontext():
            yield
    finally:
        for backend, precision in zip(_BACKENDS, saved, strict=True):
            # An inherited setting goes back to being inherited, so that a later change of its parent reaches it.
            backend.fp32_precision = "none"
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


def in_true_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate `function` to run under `true_float32` on the device of its first argument, a tensor."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else next(iter(kwargs.values()))
        assert isinstance(first, Tensor)
        with true_float32(first.device.type):
            return function(*args, **kwargs)

    return wrapped
