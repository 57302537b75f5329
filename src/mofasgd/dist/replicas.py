"""An attached model under DistributedDataParallel (DDP): its parameters leave DDP's buckets.

DDP would wait for gradients that never come. Its public way to leave parameters out is a private function of torch,
called in `ignore_in_ddp` alone.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Collection
from typing import Any

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel as DDP

ORDER = "attach the whole model first, then wrap it: opt.attach(root), then DistributedDataParallel(root)"

_IGNORED = "_ddp_params_and_buffers_to_ignore"


def ignore_in_ddp(model: nn.Module, names: Collection[str]) -> None:
    """Make a later `DDP(model)` leave out the parameters called `names`, and no others."""
    DDP._set_params_and_buffers_to_ignore_for_model(model, list(names))  # type: ignore[no-untyped-call]


class Replicas:
    """What becomes of DDP around an attached model."""

    def __init__(self, model: nn.Module) -> None:
        """Raise ValueError if `model` is, or is inside, a DDP."""
        if any(model in list(ddp.modules()) for ddp in _wrappers()):
            raise ValueError(f"the model is inside DistributedDataParallel already: {ORDER}")
        self._model = model
        self._users: list[str] | None = getattr(model, _IGNORED, None)
        self._names: set[str] = set()
        self._marked: list[Tensor] = []
        self._ddp: weakref.ref[DDP] | None = None

    @property
    def ddp(self) -> DDP | None:
        """The DDP that has called the model, if it is still there."""
        return None if self._ddp is None else self._ddp()

    @property
    def group(self) -> distributed.ProcessGroup:
        """The replicas: those of the DDP, all processes without one."""
        ddp = self.ddp
        group: distributed.ProcessGroup | None = distributed.group.WORLD if ddp is None else ddp.process_group
        assert group is not None
        return group

    @property
    def apart(self) -> set[str]:
        """Names of what the user has the DDP ignore, so that it differs between ranks; none without one."""
        return set() if self.ddp is None else set(self._users or ())

    def leave(self, params: Collection[Tensor]) -> None:
        """Keep `params` of the model, and no longer those of an earlier call, out of a later DDP's buckets."""
        self.restore()
        own = set(params)
        self._names = {name for name, p in self._model.named_parameters(remove_duplicate=False) if p in own}
        self._marked = [p for p in own if not hasattr(p, "_ddp_ignored")]
        # In one place DDP names a root's own parameter ".weight"; in torch.compile's wrapper all have a prefix.
        written = {f"{prefix}{name}" for name in self._names for prefix in ("", ".", "_orig_mod.")}
        ignore_in_ddp(self._model, written | set(self._users or ()))

    def without(self, attributes: dict[str, Any]) -> dict[str, Any]:
        """Return the model's attributes for a copy of it, which is not attached: a DDP around it has to average all."""
        kept = {key: value for key, value in attributes.items() if key != _IGNORED}
        return kept if self._users is None else {**kept, _IGNORED: self._users}

    def restore(self) -> None:
        """Undo `leave`."""
        if not self._names:
            return
        for param in self._marked:
            if hasattr(param, "_ddp_ignored"):
                del param._ddp_ignored
        if self._users is None:
            delattr(self._model, _IGNORED)
        else:
            ignore_in_ddp(self._model, self._users)
        self._names, self._marked = set(), []

    def called(self) -> DDP | None:
        """Return the DDP in whose forward the model is being called, or None.

        Raises:
            ValueError: if that DDP waits for gradients of what is attached.
        """
        ddp: DDP | None = DDP._get_active_ddp_module()  # type: ignore[no-untyped-call]
        if ddp is None or ddp is self.ddp:
            return ddp
        inner = getattr(ddp.module, "_orig_mod", ddp.module)
        if inner is not self._model or not self._names <= set(ddp.parameters_to_ignore):
            raise ValueError(f"DistributedDataParallel waits for gradients that an attached model does not keep: {ORDER}")
        self._ddp = weakref.ref(ddp)
        return ddp

    @property
    def wrapped(self) -> bool:
        """Whether a DDP around the model, which leaves the parameters out, is there."""
        return any(self._model in (ddp.module, getattr(ddp.module, "_orig_mod", None)) for ddp in _wrappers())

    def refuse_wrapped(self) -> None:
        """Raise ValueError if the model is `wrapped`."""
        if self.wrapped:
            raise ValueError(
                "detach() of a model inside DistributedDataParallel: its buckets lack the attached parameters, whose "
                "gradients nobody would average. Drop the wrapper first (model = ddp.module; del ddp), and wrap anew"
            )


def _wrappers() -> list[DDP]:
    """Return all DDPs of this process, which leave no trace in the modules that they wrap."""

    def found() -> list[DDP]:
        # `isinstance` would wake lazy proxies among all objects.
        return [thing for thing in gc.get_objects() if issubclass(type(thing), DDP)]

    if not found():
        return []
    # What the user has dropped is still there until its cycles are collected.
    gc.collect()
    return found()
