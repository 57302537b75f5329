"""What ranks exchange before a step: sums of sketches, and what AdamW's gradients lack.

Everything after it is arithmetic that all ranks do alike: the factors' replicated, the weights' on the rows that a rank
holds. The set of tensors is decided by the parameters, never by which gradients came to this rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mofasgd.attach import Handle
from mofasgd.attach.window import Window
from mofasgd.dist.reduce import Ranks
from mofasgd.dist.shards import is_sharded, local, part_of, whole
from mofasgd.gradient import FirstWindow
from mofasgd.layout import as_matrices
from mofasgd.options import Group
from mofasgd.state import factored_shape


@dataclass
class Plain:
    """An AdamW parameter's gradient as far as other ranks have a say in it.

    Attributes:
        grad: what this rank holds of the mean gradient.
        present: whether any rank had a gradient, 0-dim bool; None: all do.
        square: |g|^2 over all ranks, 0-dim float64; None: `grad` is whole.
    """

    grad: Tensor
    present: Tensor | None = None
    square: Tensor | None = None


@dataclass
class Exchange:
    """Windows whose sums are those of all ranks, and AdamW's gradients; of parameters that are not in it `p.grad`."""

    windows: dict[Tensor, Window] = field(default_factory=dict)
    plain: dict[Tensor, Plain] = field(default_factory=dict)


class ShardedGradient(Window):
    """A sharded parameter's `p.grad`, which stays where it is."""

    def __init__(
        self, seed: int, index: int, param: Tensor, group: Group, state: dict[str, Tensor], pending: list[int]
    ) -> None:
        """Sketch the gradient of `param`, number `index` of the optimizer."""
        first = FirstWindow(seed, index, *factored_shape(param, group), state["U"].dtype)
        super().__init__(f"parameter {index}", param, state, first, pending, probed=False)
        assert param.grad is not None
        self.add(param.grad)

    def dense(self) -> Tensor:
        """Gather the gradient (b, m, n) from all ranks, which call this as well. It is not kept."""
        assert self.param.grad is not None
        return as_matrices(whole(self.param.grad), self.first.shape)


def exchange(
    windows: dict[Tensor, Window], adamw: Iterable[Tensor], handle: Handle | None, ranks: Ranks | None
) -> Exchange:
    """Sum over `ranks` (None: there is one).

    Args:
        windows: of factored parameters, in an order that is the same on all ranks.
        adamw: the AdamW parameters, in such an order.
        handle: of the attached model, or None.
    """
    averaged = set(handle.averaged) if handle is not None and ranks is not None else set()
    # After a step that failed they have been summed already.
    sums = [window for window in windows.values() if not window.shared]
    tensors: list[Tensor] = []
    if ranks is not None:
        shared = [window.share(ranks.size) for window in sums]
        tensors = [tensor for some, _ in shared for tensor in some]
        if divided := [tensor for some, divide in shared if divide for tensor in some]:
            torch._foreach_div_(divided, ranks.size)
    plain: dict[Tensor, Plain] = {}
    means, flags, sharded = [], [], []
    for param in adamw:
        if param in averaged and ranks is not None:
            means.append(param)
            flags.append(param.grad is not None)
            grad = torch.zeros_like(param) if param.grad is None else param.grad.div_(ranks.size)
            plain[param] = Plain(grad)
        elif is_sharded(param) and param.grad is not None:
            sharded.append(param)
            plain[param] = Plain(local(param.grad))
    tensors += [plain[param].grad for param in means]
    squares = _squares(sharded, plain)
    if ranks is not None:
        present = [torch.tensor(flags, dtype=torch.float32).to(means[0].device, non_blocking=True)] if means else []
        ranks.sum([*tensors, *present, *squares])
        for param, seen in zip(means, present[0].unbind() if present else (), strict=True):
            plain[param].present = seen > 0
    for param, square in zip(sharded, squares[0].unbind() if squares else (), strict=True):
        plain[param].square = square
    return Exchange(windows, plain)


def _squares(params: list[Tensor], plain: dict[Tensor, Plain]) -> list[Tensor]:
    """Return the share of this rank in |g|^2 of sharded parameters, as one tensor (len(params),), or none."""
    if not params:
        return []
    norms = torch._foreach_norm([plain[param].grad for param in params], dtype=torch.float64)
    replicas = [part.replicas**0.5 for param in params if (part := part_of(param)) is not None]
    return [torch.stack(torch._foreach_div(norms, replicas)).square()]
