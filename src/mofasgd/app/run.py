"""`mofasgd pretrain`: the loop around `Trainer`, with log, evaluation, checkpoints and resume."""

from __future__ import annotations

import dataclasses
import math
import shlex
import uuid
from typing import Any

import torch
import yaml
from torch import Tensor

from mofasgd.app import checkpoint
from mofasgd.app.baselines import table
from mofasgd.app.config import PretrainConfig
from mofasgd.app.display import Display
from mofasgd.app.errors import Diverged, Stopped
from mofasgd.app.files import locked, read_json, write_json, write_text
from mofasgd.app.identity import check_same_run, identity, plain
from mofasgd.app.record import JsonLines, Sink, TensorBoard, WandB, environment, read_metrics
from mofasgd.app.signals import catch_signals
from mofasgd.app.trainer import Trainer
from mofasgd.app.usage import Clock, out_of_memory
from mofasgd.snapshot import check_recordable, save_recording, start_recording


class Session:
    """One start of `mofasgd pretrain` on a run folder."""

    def __init__(self, config: PretrainConfig, trainer: Trainer, display: Display) -> None:
        self.config, self.trainer, self.display, self.out = config, trainer, display, config.out
        self.folder = config.out / "checkpoints"
        self.clock = Clock(self._restore())
        # Of the steps since the last log line; read there only, a GPU would wait otherwise.
        self.losses: list[Tensor] = []
        self.recording = False
        self.record = self._new_record()
        self.metrics = JsonLines(self.out / "metrics.jsonl", trainer.step)
        self.sinks: list[Sink] = [self.metrics]
        if config.tensorboard:
            self.sinks.append(TensorBoard(self.out, trainer.step))
        if config.wandb:
            self.sinks.append(WandB(config.wandb, self.out, self.record["id"], plain(config)))
        self._write_record()

    def _restore(self) -> float:
        """Take over the newest checkpoint if the run is resumed; return the seconds it has trained."""
        content = checkpoint.load(self.folder) if self.config.resume else None
        if content is None:
            if self.config.resume:
                self.display.note("there is no checkpoint yet: starting at step 0")
            return 0.0
        check_same_run(content["identity"], self.config)
        self.trainer.restore(content)
        self.display.note(f"resumed at step {self.trainer.step}")
        return float(content["seconds"])

    def _new_record(self) -> dict[str, Any]:
        """Return the content of run.json; a resumed run keeps its id and tells of all its sessions."""
        trainer, path = self.trainer, self.out / "run.json"
        earlier = read_json(path) if trainer.step and path.exists() else {}
        session = {"from_step": trainer.step, **environment(trainer.device)}
        return {
            "id": earlier.get("id", uuid.uuid4().hex[:16]),
            "config": plain(self.config),
            "identity": identity(self.config),
            "optimizer_settings": trainer.settings,
            "seeds": {"weights, data and rounding": self.config.seed},
            "data": {
                "sha256": trainer.fingerprint,
                "training_tokens": trainer.train_tokens,
                "validation_tokens": sum(map(len, trainer.validation)),
            },
            "model": {
                "parameters": sum(p.numel() for p in trainer.model.parameters()),
                "megabytes": sum(p.nbytes for p in trainer.model.parameters()) / 1e6,
                "vocab": trainer.vocab_size,
            },
            "sessions": [*earlier.get("sessions", []), session],
        }

    def _write_record(self) -> None:
        text = yaml.safe_dump(plain(dataclasses.replace(self.config, resume=False)), sort_keys=False)
        path = self.out / "config.yaml"
        if not path.exists() or path.read_text() != text:
            write_text(path, text)
        write_json(self.out / "run.json", self.record)

    def _write(self, metrics: dict[str, float]) -> None:
        for sink in self.sinks:
            sink.write(self.trainer.step, metrics)
        self.display.metrics(self.trainer.step, metrics)

    def _log(self) -> None:
        trainer, config = self.trainer, self.config
        loss = float(torch.stack(self.losses).mean())
        per_step = self.clock.lap(len(self.losses))
        self.losses = []
        self._refuse_divergence(loss, "loss")
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

    def _evaluate(self) -> float:
        loss = self.trainer.evaluate()
        self._refuse_divergence(loss, "validation loss")
        tokens = self.trainer.step * self.config.batch_size * self.config.data.context
        self._write({"validation_loss": loss, "tokens": tokens, "seconds": round(self.clock.seconds, 3)})
        return loss

    def _refuse_divergence(self, loss: float, name: str) -> None:
        if not math.isfinite(loss):
            raise Diverged(
                f"training diverged: the {name} is {loss} at step {self.trainer.step}. Lower optimizer.lr="
                f"{self.trainer.settings['lr']:g} or raise warmup={self.config.warmup:g}"
            )

    def _save(self) -> None:
        """Write a checkpoint; raise Stopped if that fails."""
        step = self.trainer.step
        content = {**self.trainer.state(), "identity": identity(self.config), "seconds": self.clock.seconds}
        try:
            # No checkpoint may be later than the metrics of its step.
            self.metrics.sync()
            checkpoint.save(self.folder, step, content, self.config.keep_checkpoints)
        except OSError as error:
            found = checkpoint.checkpoints(self.folder)
            last = f"the checkpoint of step {found[0][0]} is whole" if found else "there is no checkpoint yet"
            raise Stopped(
                f"step {step} could not be saved ({error}); {last}. Make room, then: {self.resume_command()}"
            ) from error

    def resume_command(self) -> str:
        """Return the command that goes on with this run."""
        return f"mofasgd pretrain --config {shlex.quote(str(self.out / 'config.yaml'))} --resume true"

    def train(self) -> dict[str, Any]:
        """Run to the last step; return the result, which is also in run.json.

        Raises:
            Stopped: when interrupted, diverged, or data or disk failed; what was reached is saved if it can be.
        """
        config, trainer = self.config, self.trainer
        with catch_signals() as caught, self.display.running(config.steps, trainer.step):
            self.clock.skip()
            try:
                while trainer.step < config.steps:
                    self._advance(bool(caught))
                    if caught and trainer.step < config.steps:
                        self._save()
                        raise Stopped(f"{caught[0]} at step {trainer.step}: saved. Go on with: {self.resume_command()}")
            except (ValueError, OSError) as error:
                if trainer.step == 0:
                    raise
                self._save()
                raise Stopped(
                    f"{error}. Step {trainer.step} is saved; when that is mended: {self.resume_command()}"
                ) from error
        return self._finish()

    def _advance(self, stopping: bool) -> None:
        """Take a step, and log, evaluate and save where it is time to."""
        config, trainer = self.config, self.trainer
        recorded = range(*(config.memory_history or (0, 0)))
        if trainer.step in recorded and not self.recording:
            start_recording()
            self.recording = True
        self.losses.append(trainer.train_step())
        if trainer.step not in recorded:
            self._stop_recording()
        step, last = trainer.step, trainer.step == config.steps
        evaluate = last or step % config.eval_every == 0
        save = config.save_last if last else config.checkpoint_every > 0 and step % config.checkpoint_every == 0
        if evaluate or save or stopping or step % config.log_every == 0:
            self._log()
        if evaluate:
            self._evaluate()
        if save:
            self._save()
        if evaluate or save:
            self.clock.skip()

    def _finish(self) -> dict[str, Any]:
        """Add the result to run.json and return it."""
        trainer, path = self.trainer, self.out / "metrics.jsonl"
        at_end = [x for x in read_metrics(path) if x["step"] == trainer.step and "validation_loss" in x]
        # The line may have been lost between the last checkpoint and the end.
        loss = at_end[-1]["validation_loss"] if at_end else self._evaluate()
        per_step = self.clock.per_step()
        self.record["result"] = {
            "validation_loss": loss,
            "best_validation_loss": min(x["validation_loss"] for x in read_metrics(path) if "validation_loss" in x),
            "tokens": trainer.step * self.config.batch_size * self.config.data.context,
            "optimizer_state_mb": round(trainer.state_megabytes(), 3),
            "peak_mb": round(trainer.peak_megabytes(), 1),
            "seconds": round(self.clock.seconds, 2),
            # Of this session; unknown if it had no step to take.
            "gradients_mb": None if trainer.gradient_bytes is None else round(trainer.gradient_bytes / 1e6, 3),
            "ms_per_step": None if per_step is None else round(1000 * per_step, 2),
        }
        write_json(self.out / "run.json", self.record)
        result: dict[str, Any] = self.record["result"]
        return result

    def _stop_recording(self) -> None:
        if self.recording:
            save_recording(self.out / "memory.pickle")
            self.recording = False

    def close(self) -> None:
        """Close the metric files; save a recording that an error, out of memory say, has ended."""
        self._stop_recording()
        for sink in self.sinks:
            sink.close()


def _finished(config: PretrainConfig) -> dict[str, Any] | None:
    """Return the result if the run folder has it; refuse a folder that does not fit `config.resume`.

    Raises:
        ValueError: for a new run in a used folder, or a resumed one in a folder without a run or with another one.
    """
    out = config.out
    if not config.resume:
        lines = out / "metrics.jsonl"
        if checkpoint.checkpoints(out / "checkpoints") or (lines.exists() and lines.stat().st_size):
            raise ValueError(f"{out} holds a run already: add --resume true to go on, or name another --out")
        return None
    if not (out / "run.json").exists() and not checkpoint.checkpoints(out / "checkpoints"):
        raise ValueError(f"resume=true, but out={out} holds no run: correct --out, or leave --resume out")
    record = read_json(out / "run.json") if (out / "run.json").exists() else {}
    if "result" in record:
        check_same_run(record["identity"], config)
    result: dict[str, Any] | None = record.get("result")
    return result


def train(config: PretrainConfig, display: Display) -> dict[str, Any]:
    """Run `config` to its end and return the result (also in run.json): losses, MB of state, ms per step.

    Raises:
        ValueError: for a configuration, data or checkpoint that cannot be used.
        Stopped: when the run ended early; what was reached is saved if it can be.
    """
    result = _finished(config)
    if result is not None:
        display.note(f"{config.out} has already taken its {config.steps} steps")
        return result
    try:
        trainer = Trainer(config)
        if config.memory_history is not None:
            check_recordable("memory_history", trainer.device)
        with locked(config.out, "out"):
            session = Session(config, trainer, display)
            try:
                return session.train()
            finally:
                session.close()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise Stopped(
            f"out of memory: {str(error).splitlines()[0]}. Lower micro_batch_size="
            f"{config.micro_batch_size or config.batch_size}, data.context={config.data.context} or the model"
        ) from error


def help_epilog() -> str:
    """Return the table of methods for the end of the help."""
    return table()


def pretrain(config: PretrainConfig) -> None:
    """Train a compact GPT from scratch with MoFaSGD or a baseline."""
    display = Display()
    result = train(config, display)
    speed = "" if result["ms_per_step"] is None else f"; {result['ms_per_step']:.1f} ms per step"
    display.note(
        f"validation loss {result['validation_loss']:.4f} after {result['tokens']:,} tokens; optimizer state "
        f"{result['optimizer_state_mb']:.2f} MB{speed}; all in {config.out}"
    )
