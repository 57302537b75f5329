"""`mofasgd pretrain`: the loop around `Trainer`, with log, evaluation, checkpoints and resume."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import statistics
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from torch import Tensor

from mofasgd.app import checkpoint
from mofasgd.app.baselines import table
from mofasgd.app.config import PretrainConfig
from mofasgd.app.display import Display
from mofasgd.app.errors import Diverged, Stopped
from mofasgd.app.record import JsonLines, Sink, TensorBoard, WandB, environment, read_metrics, write_json
from mofasgd.app.trainer import Trainer

# What a resumed run may change: it has no influence on the weights, or the data's checksum covers it.
_FREE = {
    *(
        "out",
        "resume",
        "save_last",
        "device",
        "compile",
        "eval_every",
        "eval_tokens",
        "log_every",
        "tensorboard",
        "wandb",
    ),
    *("checkpoint_every", "keep_checkpoints", "data.cache", "data.train", "data.validation", "data.tokenizer"),
}


def plain(config: Any) -> dict[str, Any]:
    """Return a configuration as YAML and JSON can hold it."""

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [convert(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    converted: dict[str, Any] = convert(dataclasses.asdict(config))
    return converted


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def check_same_run(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError for a setting that differs between a checkpoint's configuration and the present one."""
    before = dict(_flat(then))
    for key, value in _flat(now):
        if key not in _FREE and before.get(key, value) != value:
            raise ValueError(
                f"{key}={value!r} was {before[key]!r} in the run to be resumed: put it back, or start another run "
                "with another --out"
            )


@contextmanager
def _catch_signals() -> Iterator[list[str]]:
    """Yield a list that receives the name of SIGINT or SIGTERM; a second signal acts at once."""
    caught: list[str] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(signal.Signals(number).name)
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Clock:
    """Time spent training, without evaluations and checkpoints.

    Attributes:
        seconds: since step 0, over all sessions of the run.
        laps: seconds per step between two log lines of this session.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.laps: list[float] = []
        self._begin = time.perf_counter()

    def lap(self, steps: int) -> float:
        """End an interval of `steps` steps; return its seconds per step."""
        spent = time.perf_counter() - self._begin
        self.seconds += spent
        self.laps.append(spent / steps)
        self.skip()
        return self.laps[-1]

    def skip(self) -> None:
        """Leave out the time since the last lap."""
        self._begin = time.perf_counter()

    def median(self) -> float:
        """Return the median seconds per step; the first interval, which warms up, counts only if it is alone."""
        return statistics.median(self.laps[1:] or self.laps)


class Session:
    """One start of `mofasgd pretrain` on a run folder."""

    def __init__(self, config: PretrainConfig, display: Display) -> None:
        self.config, self.display, self.out = config, display, config.out
        self.folder = config.out / "checkpoints"
        content = self._newest()
        self.trainer = Trainer(config)
        seconds = 0.0
        if content is not None:
            check_same_run(content["config"], plain(config))
            self.trainer.restore(content)
            seconds = content["seconds"]
        self.clock = Clock(seconds)
        self.saved_at = self.trainer.step if content is not None else None
        # Of the steps since the last log line; read there only, a GPU would wait otherwise.
        self.losses: list[Tensor] = []
        self.identity = self._write_record()
        self.sinks = self._open_sinks()

    def _newest(self) -> dict[str, Any] | None:
        if self.config.resume:
            return checkpoint.load(self.folder)
        if checkpoint.checkpoints(self.folder) or (self.out / "metrics.jsonl").exists():
            raise ValueError(f"{self.out} holds a run already: add --resume true to go on, or name another --out")
        return None

    def _write_record(self) -> str:
        """Write config.yaml and run.json; return the run's id."""
        self.out.mkdir(parents=True, exist_ok=True)
        saved = plain(dataclasses.replace(self.config, resume=False))
        (self.out / "config.yaml").write_text(yaml.safe_dump(saved, sort_keys=False))
        path, trainer = self.out / "run.json", self.trainer
        record: dict[str, Any] = {
            "id": uuid.uuid4().hex[:16],
            "config": plain(self.config),
            "optimizer_settings": trainer.settings,
            "seeds": {"weights, data and rounding": self.config.seed},
            "data": {
                "sha256": trainer.fingerprint,
                "training_tokens": trainer.train_tokens,
                "validation_tokens": sum(map(len, trainer.validation)),
            },
            "model": {"parameters": sum(p.numel() for p in trainer.model.parameters()), "vocab": trainer.vocab_size},
            "sessions": [],
        }
        if trainer.step and path.exists():
            earlier = json.loads(path.read_text())
            record |= {key: earlier[key] for key in ("id", "sessions", "result") if key in earlier}
        record["sessions"].append({"from_step": trainer.step, **environment(trainer.device)})
        write_json(path, record)
        self.record = record
        return str(record["id"])

    def _open_sinks(self) -> list[Sink]:
        step, config = self.trainer.step, self.config
        sinks: list[Sink] = [JsonLines(self.out / "metrics.jsonl", step)]
        if config.tensorboard:
            sinks.append(TensorBoard(self.out, step))
        if config.wandb:
            sinks.append(WandB(config.wandb, self.out, self.identity, plain(config)))
        return sinks

    def _write(self, metrics: dict[str, float]) -> None:
        for sink in self.sinks:
            sink.write(self.trainer.step, metrics)
        self.display.metrics(self.trainer.step, metrics)

    def _log(self) -> None:
        trainer, config = self.trainer, self.config
        loss = float(torch.stack(self.losses).mean())
        per_step = self.clock.lap(len(self.losses))
        self.losses = []
        tokens = config.batch_size * config.data.context
        metrics = {
            "loss": loss,
            "tokens": trainer.step * tokens,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": round(self.clock.seconds, 3),
            "tokens_per_second": round(tokens / per_step, 1),
            "peak_mb": round(trainer.peak_megabytes(), 1),
        }
        self._write(metrics)
        if not math.isfinite(loss):
            raise Diverged(
                f"training diverged: the loss is {loss} at step {trainer.step}. Lower optimizer.lr="
                f"{trainer.settings['lr']:g} or raise warmup={config.warmup:g}"
            )

    def _evaluate(self) -> float:
        loss = self.trainer.evaluate()
        tokens = self.trainer.step * self.config.batch_size * self.config.data.context
        self._write({"validation_loss": loss, "tokens": tokens, "seconds": self.clock.seconds})
        return loss

    def _save(self) -> None:
        if self.saved_at == self.trainer.step:
            return
        content = {
            **self.trainer.state(),
            "config": plain(self.config),
            "seconds": self.clock.seconds,
        }
        step = self.trainer.step
        try:
            checkpoint.save(self.folder, step, content, self.config.keep_checkpoints)
        except OSError as error:
            found = checkpoint.checkpoints(self.folder)
            last = f"the checkpoint of step {found[0][0]} is whole" if found else "there is no checkpoint yet"
            raise Stopped(
                f"step {step} could not be saved ({error}); {last}. Make room, then: {self.resume_command()}"
            ) from error
        self.saved_at = step

    def resume_command(self) -> str:
        """Return the command that goes on with this run."""
        return f"mofasgd pretrain --config {self.out / 'config.yaml'} --resume true"

    def train(self) -> dict[str, Any]:
        """Run to the last step; return the result, which is also in run.json.

        Raises:
            Stopped: when interrupted, diverged, or a checkpoint could not be written.
        """
        config, trainer = self.config, self.trainer
        if trainer.step == config.steps:
            self.display.note(f"{self.out} has already taken its {config.steps} steps")
            return self._finish()
        with _catch_signals() as caught, self.display.running(config.steps, trainer.step):
            self.clock.skip()
            while trainer.step < config.steps:
                self.losses.append(trainer.train_step())
                step, last = trainer.step, trainer.step == config.steps
                evaluate = last or step % config.eval_every == 0
                save = bool(caught) or (last and config.save_last)
                save = save or (config.checkpoint_every > 0 and step % config.checkpoint_every == 0)
                if evaluate or save or step % config.log_every == 0:
                    self._log()
                if evaluate:
                    self._evaluate()
                if save:
                    self._save()
                if caught and not last:
                    raise Stopped(f"{caught[0]} at step {step}: saved. Go on with: {self.resume_command()}")
                if evaluate or save:
                    self.clock.skip()
        return self._finish()

    def _finish(self) -> dict[str, Any]:
        """Add the result to run.json and return it."""
        trainer, lines = self.trainer, read_metrics(self.out / "metrics.jsonl")
        losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
        result: dict[str, Any] = {
            "validation_loss": losses[-1],
            "best_validation_loss": min(losses),
            "tokens": lines[-1]["tokens"],
            "optimizer_state_mb": round(trainer.state_megabytes(), 3),
            "peak_mb": max(line.get("peak_mb", 0) for line in lines),
            "seconds": round(self.clock.seconds, 2),
        }
        if self.clock.laps:
            result["ms_per_step"] = round(1000 * self.clock.median(), 2)
        else:
            result["ms_per_step"] = self.record.get("result", {}).get("ms_per_step", math.nan)
        self.record["result"] = result
        write_json(self.out / "run.json", self.record)
        return result

    def close(self) -> None:
        """Close the metric files."""
        for sink in self.sinks:
            sink.close()


def train(config: PretrainConfig, display: Display) -> dict[str, Any]:
    """Run `config` to its end and return the result (also in run.json): losses, MB of state, ms per step.

    Raises:
        ValueError: for a configuration, data or checkpoint that cannot be used.
        Stopped: when the run ended early; what was reached is saved if it can be.
    """
    session = Session(config, display)
    try:
        return session.train()
    finally:
        session.close()


def help_epilog() -> str:
    """Return the table of methods for the end of the help."""
    return table()


def pretrain(config: PretrainConfig) -> None:
    """Train a compact GPT from scratch with MoFaSGD or a baseline."""
    display = Display()
    result = train(config, display)
    display.note(
        f"validation loss {result['validation_loss']:.4f} after {result['tokens']:,} tokens; optimizer state "
        f"{result['optimizer_state_mb']:.2f} MB; {result['ms_per_step']:.1f} ms per step; all in {config.out}"
    )
