"""Checks of the model and of accelerate's configuration that factory and callback share."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from mofasgd.attach import detach
from mofasgd.hf.compat import AcceleratorState, is_initialized
from mofasgd.optimizer import MoFaSGD

_logger = logging.getLogger(__name__)


def refuse_setup(args: Any, *, attached: bool) -> None:
    """Raise ValueError if the devices or accelerate's state, where there is one, would train wrongly.

    Args:
        args: TrainingArguments, or None.
        attached: whether gradients are sketched in backward.
    """
    if attached and args is not None and args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (nn.DataParallel) would share one set of sketches: make one GPU "
            "visible (CUDA_VISIBLE_DEVICES=0), or use torchrun, a process for each"
        )
    if not is_initialized():
        return
    state: Any = AcceleratorState()
    kind = getattr(state.distributed_type, "value", str(state.distributed_type))
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(
            f"distributed_type={kind} shards or replaces what MoFaSGD steps and is not supported yet: use one process, "
            "or replicas (DDP: torchrun without DeepSpeed or FSDP)"
        )
    if attached and state.mixed_precision == "fp16":
        raise ValueError("fp16 needs a GradScaler, which cannot unscale sketches: use bf16=True, or attach='none'")


def free(model: nn.Module) -> None:
    """Detach `model`, with a warning, from what a `train()` that an exception ended has left it attached to."""
    if detach(model):
        _logger.warning("the model was still attached to another optimizer, which no longer trains it")


def real_optimizer(optimizer: Any) -> MoFaSGD:
    """Return the MoFaSGD inside accelerate's wrappers.

    Raises:
        ValueError: if there is none.
    """
    inner = optimizer
    while not isinstance(inner, MoFaSGD) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, MoFaSGD):
        raise ValueError(
            f"MoFaSGDCallback found {type(inner).__name__}, not MoFaSGD: give the trainer optimizer_cls_and_kwargs, "
            "or set it as the trainer's attribute before train()"
        )
    return inner
