"""Linear and embedding layers whose backward makes the sketches of the weight's gradient, and never the gradient.

A layer is one node of the graph. It runs torch's own forward, so that the result is torch's to the bit under every
dtype and autocast, and takes the parameter's two probes. In backward, with delta the gradient of the result (T x m)
and x the input (T x n),

    G = delta' x        so        G V = delta' (x V),        G' U = x' (delta U)

are the node's gradients of the probes; those of input and bias are torch's. Autograd sums several uses of a weight
and several micro-batches, and reruns checkpointed layers. Embeddings: x is a row of the identity for each index.

The node gets the weight, U and V in a tuple, which autograd does not look into: it expects no gradient of them, and
saved-tensor hooks (checkpointing, offloading) have the input alone to keep. That nobody has changed them until
backward is checked here. Compiled graphs save them as any tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active, _get_tracing_state
from torch.autograd import forward_ad

from mofasgd.attach.swap import Attached, own_class
from mofasgd.attach.window import Operands, Window, sums_unrounded
from mofasgd.rng import gaussian


def _owned(y: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and not y._is_view():
        return y
    # Layers after this one could not work in place on a view; nothing else refers to y.
    owned: Tensor = torch.ops.aten._unsafe_view.default(y, y.shape)
    return owned


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    # A call of `to` that changes nothing costs as much as a small kernel.
    return x if x.dtype is dtype else x.to(dtype)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, window: Window | None) -> Tensor:
    # Compiled graphs make one kernel of product and cast by themselves.
    if window is not None and sums_unrounded(a, dtype):
        return torch.mm(a, b, out_dtype=dtype)
    return _cast(torch.mm(a, b), dtype)


def _version(U: Tensor | None, V: Tensor | None, keys: Tensor | None) -> int:
    if U is not None and V is not None:
        # Each only grows: a change of either shows in the sum.
        return U._version + V._version
    assert keys is not None
    return keys._version


class _Node(torch.autograd.Function):
    """What both layers share: what is kept for backward, and what backward refuses."""

    @staticmethod
    def keep(ctx: Any, x: Tensor, right: Tensor, left: Tensor, operands: Operands) -> None:
        """Keep input and operands."""
        weight, U, V, keys, window = operands
        ctx.window, ctx.dtype = window, right.dtype
        if keys is not None:
            ctx.widths = (right.shape[1], left.shape[1])
        if window is None:
            ctx.save_for_backward(x, weight, U, V, keys)
        else:
            ctx.save_for_backward(x)
            ctx.operands = operands
            ctx.weight_version, ctx.version = weight._version, _version(U, V, keys)

    @staticmethod
    def kept(ctx: Any, delta: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, bool]:
        """Return (x, weight, U, V, keys, whether to sketch), U and V in the dtype of `delta`.

        Raises:
            RuntimeError: if U, V or the keys have been changed since the forward, by a step or the window's end, or
                gradients are to be differentiated again.
        """
        window: Window | None = ctx.window
        if window is None:
            x, weight, U, V, keys = ctx.saved_tensors
            if U is not None:
                U, V = U.to(delta.dtype), V.to(delta.dtype)
            return x, weight, U, V, keys, True
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"backward with create_graph=True through {window.name!r}: its gradient is sketched and cannot be "
                "differentiated again; use attach(model, mode='release')"
            )
        (x,) = ctx.saved_tensors
        weight, U, V, keys, _ = ctx.operands
        if not weight.requires_grad:
            return x, weight, None, None, None, False
        if _version(U, V, keys) != ctx.version:
            raise RuntimeError(
                f"backward through {window.name!r}: what sketches its gradient has been modified by an inplace "
                "operation, a step of the optimizer, or given up by detach() or load_state_dict(), since the forward; "
                "run the forward again"
            )
        if U is not None and U.dtype is not delta.dtype:
            U, V = window.cast(delta.dtype)
        return x, weight, U, V, keys, True


def _test_matrix(ctx: Any, keys: Tensor | None, side: int, rows: int, delta: Tensor) -> Tensor:
    """Return what stands for V (side 0) or U (side 1) in the first window; it is made here and not kept."""
    assert keys is not None
    return gaussian(rows, ctx.widths[side], keys[side], delta.device, delta.dtype)


class _LinearSketch(_Node):
    """y = x W' + b (..., m); gradients (m, .) and (n, .) of the probes are the sketches."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, right: Tensor, left: Tensor, operands: Operands) -> Tensor:
        weight = operands[0]
        # Autocast is as the layer finds it; its cache holds the weight's copy.
        y = F.linear(x, weight, bias)
        ctx.input, ctx.bias = x.dtype, None if bias is None else bias.dtype
        # Under autocast this is the copy that torch's own layer would save.
        _Node.keep(ctx, _cast(x, y.dtype), right, left, operands)
        return _owned(y)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, U, V, keys, sketch = _Node.kept(ctx, delta)
        window: Window | None = ctx.window
        # Of one row of x, or none, matrices all the same.
        flat = x.dim() == 2
        d = delta if flat else delta.reshape(-1, delta.shape[-1])
        dx = db = GV = GtU = None
        if ctx.needs_input_grad[0]:
            if window is not None and weight._version != ctx.weight_version:
                raise RuntimeError(
                    f"{window.name!r}, needed for the gradient of its layer's input, has been modified by an "
                    "inplace operation since the forward"
                )
            # Under autocast the weight is cast once more instead of being held until now.
            dx = _cast(torch.mm(d, _cast(weight, d.dtype)), ctx.input)
            dx = dx if flat else dx.view(*x.shape)
        if ctx.needs_input_grad[1]:
            db = _cast(d.sum(0), ctx.bias)
        if sketch:
            x = x if flat else x.reshape(-1, x.shape[-1])
            V = _test_matrix(ctx, keys, 0, x.shape[1], d) if V is None else V
            GV = _product(d.mT, torch.mm(x, V), ctx.dtype, window)
            # Before U is made: of the first window's matrices there is one at a time.
            del V
            U = _test_matrix(ctx, keys, 1, d.shape[1], d) if U is None else U
            GtU = _product(x.mT, torch.mm(d, U), ctx.dtype, window)
        return dx, db, GV, GtU, None


# `apply` without torch's search for functorch's transforms, which costs a quarter of it: `_live` lets none in.
_linear_sketch = super(torch.autograd.Function, _LinearSketch).apply


class _EmbeddingSketch(_Node):
    """y = W[ids] (..., n) by the given options of `F.embedding`; as `_LinearSketch`."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, right: Tensor, left: Tensor, operands: Operands, options: tuple[Any, ...]
    ) -> Tensor:
        y = F.embedding(ids, operands[0], *options)
        # Rows of `padding` (-1: none) have no gradient.
        ctx.rows, ctx.padding = right.shape[0], -1 if options[0] is None else options[0]
        _Node.keep(ctx, ids, right, left, operands)
        return _owned(y)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        ids, _, U, V, keys, sketch = _Node.kept(ctx, delta)
        if not sketch:
            return (None,) * 5
        ids, d = ids.reshape(-1), delta.reshape(-1, delta.shape[-1])
        V = _test_matrix(ctx, keys, 0, d.shape[1], d) if V is None else V
        dV = _product(d, V, ctx.dtype, ctx.window)
        # torch's own sum over equal indices, as deterministic as a dense embedding's.
        GV = torch.ops.aten.embedding_dense_backward.default(dV, ids, ctx.rows, ctx.padding, False)
        U = _test_matrix(ctx, keys, 1, ctx.rows, d) if U is None else U
        GtU = _product(d.mT, torch.where((ids == ctx.padding)[:, None], 0.0, U[ids]), ctx.dtype, ctx.window)
        return None, GV, GtU, None, None


class _Sketched(Attached):
    """What both layers share."""

    weight: Tensor
    _parameters: dict[str, Tensor | None]
    _mofasgd_window: Window | None = None


def _live(module: Any, input: Tensor) -> Window | None:
    """Return what sketches this call, or None if it is to run as it always did; then the net sees a dense gradient.

    That is: without gradients, with a frozen weight or another one put in its place (functional_call), while a small
    matrix sums its dense gradient in its first window, under torch.jit.trace, which refuses probes as constants, and
    for what our nodes do not know: transforms of `torch.func`, forward-mode derivatives, nested and sparse inputs. A
    held `forward` finds none after detach.
    """
    window: Window | None = vars(module).get("_mofasgd_window")
    if window is None or window.probes is None or not torch.is_grad_enabled():
        return None
    weight = module._parameters.get("weight")
    if (weight is not window.param and not window.gathered(weight)) or not weight.requires_grad:
        return None
    if input.is_nested or input.layout is not torch.strided:
        return None
    if not torch.compiler.is_compiling() and (
        _are_functorch_transforms_active() or forward_ad._current_level >= 0 or _get_tracing_state()
    ):
        return None
    return window


class SketchedLinear(_Sketched):
    """Mixed into the class of an `nn.Linear` while it is attached."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """Return `nn.Linear`'s output."""
        window = _live(self, input)
        if window is None:
            return F.linear(input, self.weight, self.bias)
        own = self._parameters
        # Attributes of a module are slow; a computed bias is one all the same.
        bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401
        apply: Any = _LinearSketch.apply if torch.compiler.is_compiling() else _linear_sketch
        y: Tensor = apply(input, bias, *window.operands())
        return y


class SketchedEmbedding(_Sketched):
    """Mixed into the class of an `nn.Embedding` while it is attached."""

    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool

    def forward(self, input: Tensor) -> Tensor:
        """Return `nn.Embedding`'s output."""
        options = (self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
        window = _live(self, input)
        if window is None:
            return F.embedding(input, self.weight, *options)
        y: Tensor = _EmbeddingSketch.apply(input, *window.operands(), options)  # type: ignore[no-untyped-call]
        return y


_MIXINS: dict[type[nn.Module], type[_Sketched]] = {nn.Linear: SketchedLinear, nn.Embedding: SketchedEmbedding}


def mixin_for(module: nn.Module) -> type[_Sketched] | None:
    """Return what sketches `module`'s weight, or None if it is neither layer."""
    return next((mixin for kind, mixin in _MIXINS.items() if isinstance(module, kind)), None)


def why_not(module: nn.Module, param: Tensor) -> str | None:
    """Return why `module`, a linear or embedding layer, cannot sketch its weight `param`, or None."""
    kind = next(kind for kind in _MIXINS if isinstance(module, kind))
    if module._parameters.get("weight") is not param:
        return "the layer computes its weight from it"
    # FSDP2 puts a class on top of the mixed one.
    if own_class(module).forward not in (kind.forward, _MIXINS[kind].forward) or "forward" in vars(module):  # type: ignore[attr-defined]
        return f"{type(module).__name__} has a forward of its own"
    if getattr(module, "scale_grad_by_freq", False):
        return "scale_grad_by_freq"
    return None
