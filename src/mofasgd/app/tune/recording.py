"""The memory of a Trainer's first steps, into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from mofasgd.app.files import write_json
from mofasgd.app.record import environment
from mofasgd.memory import Recorder, draw, summary
from mofasgd.snapshot import save_recording, start_recording


class MemoryProfile(TrainerCallback):
    """Records the memory of the first steps of a Trainer.

    Args:
        steps: to record.
        folder: for memory.png, memory.json and, on a GPU, memory_snapshot.pickle.
        title: of the picture.

    Attributes:
        found: content of memory.json, once it is written.
    """

    def __init__(self, steps: int, folder: Path, title: str) -> None:
        self.steps, self.folder, self.title = steps, folder, title
        self.found: dict[str, Any] | None = None
        self._recorder: Recorder | None = None
        self._last = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to record."""
        optimizer = kwargs["optimizer"]
        self._last = state.global_step + self.steps
        if args.device.type == "cuda":
            start_recording()
            torch.cuda.reset_peak_memory_stats()
        # accelerate wraps it, and hooks are the inner one's.
        self._recorder = Recorder(kwargs["model"], getattr(optimizer, "optimizer", optimizer))
        self._recorder.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what was recorded once it is enough."""
        if state.global_step >= self._last:
            self._finish(args.device)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what was recorded of a shorter training."""
        self._finish(args.device)

    def _finish(self, device: torch.device) -> None:
        if self._recorder is None:
            return
        recorder, self._recorder = self._recorder, None
        recorder.__exit__(None, None, None)
        timeline = recorder.timeline()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.found = {"steps": len(timeline.steps), **summary(timeline), "environment": environment(device)}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            # More than was seen: what operations need within, and libraries.
            self.found["allocator_peak_mb"] = round(torch.cuda.max_memory_allocated(device) / 1e6, 3)
            self.found["reserved_peak_mb"] = round(torch.cuda.max_memory_reserved(device) / 1e6, 3)
            save_recording(self.folder / "memory_snapshot.pickle")
        draw(timeline, self.title, self.folder / "memory.png")
        write_json(self.folder / "memory.json", self.found)
