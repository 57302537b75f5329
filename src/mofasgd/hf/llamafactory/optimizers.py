"""What the keys ask for: the optimizer of a model, and the callbacks of its Trainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from mofasgd.attach import MODES
from mofasgd.authors import AuthorsMFSGD
from mofasgd.hf.callback import First, MoFaSGDCallback
from mofasgd.hf.compat import TrainerCallback
from mofasgd.hf.factory import OptimizerFactory, complete, refuse_optim
from mofasgd.hf.llamafactory.keys import Plan, Recording
from mofasgd.hf.support import free, real_optimizer, refuse_setup
from mofasgd.optimizer import MoFaSGD
from mofasgd.options import check_choice
from mofasgd.snapshot import save_recording, start_recording

_logger = logging.getLogger(__name__)

_HEADS = ("lm_head", "output_projection", "embed_out")
"""What the authors' fork takes for an output head, in a parameter's name."""


def attach_mode(plan: Plan, args: Any) -> str:
    """Return the mode of `MoFaSGD.attach`, or "none"; left out, one process attaches and several do not."""
    if plan.attach is not None:
        return plan.attach
    return "auto" if args.world_size == 1 else "none"


def check(plan: Plan, args: Any) -> None:
    """Raise ValueError for options that no optimizer can be made from; `args` are TrainingArguments."""
    check_choice("mofasgd_attach", attach_mode(plan, args), ("none", *MODES))
    refuse_optim(args)
    try:
        if plan.method == "mofasgd":
            complete(args, plan.options)
        else:
            _authors(_groups([], [], plan.options, args), plan.options, args)
    except ValueError as error:
        raise ValueError(f"{plan.method}_*: {error}") from None


def make(plan: Plan, model: nn.Module, args: Any) -> MoFaSGD:
    """Return the optimizer of `model`, attached where the plan says so; `args` are TrainingArguments."""
    mode = attach_mode(plan, args)
    if plan.method == "mofasgd":
        return OptimizerFactory()(model, args, attach=mode, **plan.options)
    free(model)
    refuse_setup(args, attached=mode != "none")
    matrices, rest = _parameters(model)
    groups = [group for group in _groups(matrices, rest, plan.options, args) if group["params"]]
    opt = _authors(groups, plan.options, args)
    if mode != "none":
        opt.attach(model, mode)
    return opt


def _authors(groups: list[dict[str, Any]], options: dict[str, Any], args: Any) -> AuthorsMFSGD:
    own = {key: value for key, value in options.items() if not key.startswith("learning_rate")}
    return AuthorsMFSGD(groups, args.learning_rate, eta2=0.0, **own)


def _parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the fork's two parts: matrices, and embeddings, head and what has other than two dimensions."""
    ends = [getattr(model, f"get_{which}_embeddings", lambda: None)() for which in ("input", "output")]
    embeddings = {getattr(end, "weight", None) for end in ends}
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            head = param in embeddings or any(word in name for word in _HEADS)
            (rest if head or param.ndim != 2 else matrices).append(param)
    if not matrices:
        raise ValueError("use_mfsgd: the model has no trainable matrix but embeddings and head, see finetuning_type")
    return matrices, rest


def _groups(
    matrices: list[nn.Parameter], rest: list[nn.Parameter], options: dict[str, Any], args: Any
) -> list[dict[str, Any]]:
    rates = {key: options[f"learning_rate_{key}"] for key in ("mfsgd", "adamw")}
    lrs = {key: args.learning_rate if rate is None else rate for key, rate in rates.items()}
    adamw = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon, "weight_decay": args.weight_decay}
    return [
        {"params": matrices, "lr": lrs["mfsgd"]},
        {"params": rest, "lr": lrs["adamw"], "algorithm": "adamw", **adamw},
    ]


class Trained(TrainerCallback):
    """Raises ValueError when training begins with another optimizer than MoFaSGD, and names the one that was made."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the trainer's optimizer."""
        opt = real_optimizer(kwargs["optimizer"])
        mode = "none" if opt.handle is None else opt.handle.mode
        _logger.info("training with %s, attached: %s", type(opt).__name__, mode)


class MemoryCallback(TrainerCallback):
    """Records the GPU's allocations, on the first process of each machine, into memory.pickle in output_dir."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self._on, self._micro, self._steps = recording, False, 0, 0

    def start(self, args: Any) -> None:
        """Start to record."""
        if not self._on and args.local_process_index == 0:
            start_recording(self.recording.max_entries)
            self._on, self._micro, self._steps = True, 0, 0

    def stop(self, args: Any) -> None:
        """Save what was recorded, if that is not done yet."""
        if self._on:
            save_recording(Path(args.output_dir) / "memory.pickle")
            self._on = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start, unless that was done before the model was loaded."""
        self.start(args)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a micro-batch that is not the last of its step."""
        self._micro += 1
        if self._micro == self.recording.stop_accumulation_step:
            self.stop(args)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a recorded step; the first one ends a recording that is counted in its micro-batches."""
        self._steps += 1
        if self.recording.stop_accumulation_step or self._steps == self.recording.stop_step:
            self.stop(args)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save what was recorded to the end."""
        self.stop(args)


def callbacks(plan: Plan) -> tuple[list[TrainerCallback], MemoryCallback | None]:
    """Return the callbacks of a plan's Trainer, and the one of them that records memory.

    The authors' step goes without MoFaSGDCallback: as in their fork, Trainer then clips what is in `p.grad`.
    """
    memory = None if plan.recording is None else MemoryCallback(plan.recording)
    more = [] if memory is None else [memory]
    if plan.method is None:
        return [*more], memory
    if plan.method == "mofasgd":
        return First([MoFaSGDCallback(), Trained(), *more]), memory
    return [Trained(), *more], memory
