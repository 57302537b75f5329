"""What a run shows: a progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Display:
    """Shows metrics as they come.

    Args:
        quiet: show nothing (for runs beside others).
        label: put before every line.
    """

    def __init__(self, *, quiet: bool = False, label: str = "") -> None:
        self.console = Console(quiet=quiet, soft_wrap=True, highlight=False)
        self.label = f"{label}: " if label else ""
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._steps = 0

    @contextmanager
    def running(self, steps: int, done: int) -> Iterator[None]:
        """Show the progress of `steps` steps, `done` of which have been taken."""
        self._steps = steps
        if not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            self._progress = progress
            self._task = progress.add_task(self.label or "training", total=steps, completed=done, numbers="")
            try:
                yield
            finally:
                self._progress = None

    def metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Show the metrics of a log line or of an evaluation."""
        if "validation_loss" in metrics:
            self.note(f"step {step:>{len(str(self._steps))}}  validation loss {metrics['validation_loss']:.4f}")
            return
        numbers = (
            f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s  "
            f"peak {metrics['peak_mb']:,.0f} MB"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=numbers)
        else:
            self.note(f"step {step:>{len(str(self._steps))}}  {numbers}")

    def note(self, text: str) -> None:
        """Show one line."""
        self.console.print(self.label + text, markup=False)
