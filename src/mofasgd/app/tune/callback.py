"""What is done around the steps of a Trainer: log, evaluation, interruption."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from mofasgd.app.display import Display
from mofasgd.app.errors import Diverged
from mofasgd.app.record import JsonLines
from mofasgd.app.usage import Clock, peak_megabytes


class Progress(TrainerCallback):
    """Writes metrics, evaluates, and stops with a checkpoint when a signal has come.

    Args:
        metrics: the run's metrics.jsonl.
        display: shows the same.
        clock: of the time spent training.
        evaluate: returns the metrics of an evaluation.
        eval_every: steps between two evaluations; 0: none. The last step is not evaluated here.
        caught: signals, see `signals.catch_signals`.

    Attributes:
        peak_mb: peak memory of training, evaluations before it left out; None until its end.
    """

    def __init__(
        self,
        metrics: JsonLines,
        display: Display,
        clock: Clock,
        evaluate: Callable[[], dict[str, float]],
        eval_every: int,
        caught: list[str],
    ) -> None:
        self.metrics, self.display, self.clock = metrics, display, clock
        self.evaluate, self.eval_every, self.caught = evaluate, eval_every, caught
        self.peak_mb: float | None = None
        self._logged = 0
        # (tokens, seconds trained) at the log lines of this session.
        self._marks: list[tuple[int, float]] = []

    @property
    def tokens_per_second(self) -> float | None:
        """Mean over the log intervals of this session but the first, which warms up; None before two lines."""
        return self._rate(self._marks[1]) if len(self._marks) > 2 else None

    def _rate(self, since: tuple[int, float]) -> float:
        tokens, seconds = self._marks[-1]
        return round((tokens - since[0]) / max(seconds - since[1], 1e-9), 1)

    def _lap(self, step: int) -> None:
        if step > self._logged:
            self.clock.lap(step - self._logged)
            self._logged = step

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        self.metrics.write(step, {key: value for key, value in metrics.items() if math.isfinite(value)})
        self.display.metrics(step, metrics)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._logged = state.global_step
        self._marks = [(0, self.clock.seconds)]
        self.clock.skip()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate where it is time to; ask for a checkpoint and the end when a signal has come."""
        step, last = state.global_step, state.global_step == state.max_steps
        if self.caught and not last:
            control.should_log = control.should_save = control.should_training_stop = True
        if self.eval_every and step % self.eval_every == 0 and not last:
            if args.device.type == "cuda":  # its unfinished work is training's
                torch.cuda.synchronize(args.device)
            self._lap(step)
            self._write(step, self.evaluate())
            self.clock.skip()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write the metrics of a log line; raise Diverged if the loss is not finite."""
        if logs is None or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise Diverged(
                f"training diverged: the loss is {loss} at step {state.global_step}. Lower lr="
                f"{logs['learning_rate']:g} or raise warmup"
            )
        self._lap(state.global_step)
        since = self._marks[-1]
        self._marks.append((int(logs.get("num_tokens", 0)), self.clock.seconds))
        found = {
            "loss": loss,
            "lr": float(logs["learning_rate"]),
            "grad_norm": float(logs.get("grad_norm", 0.0)),
            "seconds": round(self.clock.seconds, 3),
            "tokens_per_second": self._rate(since),
            "peak_mb": round(peak_megabytes(args.device), 1),
        }
        self._write(state.global_step, found)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the time of saving out."""
        self.metrics.sync()
        self.clock.skip()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the peak of training."""
        self.peak_mb = round(peak_megabytes(args.device), 1)
