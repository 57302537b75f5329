"""A recording of a GPU's allocations, as torch keeps it (its viewer is at pytorch.org/memory_viz)."""

from __future__ import annotations

from pathlib import Path

import torch

MAX_ENTRIES = 1_000_000
"""Allocations that are kept; older ones are dropped."""


def check_recordable(key: str, device: torch.device | None = None) -> None:
    """Raise ValueError, naming the setting `key`, unless the allocations of `device` (None: any GPU) are recorded."""
    there = "cuda" if torch.cuda.is_available() else "cpu"
    found = device.type if device is not None else there
    if found != "cuda":
        raise ValueError(f"{key} records allocations of a CUDA device, and this run is on {found}: drop it")


def start_recording(max_entries: int = MAX_ENTRIES) -> None:
    """Record every allocation from now on."""
    torch.cuda.memory._record_memory_history(max_entries=max_entries)


def save_recording(path: Path) -> None:
    """Write what was recorded to `path` and stop recording."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
    torch.cuda.memory._record_memory_history(enabled=None)
