"""Optional Triton kernels. Each file names the torch function that its kernel equals, and nothing else needs them."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, for tests (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def usable(device: torch.device) -> bool:
    """Whether kernels run on `device`: CUDA with Triton installed."""
    return device.type == "cuda" and _installed()


def cdiv(number: int, by: int) -> int:
    """Return a quotient rounded up. A call of Triton's own on the host takes 1.5 us, and a launch needs several."""
    return -(-number // by)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is not below a positive number; see `cdiv`."""
    return 1 << (number - 1).bit_length()


@functools.lru_cache(maxsize=1024)
def _on_device(values: tuple[int, ...], device: torch.device) -> tuple[Tensor, bool]:
    table = torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)
    return table, all(value % 16 == 0 for value in values)


def pointers(tensors: Sequence[Tensor | None], slices: int, size: int, device: torch.device) -> tuple[Tensor, bool]:
    """Return the addresses of the matrices of `tensors`, int64 (len(tensors) * slices,); and do 16 bytes divide all?

    `slices` matrices of `size` bytes each make a tensor; those of None have the address 0. Known addresses are not
    copied again, so that a CUDA graph may be captured once the same tensors have been seen.
    """
    starts = [0 if t is None else t.data_ptr() for t in tensors]
    if slices > 1:
        starts = [start and start + i * size for start in starts for i in range(slices)]
    return _on_device(tuple(starts), device)
