"""Attaching an optimizer to a model: which parameter runs in which mode, and the life of what is put into the model."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mofasgd.attach.plan import Owner, Row, Stacked, hookable, plan
from mofasgd.attach.release import ReleaseHook, StepHook
from mofasgd.attach.sketch import mixin_for
from mofasgd.attach.swap import Attached, is_swapped, swap_in, swap_out
from mofasgd.attach.window import Window
from mofasgd.dist.engines import check_model, holders, keep_sync, many, reshard
from mofasgd.dist.replicas import Replicas
from mofasgd.dist.shards import is_sharded
from mofasgd.gradient import FirstWindow
from mofasgd.options import Group, check_choice
from mofasgd.state import factored_shape

MODES = ("auto", "sketch", "release")


Cast = tuple[list[Window | None], dict[torch.dtype, tuple[Tensor, Tensor]]]
"""The windows of a bucket (None: not attached), and the stacks of its U and V in the dtypes of layers."""


class Root(Attached):
    """Mixed into the class of the attached model."""

    _mofasgd_handle: Handle | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Follow changes of the optimizer's parameters, then call the model."""
        if self._mofasgd_handle is not None and not torch.compiler.is_compiling() and torch.is_grad_enabled():
            self._mofasgd_handle.follow()
        return self._parent().__call__(*args, **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients and the sketches."""
        self._parent().zero_grad(set_to_none)
        if self._mofasgd_handle is not None:
            self._mofasgd_handle.clear()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return what rebuilds the model as if it had never been attached."""
        function, args, state, *rest = super().__reduce_ex__(protocol)
        if self._mofasgd_handle is not None and self._mofasgd_handle.replicas is not None and isinstance(state, dict):
            state = self._mofasgd_handle.replicas.without(state)
        return (function, args, state, *rest)

    def _parent(self) -> Any:
        # A caller (torch.compile) may hold a method of this class longer than the model is of it.
        return super() if isinstance(self, Root) else self


class Handle:
    """An attached model. `detach()` restores it; so does leaving a `with` block, or the end of the optimizer.

    `str()` is a table of the parameters: name, shape, mode and why. Modes are "sketch" and "release" as in
    `MoFaSGD.attach`, "step" for release with step_in_backward, and "p.grad" for what AdamW trains.

    Attributes:
        rows: the table, a `Row` for each trainable parameter.
        mode, stepping: `mode` and `step_in_backward` of `MoFaSGD.attach`.
        replicas: what becomes of DDP around the model; None in a single process.
    """

    def __init__(self, model: nn.Module, owner: Owner, mode: str, step_in_backward: bool) -> None:
        """Attach `model`, or raise and leave it as it was. Arguments as in `MoFaSGD.attach`."""
        check_choice("mode", mode, MODES)
        if torch.is_inference_mode_enabled():
            raise ValueError("attach inside torch.inference_mode(): its tensors cannot be trained with, attach outside")
        # torch.compile's wrapper passes attributes on to the model in it.
        self._model: nn.Module = getattr(model, "_orig_mod", model)
        check_model(self._model)
        self.mode, self.stepping = mode, step_in_backward
        self.replicas = Replicas(self._model) if many() else None
        self._holders: list[Any] = []
        self._owner = weakref.ref(owner)
        self.rows: list[Row] = []
        self._windows: dict[Tensor, Window] = {}
        self._hooks: dict[Tensor, RemovableHandle] = {}
        # Of the weights with hooks of ours: those whose own hooks decide how they are served, and all hooks after ours.
        self._hookable: list[Tensor] = []
        self._nets: list[Mapping[int, Any]] = []
        self._bound: tuple[list[Any], ...] = ()
        self._kept: list[Any] = []
        self._warned: set[str] = set()
        # Of the buckets of the last step: their windows, and their factors in the dtypes of layers.
        self._cast: tuple[Sequence[Stacked], list[Cast]] = ((), [])
        self._refuse_attached()
        self.bind()
        # Hooks must not outlive the optimizer: another one would never see a gradient, and nobody would say so.
        self._finalizer = weakref.finalize(owner, self._restore)
        self._finalizer.atexit = False

    def _refuse_attached(self) -> None:
        hooked = [
            name
            for name, param in self._model.named_parameters()
            if any(isinstance(hook, ReleaseHook) for hook in (param._post_accumulate_grad_hooks or {}).values())
        ]
        mixed = [name for name, module in self._model.named_modules() if is_swapped(module)]
        if hooked or mixed:
            raise ValueError(
                f"{(mixed + hooked)[0] or 'the model'!r} is attached to an optimizer already: call "
                "mofasgd.attach.detach(model) first"
            )

    def bind(self) -> None:
        """Put sketches and hooks on the parameters that the optimizer has now, if they have changed.

        Libraries replace parameters after the optimizer was made (accelerate under FSDP2, `model.to`), freeze and add
        some, or hook their gradients. What the parameters that stay have gathered since the last step stays with them.

        Raises:
            ValueError: if model and optimizer no longer fit, as in `MoFaSGD.attach`; then nothing has changed.
                Any other error leaves the model as if it had never been attached.
        """
        owner = self._owner()
        if owner is None:
            return
        if self.replicas is None and many():
            # A DDP made since would wait for gradients that are not kept.
            raise ValueError("torch.distributed was initialized after attach: call init_process_group() before attach")
        if self._signature(owner) == self._bound:
            return
        reshard(self._model)
        rows = plan(self._model, owner, self.mode, self.stepping)
        self._remove()
        self.rows = rows
        try:
            self._install(owner)
        except BaseException:
            # Half an attachment would eat gradients that nobody steps by.
            self._restore()
            raise
        if self.replicas is not None:
            self.replicas.leave([row.param for row in rows if row.mode != "p.grad"])
            self._holders = holders(self._model, [row.param for row in rows if row.mode == "release"])
        self._kept = [owner._parameters(), list(owner.state.items())]
        self._bound = self._signature(owner)

    def follow(self) -> None:
        """Do what is due before a forward with gradients: bind, and at the first one begin as rank 0 does.

        Raises:
            ValueError: as `bind`; or if the model is called by a DDP that was made before `attach`.
        """
        self.bind()
        owner = self._owner()
        if self.replicas is None or owner is None:
            return
        self.replicas.called()
        keep_sync(self._holders)
        owner._meet()

    def _signature(self, owner: Owner) -> tuple[list[Any], ...]:
        """Return what is compared before every forward; `_kept` keeps the numbers those of the same objects."""
        owned, state = owner._parameters(), owner.state
        params = [p for _, p, _ in owned]
        return (
            [id(owned)],
            [p.device for p in params],
            [p.requires_grad for p in params],
            list(map(id, state)),
            list(map(id, state.values())),
            # Whether there are any: of a weight that has none this is None, and of one that had, another.
            [p._backward_hooks or None for p in self._hookable],
            list(map(len, self._nets)),
        )

    def _install(self, owner: Owner) -> None:
        for _, param, _ in owner._parameters():
            own = owner.state.get(param, {})
            if any(value.device != param.device for value in own.values()):
                owner.state[param] = {key: value.to(param.device) for key, value in own.items()}
        pending, before = owner._waiting(), self._windows
        places = {param: (index, group) for index, param, group in owner._parameters()}
        self._windows = {}
        for row in self.rows:
            if row.mode == "p.grad":
                continue
            index, group = places[row.param]
            shape, rank = factored_shape(row.param, group)
            first = FirstWindow(owner.seed, index, shape, rank, owner.state_dtype)
            own, probed = owner.state[row.param], bool(row.layers)
            window = before.get(row.param)
            if window is not None and window.serves(row.param, own, first):
                window.probe(probed)
            else:
                if window is not None:
                    window.end()
                window = Window(row.name, row.param, own, first, pending.get(row.param, []), probed)
            self._windows[row.param] = window
            hook = StepHook(window, self._step, index, group) if self.stepping else ReleaseHook(window)
            if not self.stepping and row.param.grad is not None:
                # A gradient from before: the first half of this window.
                hook(row.param)
            register: Any = row.param.register_post_accumulate_grad_hook
            self._hooks[row.param] = register(hook)
            for layer in row.layers:
                mixin = mixin_for(layer)
                assert mixin is not None
                swap_in(layer, mixin, _mofasgd_window=window)
        # What was frozen since keeps its gradient until the step, as a `p.grad` would; a graph may still bring more.
        self._windows |= {p: w for p, w in before.items() if p in places and p not in self._windows}
        self._hookable = [] if self.mode == "release" else list(filter(hookable, self._hooks))
        self._nets = [param._post_accumulate_grad_hooks or {} for param in self._hooks]
        self._cast = ((), [])
        swap_in(self._model, Root, _mofasgd_handle=self)

    def _step(self, index: int, param: Tensor, group: Group) -> None:
        owner = self._owner()
        assert owner is not None
        owner._step_in_backward(index, param, group)

    def _remove(self) -> None:
        for param, removable in self._hooks.items():
            removable.remove()
            if not param._post_accumulate_grad_hooks:
                param._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        self._hooks = {}
        for row in self.rows:
            for layer in row.layers:
                swap_out(layer)
        swap_out(self._model)

    def detach(self) -> None:
        """Restore the model: hooks, forwards and attributes as before `attach`. A second call does nothing.

        Sketches of an unfinished window are dropped, and gradients come to `p.grad` again.
        """
        if self.replicas is not None and self._finalizer.alive:
            self.replicas.refuse_wrapped()
        self._end()

    def _end(self) -> None:
        if self._finalizer.detach() is None:
            return
        self._restore()
        owner = self._owner()
        if owner is not None:
            owner._detached()

    def _restore(self) -> None:
        self._remove()
        self._end_windows()
        if self.replicas is not None:
            self.replicas.restore()
        self.rows, self._bound, self._kept, self._cast = [], (), [], ((), [])
        self._hookable, self._nets = [], []

    def _end_windows(self) -> None:
        for window in self._windows.values():
            window.end()
        self._windows = {}

    def clear(self) -> None:
        """Forget the sketches of the present window, as `zero_grad` does."""
        for window in self._windows.values():
            window.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the sketches held at present, in place of gradients."""
        return sum(window.nbytes for window in self._windows.values())

    def renew(self) -> None:
        """Bind anew, with empty windows: the optimizer's state or groups have been replaced."""
        self._end_windows()
        self._bound = ()
        self.bind()

    def next_window(self, buckets: Sequence[Stacked]) -> None:
        """Begin the window after a step; it has moved the factors of `buckets`, the same object until they change."""
        owner = self._owner()
        assert owner is not None
        # What was missing was made before the step.
        pending = owner._waiting() if owner._pending is None else owner._pending
        if len(self._windows) > len(self._hooks):
            self._windows = {param: window for param, window in self._windows.items() if param in self._hooks}
            self._cast = ((), [])
        for window in self._windows.values():
            window.open(pending.get(window.param, []) if pending else [])
        casts: list[tuple[Tensor, Tensor]] = []
        for bucket, cast in zip(buckets, self._casts(buckets), strict=True):
            casts += _old_casts(bucket, *cast)
        if casts:
            torch._foreach_copy_([copy for copy, _ in casts], [original for _, original in casts])

    def _casts(self, buckets: Sequence[Stacked]) -> list[Cast]:
        if self._cast[0] is not buckets:
            found = [[self.windows.get(member.param) for member in bucket.members] for bucket in buckets]
            self._cast = buckets, [(windows, {}) for windows in found]
        return self._cast[1]

    def windows_of(self, buckets: Sequence[Stacked]) -> list[Sequence[Window | None]]:
        """Return `windows` of the members of `buckets`, None for those without; listed once for the same buckets."""
        return [windows for windows, _ in self._casts(buckets)]

    def gradient(self, window: Window) -> Window | None:
        """Return a window with what it has gathered, `p.grad` included if somebody has set it; None: nothing."""
        if window.shared:
            return window
        if window.param.grad is not None:
            window.add(window.param.grad)
        if not window.empty:
            return window
        if window.ran and window.name not in self._warned and window.param.requires_grad:
            self._warned.add(window.name)
            warnings.warn(
                f"the layer of {window.name!r} ran with gradients enabled but none came back before step(): it did "
                "not move. Evaluate under torch.no_grad(), or see why the loss does not depend on it; if gradients "
                "are taken by torch.autograd.grad or backward(inputs=...), use attach(model, mode='release')",
                stacklevel=5,
            )
        return None

    def sum(self, param: Tensor) -> Window:
        """Return the window of a parameter, for its sums over ranks."""
        window = self._windows[param]
        self.gradient(window)
        return window

    @property
    def windows(self) -> Mapping[Tensor, Window]:
        """The windows by whose sketches parameters are stepped."""
        return {} if self.stepping else self._windows

    def whole(self) -> list[Tensor]:
        """Return the weights that are to be alike on all ranks: all but what the user has DDP ignore."""
        apart = set() if self.replicas is None else self.replicas.apart
        return [p for name, p in self._model.named_parameters() if name not in apart and not is_sharded(p)]

    def buffers(self) -> list[Tensor]:
        """Return what begins alike and may then differ; nothing where a DDP sees to it."""
        return [] if self.replicas is None or self.replicas.ddp is not None else list(self._model.buffers())

    @property
    def averaged(self) -> list[Tensor]:
        """The whole parameters whose `p.grad` nobody averages over ranks: AdamW's, unless DDP does."""
        if self.replicas is None or self.replicas.ddp is not None:
            return []
        return [row.param for row in self.rows if row.mode == "p.grad" and not is_sharded(row.param)]

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # An error on its way is not replaced by a refusal.
        (self.detach if error is None else self._end)()

    def __repr__(self) -> str:
        if not self.rows:
            return "mofasgd.attach.Handle(detached)"
        table = [("parameter", "shape", "mode", "why")]
        table += [(r.name, " x ".join(map(str, r.param.shape)) or "scalar", r.mode, r.why) for r in self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[3]]) for row in table)  # noqa: B905


def _old_casts(
    bucket: Stacked, windows: list[Window | None], stacks: dict[torch.dtype, tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """Return (copy, original) of what is cast to the dtypes of a bucket's layers; new copies are made here."""
    old: list[tuple[Tensor, Tensor]] = []
    for dtype in {dtype for window in windows if window is not None for dtype in window.casts()}:
        U, V = bucket.stack("U"), bucket.stack("V")
        if dtype in stacks:
            old += zip(stacks[dtype], (U, V), strict=True)
            continue
        # Views of one tensor: hundreds of layers then need a single copy at every step.
        stacks[dtype] = U.to(dtype), V.to(dtype)
        for window, *pair in zip(windows, *(stack.unbind() for stack in stacks[dtype]), strict=True):
            if window is not None:
                window.recast(dtype, *pair)
    return old


def detach(model: nn.Module) -> bool:
    """Detach `model` from the optimizer that it, or a module in it, is attached to; return whether there was one."""
    model = getattr(model, "_orig_mod", model)
    handles = [found for module in model.modules() if (found := vars(module).get("_mofasgd_handle")) is not None]
    for handle in handles:
        handle.detach()
    return bool(handles)
