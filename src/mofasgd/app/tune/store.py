"""Trained models on the disk: written whole or not at all, and read back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from mofasgd.app.files import sync
from mofasgd.app.tune.models import load_model
from mofasgd.app.usage import out_of_memory


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Raise OSError naming `path` for whatever the libraries raise when the file system refuses."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        raise OSError(f"{path} could not be written ({' '.join(str(error).split())[:200]})") from error


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """Yield a folder that takes the place of the folder `path` once it is complete and on the disk."""
    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with reported(path):
            yield part
            for file in part.iterdir():
                sync(file)
            if path.exists():
                shutil.rmtree(path)
            part.replace(path)
            sync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def adapted(model: Any) -> bool:
    """Whether `model` is one with PEFT's adapters."""
    return hasattr(model, "merge_and_unload")


def keep(model: Any, folder: Path) -> None:
    """Write what has been trained, of an adapted model the adapter, into `folder`; OSError if it is not taken."""
    with _replaced(folder) as part:
        model.save_pretrained(part)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model, adapters merged into it, and its tokenizer into `folder`; OSError if it is not taken."""
    if adapted(model):
        model = model.merge_and_unload()
    with _replaced(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)


def restore(model: Any, folder: Path, precision: str) -> None:
    """Give `model` the weights, or the adapter, that `folder` holds.

    Raises:
        ValueError: if it cannot be loaded.
    """
    if adapted(model):
        try:
            model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
        except Exception as error:  # of files that are missing or damaged
            raise ValueError(f"{folder}: the adapter could not be loaded ({' '.join(str(error).split())})") from error
    else:
        model.load_state_dict(load_model(str(folder), AutoModelForCausalLM, precision).state_dict())
