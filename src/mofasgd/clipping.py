"""What all parameters of a step share: the norm of their gradient, the factor that clips it, the count of bad ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def measure(
    squares: Sequence[Tensor], max_norm: float | None, grad_scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the norm of the gradient, 0-dim float64, and the factor by which it is to be multiplied (None: 1).

    Args:
        squares: squared norms of the parameters' gradients, float64 of any shapes, on any devices.
        max_norm: norm to clip to, or None.
        grad_scale: what the gradients have been multiplied by (GradScaler), one element, or None.
    """
    if not squares:
        return torch.zeros((), dtype=torch.float64), None
    device = squares[0].device
    norm = torch.cat([s.reshape(-1).to(device) for s in squares]).sum().sqrt()
    factor = None
    if grad_scale is not None:
        factor = 1 / grad_scale.reshape(()).to(device, torch.float64)
        norm = norm * factor
    if max_norm is not None:
        clip = (max_norm / norm).clamp(max=1.0)
        factor = clip if factor is None else factor * clip
    return norm, factor


def count_bad(count: Tensor | int, finite: Sequence[Tensor], gate: Tensor | None) -> Tensor | int:
    """Return `count`, plus 1 if any of the flags is False, unless the gate (0-dim bool, or None) is closed."""
    if not finite:
        return count
    device = finite[0].device
    bad = ~torch.cat([flags.to(device) for flags in finite]).all()
    bad = bad if gate is None else bad & gate.to(device)
    return bad + (count.to(device) if isinstance(count, Tensor) else count)
