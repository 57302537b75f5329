"""All that is used of LLaMA-Factory, and the one name in it that is replaced: create_custom_optimizer of a stage."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llamafactory import hparams
from llamafactory.extras.env import VERSION
from llamafactory.extras.misc import is_env_enabled, use_ray
from llamafactory.train.tuner import run_exp

TESTED = "0.9.5"

STAGES = ("pt", "sft", "rm", "dpo", "kto")
"""Whose trainers call create_custom_optimizer."""

__all__ = ["STAGES", "TESTED", "VERSION", "hparams", "is_env_enabled", "known_keys", "replaced", "run_exp", "use_ray"]


def known_keys() -> set[str]:
    """Return the keys of LLaMA-Factory's training configurations."""
    names = ("ModelArguments", "DataArguments", "TrainingArguments", "FinetuningArguments", "GeneratingArguments")
    return {field.name for name in names for field in dataclasses.fields(getattr(hparams, name)) if field.init}


@contextmanager
def replaced(stage: str, make: Callable[[Any, Any], Any]) -> Iterator[None]:
    """Have the trainer of `stage` take its optimizer from make(model, training arguments).

    Raises:
        RuntimeError: if this LLaMA-Factory's trainers get their optimizer in another way.
    """
    module = importlib.import_module(f"llamafactory.train.{stage}.trainer")
    original = getattr(module, "create_custom_optimizer", None)
    expected = ["model", "training_args", "finetuning_args"]
    if original is None or list(inspect.signature(original).parameters) != expected:
        raise RuntimeError(
            f"llamafactory {VERSION} has no create_custom_optimizer({', '.join(expected)}) in {module.__name__}: "
            f"pip install llamafactory=={TESTED}"
        )

    def create(model: Any, training_args: Any, finetuning_args: Any) -> Any:
        return make(model, training_args)

    vars(module)["create_custom_optimizer"] = create
    try:
        yield
    finally:
        vars(module)["create_custom_optimizer"] = original
