"""Give one module another forward, or other methods, through its class; take them away again without a trace.

Of the ways to change one instance this is the one that copies and pickles undo by themselves: an attribute holding a
bound method would make a deep copy of the model call the original, or copy the optimizer too.
"""

from __future__ import annotations

import copyreg
import functools
from typing import Any

from torch import nn

_PREFIX = "_mofasgd_"
"""Of the instance attributes that belong to a mixin."""


class Attached:
    """Base of the mixins. A copy or pickle of the module is of its own class and without the mixin's attributes."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Skip what a base class of the user's does with subclasses, such as registering them."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return what rebuilds the module as if it had never been attached."""
        recipe: Any = super().__reduce_ex__(protocol)
        function, args, state, *rest = recipe
        own = own_class(self)
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            # What it makes must be of the object's class, pickle insists.
            function = object.__new__
        if isinstance(state, dict):
            state = {key: value for key, value in state.items() if not key.startswith(_PREFIX)}
        return (function, tuple(own if arg is type(self) else arg for arg in args), state, *rest)


_OWN = "_mofasgd_own"
"""Of a class with a mixin: the class without it."""


def own_class(module: object) -> type:
    """Return the class of `module` without mixins."""
    cls = type(module)
    while _OWN in vars(cls):
        cls = vars(cls)[_OWN]
    return cls


@functools.cache
def _mixed(cls: Any, mixin: Any) -> type[nn.Module]:
    # Name and module stay: transformers writes the one into config.json and keys tables by both.
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, _OWN: cls}
    mixed: type[nn.Module] = type(cls)(cls.__name__, (mixin, cls), names)
    return mixed


def is_swapped(module: nn.Module) -> bool:
    """Whether a mixin is in effect."""
    return any(key.startswith(_PREFIX) for key in vars(module))


def swap_in(module: nn.Module, mixin: type[Attached], **attributes: Any) -> None:
    """Mix `mixin` into the class of `module` and set its attributes, whose names begin with "_mofasgd_"."""
    vars(module).update(attributes)
    if isinstance(module, mixin):
        # A copy made by `type(module)(...)`, or a class that was put on top of the mixed one and outlived it.
        return
    mixed: Any = _mixed
    object.__setattr__(module, "__class__", mixed(type(module), mixin))


def swap_out(module: nn.Module) -> None:
    """Undo every `swap_in`; a class that somebody has put on top since is left, its mixins without effect."""
    for key in [key for key in vars(module) if key.startswith(_PREFIX)]:
        del vars(module)[key]
    object.__setattr__(module, "__class__", own_class(module))
