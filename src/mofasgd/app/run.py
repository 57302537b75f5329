"""One run of the training loop around `Trainer`, with log, evaluation, checkpoints and resume."""

from __future__ import annotations

import contextlib
import math
import shlex
import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mofasgd.app import checkpoint
from mofasgd.app.config import PretrainConfig
from mofasgd.app.display import Display
from mofasgd.app.errors import Diverged, Lost, Stopped
from mofasgd.app.files import locked, read_json
from mofasgd.app.identity import check_same_run, flat, identity, plain
from mofasgd.app.journal import Journal
from mofasgd.app.ranks import Ranks, lost, started
from mofasgd.app.signals import catch_signals
from mofasgd.app.trainer import Trainer
from mofasgd.app.usage import Clock, out_of_memory
from mofasgd.snapshot import check_recordable, save_recording, start_recording


class Session:
    """One start of `mofasgd pretrain` on a run folder, in one rank; the lead has the journal."""

    def __init__(self, config: PretrainConfig, trainer: Trainer, display: Display) -> None:
        self.config, self.trainer, self.display, self.out = config, trainer, display, config.out
        self.ranks = trainer.ranks
        self.folder = config.out / "checkpoints"
        self.clock = Clock(self._restore())
        # Of the steps since the last log line; read there only, a GPU would wait otherwise.
        self.losses: list[Tensor] = []
        self.recording = False
        self.journal = self.ranks.together(lambda: Journal(config, trainer) if self.ranks.lead else None)

    def _restore(self) -> float:
        """Take over the newest checkpoint if the run is resumed; return the seconds it has trained."""
        if not self.config.resume:
            return 0.0
        # From the lead, lest the folder have to be seen by every machine.
        content = self.ranks.from_lead(lambda: checkpoint.load(self.folder))
        if content is None:
            self.display.note("there is no checkpoint yet: starting at step 0")
            return 0.0
        check_same_run(content["identity"], self.config)
        self.trainer.restore(content)
        self.display.note(f"resumed at step {self.trainer.step}{self._other_world(content)}")
        return float(content["seconds"])

    def _other_world(self, content: dict[str, Any]) -> str:
        then, now = content.get("ranks", 1), self.ranks.world
        return "" if then == now else f", saved by {then} ranks and now {now}: equal up to rounding from here on"

    def _record(self, work: Callable[[Journal], object]) -> None:
        """Let the lead do something with the journal; collective."""
        journal = self.journal
        self.ranks.together(lambda: None if journal is None else work(journal))

    def _write(self, metrics: dict[str, float]) -> None:
        step = self.trainer.step
        self._record(lambda journal: journal.write(step, metrics))
        self.display.metrics(step, metrics)

    def _log(self) -> None:
        trainer, config = self.trainer, self.config
        loss = float(torch.stack(self.losses).mean())
        if self.ranks.world > 1:
            loss = self.ranks.total(loss)[0] / self.ranks.world
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
        """Let the lead write a checkpoint; raise Stopped on all ranks if that fails."""
        step = self.trainer.step
        more = {"identity": identity(self.config), "seconds": self.clock.seconds, "ranks": self.ranks.world}
        content = {**self.trainer.state(), **more}

        def write(journal: Journal) -> None:
            try:
                # No checkpoint may be later than the metrics of its step.
                journal.metrics.sync()
                checkpoint.save(self.folder, step, content, self.config.keep_checkpoints)
            except OSError as error:
                raise Stopped(
                    f"step {step} could not be saved ({error}); {last_checkpoint(self.config)}. Make room, then: "
                    f"{resume_command(self.config)}"
                ) from error

        self._record(write)

    def train(self) -> dict[str, Any]:
        """Run to the last step; return the result, which is also in run.json.

        Raises:
            Stopped: when interrupted, diverged, or data or disk failed; what was reached is saved if it can be.
        """
        config, trainer = self.config, self.trainer
        again = resume_command(config)
        apart = 1.0 if self.ranks.world > 1 else 0.0
        with catch_signals(apart) as caught, self.display.running(config.steps, trainer.step):
            self.clock.skip()
            try:
                while trainer.step < config.steps:
                    name = self._advance(caught)
                    if name and trainer.step < config.steps:
                        self._save()
                        raise Stopped(f"{name} at step {trainer.step}: saved. Go on with: {again}")
            except (ValueError, OSError) as error:
                if trainer.step == 0:
                    raise
                self._save()
                raise Stopped(f"{error}. Step {trainer.step} is saved; when that is mended: {again}") from error
        return self._finish()

    def _advance(self, caught: list[str]) -> str:
        """Take a step, and log, evaluate and save where it is time to; return the name of a signal to stop, or ""."""
        config, trainer = self.config, self.trainer
        recorded = range(*(config.memory_history or (0, 0))) if self.ranks.lead else range(0)
        if trainer.step in recorded and not self.recording:
            start_recording()
            self.recording = True
        self.losses.append(trainer.train_step())
        if trainer.step not in recorded:
            self._stop_recording()
        # All ranks stop at the same step, whichever of them has been told to.
        number = self.ranks.highest(signal.Signals[caught[0]].value if caught else 0)
        step, last = trainer.step, trainer.step == config.steps
        evaluate = last or step % config.eval_every == 0
        save = config.save_last if last else config.checkpoint_every > 0 and step % config.checkpoint_every == 0
        if evaluate or save or number or step % config.log_every == 0:
            self._log()
        if evaluate:
            self._evaluate()
        if save:
            self._save()
        if evaluate or save:
            self.clock.skip()
        return signal.Signals(number).name if number else ""

    def _finish(self) -> dict[str, Any]:
        """Add the result to run.json and return it."""
        trainer, journal = self.trainer, self.journal
        # The line may have been lost between the last checkpoint and the end.
        loss = self.ranks.from_lead(lambda: None if journal is None else journal.validation_losses().get(trainer.step))
        per_step = self.clock.per_step()
        result = {
            "validation_loss": self._evaluate() if loss is None else loss,
            "tokens": trainer.step * self.config.batch_size * self.config.data.context,
            "optimizer_state_mb": round(trainer.state_megabytes(), 3),
            "peak_mb": round(trainer.peak_megabytes(), 1),
            "seconds": round(self.clock.seconds, 2),
            # Of this session; unknown if it had no step to take.
            "gradients_mb": None if trainer.gradient_bytes is None else round(trainer.gradient_bytes / 1e6, 3),
            "ms_per_step": None if per_step is None else round(1000 * per_step, 2),
        }
        return self.ranks.from_lead(lambda: result if journal is None else journal.finish(result))

    def _stop_recording(self) -> None:
        if self.recording:
            save_recording(self.out / "memory.pickle")
            self.recording = False

    def close(self) -> None:
        """Close the metric files; save a recording that an error, out of memory say, has ended."""
        self._stop_recording()
        if self.journal is not None:
            self.journal.close()


def resume_command(config: PretrainConfig) -> str:
    """Return the command that goes on with this run."""
    command = f"pretrain --config {shlex.quote(str(config.out / 'config.yaml'))} --resume true"
    # Where torchrun has started the ranks, its own flags are its caller's.
    by_torchrun = started() and config.gpus == 1
    return f"torchrun ... -m mofasgd.cli {command}" if by_torchrun else f"mofasgd {command}"


def last_checkpoint(config: PretrainConfig) -> str:
    """Return what is left of a run, for a message."""
    found = checkpoint.checkpoints(config.out / "checkpoints")
    return f"the checkpoint of step {found[0][0]} is whole" if found else "there is no checkpoint yet"


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


def _check_alike(config: PretrainConfig, ranks: Ranks) -> None:
    """Raise ValueError if the ranks were started with different settings: each machine has flags of its own."""
    first, *others = ranks.gather(dict(flat(plain(config))))
    for rank, other in enumerate(others, 1):
        for key, value in other.items():
            if value != first[key]:
                raise ValueError(
                    f"rank {rank} was started with {key}={value!r}, rank 0 with {first[key]!r}: give all the same"
                )


def train(config: PretrainConfig, display: Display, ranks: Ranks | None = None) -> dict[str, Any]:
    """Run `config` to its end and return the result (also in run.json): losses, MB of state, ms per step.

    Args:
        config: of the run.
        display: where its progress is shown.
        ranks: this process's place among those that train together; None: alone.

    Raises:
        ValueError: for a configuration, data or checkpoint that cannot be used.
        Stopped: when the run ended early; what was reached is saved if it can be.
    """
    ranks = ranks or Ranks()
    _check_alike(config, ranks)
    result = ranks.from_lead(lambda: _finished(config))
    if result is not None:
        display.note(f"{config.out} has already taken its {config.steps} steps")
        return result
    try:
        trainer = ranks.together(lambda: Trainer(config, ranks))
        if config.memory_history is not None:
            check_recordable("memory_history", trainer.device)
        with contextlib.ExitStack() as held:
            ranks.together(lambda: held.enter_context(locked(config.out, "out")) if ranks.lead else None)
            trainer.connect()
            session = Session(config, trainer, display)
            try:
                return session.train()
            finally:
                session.close()
    except RuntimeError as error:
        if out_of_memory(error):
            raise Stopped(
                f"out of memory: {str(error).splitlines()[0]}. Lower micro_batch_size="
                f"{config.micro_batch_size or config.batch_size}, data.context={config.data.context} or the model"
            ) from error
        if ranks.world > 1 and lost(error):
            raise Lost(
                f"rank {ranks.rank} has lost another rank: the run has ended; {last_checkpoint(config)}. Go on with: "
                f"{resume_command(config)}"
            ) from error
        raise
