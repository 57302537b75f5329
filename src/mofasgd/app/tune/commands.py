"""The commands as the command line sees them: `--help` should not wait for transformers, nor need it."""

from __future__ import annotations

import importlib
from typing import Any

from mofasgd.app.tune.config import FinetuneConfig, GlueConfig, PlanConfig, ProfileConfig


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"mofasgd.app.tune.{name}")
    except ImportError as error:
        if (error.name or "").startswith("mofasgd"):
            raise
        raise ValueError(f"{error}: install what fine-tuning needs with pip install 'mofasgd[tune]'") from error


def finetune(config: FinetuneConfig) -> None:
    """Fine-tune a causal language model on rows of text with MoFaSGD or a baseline."""
    _module("finetune").finetune(config)


def glue(config: GlueConfig) -> None:
    """Fine-tune an encoder on GLUE tasks; report a table over methods and seeds."""
    _module("glue").glue(config)


def profile(config: ProfileConfig) -> None:
    """Record where the memory of fine-tuning a causal language model goes, on random tokens."""
    _module("profile").profile(config)


def plan(config: PlanConfig) -> None:
    """Show what training would take of a GPU's memory, by method, without loading the model."""
    _module("plan").plan(config)


def help_epilog() -> str:
    """Return the table of methods for the end of the help."""
    text: str = _module("methods").table()
    return text
