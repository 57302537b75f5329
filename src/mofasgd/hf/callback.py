"""What happens around a Trainer's steps: clipping and its norm, attaching and detaching."""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakKeyDictionary

from mofasgd.hf.compat import TrainerCallback
from mofasgd.hf.support import real_optimizer, refuse_setup
from mofasgd.optimizer import MoFaSGD

_logger = logging.getLogger(__name__)

# How optimizers that a callback has detached were attached: several train() of one trainer share an optimizer. Here
# and not in the callback, which hyperparameter searches pickle.
_detached: WeakKeyDictionary[MoFaSGD, tuple[str, bool]] = WeakKeyDictionary()


class MoFaSGDCallback(TrainerCallback):
    """Lets MoFaSGD clip, logs its gradient norm, and detaches the model when training ends.

    Trainer clips and measures `p.grad`, which attached training does not have, before the step. Hence
    `args.max_grad_norm` is 0 while a window's gradients are gathered, and at the step it is the optimizer's; at any
    other time `args` are the user's. `grad_norm` of a log line is `MoFaSGD.grad_norm()` of its step.

    Raises:
        ValueError: when training begins, if the trainer's optimizer is not MoFaSGD or its setup is not supported.
    """

    def __init__(self) -> None:
        self._lent: tuple[Any, float] | None = None
        self._told = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the setup; attach again what an earlier `train()` has detached."""
        self._give_back()
        opt = real_optimizer(kwargs["optimizer"])
        if opt.handle is None and opt in _detached:
            mode, stepping = _detached.pop(opt)
            opt.attach(kwargs["model"], mode, step_in_backward=stepping)
        attached = opt.handle is not None
        refuse_setup(attached=attached)
        if attached and args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process (nn.DataParallel) would share one set of sketches: make one GPU "
                "visible (CUDA_VISIBLE_DEVICES=0), or use torchrun with attach='none'"
            )
        # An interrupted train() may have left half a window.
        opt.zero_grad()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep Trainer from clipping `p.grad`."""
        if not self._told and args.max_grad_norm:
            _logger.info(
                "max_grad_norm=%g is applied by MoFaSGD.step; args.max_grad_norm reads 0 while gradients are gathered",
                args.max_grad_norm,
            )
            self._told = True
        self._give_back()
        self._lent = (args, args.max_grad_norm)
        args.max_grad_norm = 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the optimizer clip."""
        self._give_back()
        # Trainer takes 0, and less, for no clipping.
        limit = args.max_grad_norm
        real_optimizer(kwargs["optimizer"]).max_grad_norm = limit if limit and limit > 0 else None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Replace Trainer's norm of `p.grad`, in the line and in `state.log_history`. Waits for the device."""
        if logs is None or "grad_norm" not in logs:
            return
        logs["grad_norm"] = real_optimizer(kwargs["optimizer"]).grad_norm().item()
        if state.log_history and "grad_norm" in state.log_history[-1]:
            state.log_history[-1]["grad_norm"] = logs["grad_norm"]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach the model."""
        self._give_back()
        opt = real_optimizer(kwargs["optimizer"])
        if opt.handle is not None:
            _detached[opt] = opt.handle.mode, opt.handle.stepping
            opt.handle.detach()

    def _give_back(self) -> None:
        """Let `args` be the user's again."""
        if self._lent is not None:
            args, value = self._lent
            args.max_grad_norm, self._lent = value, None


class First(list[TrainerCallback]):
    """Callbacks that a Trainer calls before its own, although it adds them behind: `its_own + these`.

    Its own include the reporters (wandb, tensorboard): they would be shown Trainer's norm.
    """

    def __add__(self, others: list[TrainerCallback]) -> First:
        """Return these, then `others`."""
        return First([*self, *others])

    def __radd__(self, others: list[TrainerCallback]) -> First:
        """Return the callbacks of this package, then `others`, then the rest of these."""
        ours = [callback for callback in self if isinstance(callback, MoFaSGDCallback)]
        return First([*ours, *others, *(callback for callback in self if callback not in ours)])
