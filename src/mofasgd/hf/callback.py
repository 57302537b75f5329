"""What happens around a Trainer's steps: clipping and its norm, attaching and detaching."""

from __future__ import annotations

import logging
import math
from typing import Any
from weakref import WeakKeyDictionary

from mofasgd.hf.compat import TrainerCallback
from mofasgd.hf.support import free, real_optimizer, refuse_setup
from mofasgd.optimizer import MoFaSGD

_logger = logging.getLogger(__name__)

USED = ("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "seed")
"""What MoFaSGD is made from, of TrainingArguments."""

# How optimizers were attached in their last train(): several of one trainer share an optimizer. Here and not in the
# callback, which hyperparameter searches pickle.
_attached: WeakKeyDictionary[MoFaSGD, tuple[str, bool]] = WeakKeyDictionary()


class Lent(float):
    """0.0, which keeps Trainer from clipping, in place of the user's max_grad_norm: its `value`.

    The number itself remembers: an exception may end a window, and copies of `args` are made.
    """

    value: Any

    def __new__(cls, value: Any) -> Lent:
        """Return 0.0 that stands for `value`."""
        zero = super().__new__(cls, 0.0)
        zero.value = value
        return zero


class Imposed(float):
    """A norm that the callback has the optimizer clip to, for one step; the optimizer's own limit is a plain number."""


class MoFaSGDCallback(TrainerCallback):
    """Lets MoFaSGD clip, logs its gradient norm, and detaches the model when training ends (not in a DDP).

    Trainer clips and measures `p.grad`, which attached training does not have, before the step. Hence
    `args.max_grad_norm` is 0 while a window's gradients are gathered, and at the step it is the optimizer's; at any
    other time `args` are the user's. `grad_norm` of a log line is `MoFaSGD.grad_norm()` of its step, and
    `nonfinite_steps`, if there were any, `MoFaSGD.nonfinite_steps`.

    Args:
        args: the TrainingArguments that the optimizer is made from; None: it comes from elsewhere.

    Raises:
        ValueError: when training begins, if the trainer's optimizer is not MoFaSGD, is made from other arguments than
            the trainer's, clips to another norm, or its setup is not supported; at a step, if `args.max_grad_norm`
            was changed while its gradients were gathered.
    """

    def __init__(self, args: Any = None) -> None:
        self._args, self._told = args, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the setup; attach again an optimizer that was attached in an earlier `train()`."""
        _give_back(args)
        opt = real_optimizer(kwargs["optimizer"])
        if isinstance(opt.max_grad_norm, Imposed):
            # Left by an interrupted train(), whose limit need not be this one's.
            opt.max_grad_norm = None
        if opt.handle is not None:
            _attached[opt] = opt.handle.mode, opt.handle.stepping
        else:
            free(kwargs["model"])
            if opt in _attached:
                mode, stepping = _attached[opt]
                opt.attach(kwargs["model"], mode, step_in_backward=stepping)
        try:
            refuse_setup(args, attached=opt.handle is not None)
            _refuse_others(args, self._args or args, opt)
        except ValueError:
            _detach(opt)
            raise
        # An interrupted train() may have left half a window.
        opt.zero_grad()
        opt.abandon_window()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep Trainer from clipping `p.grad`."""
        _give_back(args)
        if not self._told and args.max_grad_norm:
            _logger.info(
                "max_grad_norm=%g is applied by MoFaSGD.step; args.max_grad_norm reads 0 while gradients are gathered",
                args.max_grad_norm,
            )
            self._told = True
        args.max_grad_norm = Lent(args.max_grad_norm)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the optimizer clip."""
        if not isinstance(args.max_grad_norm, Lent):
            raise ValueError(
                f"args.max_grad_norm={args.max_grad_norm!r} was set while gradients were gathered, so that Trainer "
                "clips a part of them: set it in on_step_end or on_optimizer_step, for the next step"
            )
        real_optimizer(kwargs["optimizer"]).max_grad_norm = _limit(args.max_grad_norm.value)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let `args` be the user's again."""
        _give_back(args)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let `args` be the user's again, whose callback may have ended the epoch within a window."""
        _give_back(args)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Replace Trainer's norm of `p.grad`, in the line and in `state.log_history`. Waits for the device."""
        if logs is None or "grad_norm" not in logs:
            return
        opt = real_optimizer(kwargs["optimizer"])
        found = {"grad_norm": opt.grad_norm().item()}
        if count := opt.nonfinite_steps:
            found["nonfinite_steps"] = count
        logs.update(found)
        if state.log_history and "grad_norm" in state.log_history[-1]:
            state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach the model, unless it is in a DDP; the optimizer clips to nothing until the next `train()`."""
        _give_back(args)
        opt = real_optimizer(kwargs["optimizer"])
        opt.max_grad_norm = None
        _detach(opt)


def _detach(opt: MoFaSGD) -> None:
    """Detach the model, unless it is in a DDP: the trainer's, which lacks the parameters in another `train()` too."""
    handle = opt.handle
    if handle is not None and (handle.replicas is None or not handle.replicas.wrapped):
        handle.detach()


def _give_back(args: Any) -> None:
    """Let `args.max_grad_norm` be the user's again."""
    if isinstance(args.max_grad_norm, Lent):
        args.max_grad_norm = args.max_grad_norm.value


def _limit(value: float | None) -> Imposed | None:
    """Return what MoFaSGD takes for Trainer's `max_grad_norm`, which does not clip at 0, at less, or at infinity."""
    return Imposed(value) if value and 0 < value < math.inf else None


def _refuse_others(args: Any, given: Any, opt: MoFaSGD) -> None:
    """Raise ValueError if `args`, the trainer's, are not what the optimizer was made from (`given`) and clips to."""
    for key in USED:
        value, used = getattr(args, key), getattr(given, key)
        if value != used:
            raise ValueError(
                f"{key}={value!r} of the trainer's arguments, but trainer_kwargs was given others with {used!r}: give "
                "both the same TrainingArguments"
            )
    if opt.max_grad_norm not in (None, _limit(args.max_grad_norm)):
        raise ValueError(
            f"the optimizer's max_grad_norm={opt.max_grad_norm} is not args.max_grad_norm={args.max_grad_norm}, which "
            "MoFaSGDCallback would put in its place: give it to TrainingArguments only"
        )


class First(list[TrainerCallback]):
    """Callbacks of which a Trainer calls the first before its own, although it adds them behind: `its_own + these`.

    Its own include the reporters (wandb, tensorboard): they would be shown Trainer's norm.
    """

    def __radd__(self, others: list[TrainerCallback]) -> list[TrainerCallback]:
        """Return the first, `others`, the rest."""
        return [*self[:1], *others, *self[1:]]
