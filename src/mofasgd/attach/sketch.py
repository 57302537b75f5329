"""Linear and embedding layers whose backward makes the sketches of the weight's gradient, and never the gradient.

A layer runs its own forward with a detached weight, then passes the result through a node that changes nothing and
takes the parameter's two probes. In backward, with delta the gradient of the result (T x m) and x the input (T x n),

    G = delta' x        so        G V = delta' (x V),        G' U = x' (delta U)

are the node's gradients of the probes. All else stays autograd's: it sums several uses of a weight and several
micro-batches, reruns checkpointed layers, and the layer's own backward computes the gradients of input and bias.
The node wraps the layer's output, rather than the layer as a whole, so that the forward is bit for bit
torch's under every dtype and autocast. Embeddings: x is a row of the identity for each index.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mofasgd.attach.swap import Attached, own_class
from mofasgd.attach.window import Window
from mofasgd.rng import gaussian


def _same(y: Tensor) -> Tensor:
    # Not a view for autograd, or layers after this one could not work in place; nothing else refers to y.
    same: Tensor = torch.ops.aten._unsafe_view.default(y, y.shape)
    return same


def _refuse_double_backward(name: str) -> None:
    # Tracing for torch.compile has gradients enabled without meaning it.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"backward with create_graph=True through {name!r}: its gradient is sketched and cannot be "
            "differentiated again; use attach(model, mode='release')"
        )


def _factor(stored: Tensor | None, keys: Tensor, side: int, shape: tuple[int, int], delta: Tensor) -> Tensor:
    """Return V (side 0) or U (side 1), or the test matrix of the first window, which is made here and not kept."""
    return gaussian(*shape, keys[side], delta.device, delta.dtype) if stored is None else stored


class _LinearSketch(torch.autograd.Function):
    """Identity on y = x W' + b (..., m); gradients (m, .) and (n, .) of the probes are the sketches.

    With U, V or, while the parameter has no momentum, the keys of the test matrices; the other is None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        right: Tensor,
        left: Tensor,
        U: Tensor | None,
        V: Tensor | None,
        keys: Tensor | None,
        name: str,
    ) -> Tensor:
        # Under autocast this is the copy that torch's own layer would save.
        ctx.save_for_backward(x.to(y.dtype), U, V, keys)
        ctx.widths, ctx.dtype, ctx.name = (right.shape[1], left.shape[1]), right.dtype, name
        return _same(y)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_double_backward(ctx.name)
        x, U, V, keys = ctx.saved_tensors
        x, d = x.reshape(-1, x.shape[-1]), delta.reshape(-1, delta.shape[-1])
        V = _factor(V, keys, 0, (x.shape[1], ctx.widths[0]), d)
        GV = d.mT @ (x @ V)
        # Before U is made: of the first window's matrices there is one at a time.
        del V
        U = _factor(U, keys, 1, (d.shape[1], ctx.widths[1]), d)
        GtU = x.mT @ (d @ U)
        return (delta if ctx.needs_input_grad[0] else None), None, GV.to(ctx.dtype), GtU.to(ctx.dtype), *[None] * 4


class _EmbeddingSketch(torch.autograd.Function):
    """Identity on y = W[ids] (..., n); as `_LinearSketch`. Rows of `padding` (-1: none) have no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        ids: Tensor,
        right: Tensor,
        left: Tensor,
        U: Tensor | None,
        V: Tensor | None,
        keys: Tensor | None,
        name: str,
        padding: int,
    ) -> Tensor:
        ctx.save_for_backward(ids, U, V, keys)
        ctx.widths, ctx.dtype, ctx.name = (right.shape[1], left.shape[1]), right.dtype, name
        ctx.rows, ctx.padding = right.shape[0], padding
        return _same(y)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_double_backward(ctx.name)
        ids, U, V, keys = ctx.saved_tensors
        ids, d = ids.reshape(-1), delta.reshape(-1, delta.shape[-1])
        dV = (d @ _factor(V, keys, 0, (d.shape[1], ctx.widths[0]), d)).to(ctx.dtype)
        # torch's own sum over equal indices, as deterministic as a dense embedding's.
        GV = torch.ops.aten.embedding_dense_backward.default(dV, ids, ctx.rows, ctx.padding, False)
        U = _factor(U, keys, 1, (ctx.rows, ctx.widths[1]), d)
        GtU = d.mT @ torch.where((ids == ctx.padding)[:, None], 0.0, U[ids])
        return (delta if ctx.needs_input_grad[0] else None), None, GV, GtU.to(ctx.dtype), *[None] * 5


class _Sketched(Attached):
    """What both layers share."""

    weight: Tensor
    _mofasgd_window: Window | None = None

    def _live(self) -> Window | None:
        """Return what sketches this call, or None if it is to run as it always did.

        That is: without gradients, with a frozen weight or another one put in its place (functional_call), or while
        a small matrix sums its dense gradient in its first window.
        """
        window, weight = self._mofasgd_window, self.weight
        if window is None or not torch.is_grad_enabled() or weight is not window.param or not weight.requires_grad:
            return None
        return None if window.probes is None else window


class SketchedLinear(_Sketched):
    """Mixed into the class of an `nn.Linear` while it is attached."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """Return `nn.Linear`'s output."""
        window = self._live()
        if window is None:
            return F.linear(input, self.weight, self.bias)
        y = F.linear(input, self.weight.detach(), self.bias)
        sketched: Tensor = _LinearSketch.apply(y, input, *window.operands(y.dtype))  # type: ignore[no-untyped-call]
        return sketched


class SketchedEmbedding(_Sketched):
    """Mixed into the class of an `nn.Embedding` while it is attached."""

    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool

    def forward(self, input: Tensor) -> Tensor:
        """Return `nn.Embedding`'s output."""
        window = self._live()
        weight = self.weight if window is None else self.weight.detach()
        options = (self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
        y = F.embedding(input, weight, *options)
        if window is None:
            return y
        padding = -1 if self.padding_idx is None else self.padding_idx
        operands = (*window.operands(y.dtype), padding)
        sketched: Tensor = _EmbeddingSketch.apply(y, input, *operands)  # type: ignore[no-untyped-call]
        return sketched


_MIXINS: dict[type[nn.Module], type[_Sketched]] = {nn.Linear: SketchedLinear, nn.Embedding: SketchedEmbedding}


def mixin_for(module: nn.Module) -> type[_Sketched] | None:
    """Return what sketches `module`'s weight, or None if it is neither layer."""
    return next((mixin for kind, mixin in _MIXINS.items() if isinstance(module, kind)), None)


def why_not(module: nn.Module, param: Tensor) -> str | None:
    """Return why `module`, a linear or embedding layer, cannot sketch its weight `param`, or None."""
    kind = next(kind for kind in _MIXINS if isinstance(module, kind))
    if module._parameters.get("weight") is not param:
        return "the layer computes its weight from it"
    if own_class(module).forward is not kind.forward or "forward" in vars(module):  # type: ignore[attr-defined]
        return f"{type(module).__name__} has a forward of its own"
    if getattr(module, "scale_grad_by_freq", False):
        return "scale_grad_by_freq"
    return None
