"""Checkpoints: written whole, verified when read."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from mofasgd.app.files import remove_parts, replaced

FORMAT = 1

_NAME = re.compile(r"step-(\d+)\.pt$")


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, file) of all checkpoints in `folder`, the newest first."""
    found = [(int(match[1]), path) for path in folder.glob("step-*.pt") if (match := _NAME.search(path.name))]
    return sorted(found, reverse=True)


def save(folder: Path, step: int, content: dict[str, Any], keep: int) -> Path:
    """Write `content` as the checkpoint of `step`; older ones beyond the `keep` newest are removed.

    Raises:
        OSError: if it could not be written; earlier checkpoints are then all still there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_parts(folder)
    path = folder / f"step-{step:08d}.pt"
    with replaced(path) as out:
        try:
            torch.save({"format": FORMAT, "step": step, **content}, out)
        except RuntimeError as error:  # how torch's writer reports that the file system refused
            raise OSError(f"{error.__context__ or error}") from error
    for _, old in checkpoints(folder)[keep:]:
        old.unlink()
    return path


def load(folder: Path) -> dict[str, Any] | None:
    """Return the newest checkpoint of `folder`, on the CPU, or None if there is none.

    Raises:
        ValueError: if it is damaged, naming it and the one before it; nothing is removed.
    """
    found = checkpoints(folder)
    if not found:
        return None
    step, path = found[0]
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT or content["step"] != step:
            raise ValueError(f"format {content['format']}, step {content['step']}")
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
        older = f"step {found[1][0]}" if len(found) > 1 else "the start"
        raise ValueError(f"checkpoint {path} is damaged ({error}): delete it to resume from {older}") from error
    return content
