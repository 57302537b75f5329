"""Checkpoints that are whole or not there: written beside, flushed, then renamed; verified when read."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

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
    for part in folder.glob("*.part"):
        part.unlink()  # of a run that was killed while writing
    path = folder / f"step-{step:08d}.pt"
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as out:
            try:
                torch.save({"format": FORMAT, "step": step, **content}, out)
            except RuntimeError as error:  # how torch's writer reports that the file system refused
                raise OSError(f"{error.__context__ or error}") from error
            out.flush()
            os.fsync(out.fileno())
        part.replace(path)
        _sync(folder)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    for _, old in checkpoints(folder)[keep:]:
        old.unlink()
    return path


def _sync(folder: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
            raise ValueError(f"checksum of {damaged}")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT or content["step"] != step:
            raise ValueError(f"format {content['format']}, step {content['step']}")
    except Exception as error:  # zipfile, pickle and torch each have their own
        older = f"delete it to resume from step {found[1][0]}" if len(found) > 1 else "there is no older one"
        raise ValueError(f"checkpoint {path} cannot be read ({error}): {older}") from error
    return content
