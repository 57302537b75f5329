"""Time and memory that a run uses."""

from __future__ import annotations

import sys
import time

import torch


class Clock:
    """Time spent training, without evaluations and checkpoints.

    Attributes:
        seconds: since step 0, over all sessions of the run.
        laps: (seconds, steps) between two log lines of this session.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.laps: list[tuple[float, int]] = []
        self._begin = time.perf_counter()

    def lap(self, steps: int) -> float:
        """End an interval of `steps` steps; return its seconds per step."""
        spent = time.perf_counter() - self._begin
        self.seconds += spent
        self.laps.append((spent, steps))
        self.skip()
        return spent / steps

    def skip(self) -> None:
        """Leave out the time since the last lap."""
        self._begin = time.perf_counter()

    def per_step(self) -> float | None:
        """Return the mean seconds per step; the first interval, which warms up, counts only if it is alone."""
        laps = self.laps[1:] or self.laps
        return sum(seconds for seconds, _ in laps) / sum(steps for _, steps in laps) if laps else None


def out_of_memory(error: RuntimeError) -> bool:
    """Whether memory was what an operation lacked."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def peak_megabytes(device: torch.device) -> float:
    """Return the peak memory in MB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    import resource

    # Kilobytes on Linux, bytes on a Mac.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
