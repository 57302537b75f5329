"""`mofasgd finetune`: instruction tuning on TRL's SFTTrainer, with evaluation, checkpoints and resume."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets.utils import disable_progress_bars
from trl import SFTConfig

from mofasgd.app.baselines import state_bytes
from mofasgd.app.display import Display
from mofasgd.app.errors import Diverged, Stopped
from mofasgd.app.files import locked, write_json, write_text
from mofasgd.app.identity import plain
from mofasgd.app.record import JsonLines, environment, read_metrics
from mofasgd.app.signals import catch_signals, raise_at_signals
from mofasgd.app.tune.answers import answer_loss, exact_match, write
from mofasgd.app.tune.callback import Progress
from mofasgd.app.tune.config import FinetuneConfig, RowsConfig
from mofasgd.app.tune.encode import Example, load
from mofasgd.app.tune.folder import earlier, fingerprint, identity, left, newest, resume_command, step_of
from mofasgd.app.tune.methods import resolve
from mofasgd.app.tune.models import check_room, load_tokenizer
from mofasgd.app.tune.recording import MemoryProfile
from mofasgd.app.tune.rows import Skipped
from mofasgd.app.tune.store import adapted, keep, restore, save
from mofasgd.app.tune.training import begin_run, ready, sizes, training_arguments
from mofasgd.app.tune.tuner import Tuner, tuner
from mofasgd.app.usage import Clock, out_of_memory, peak_megabytes

_ASIDE = "checkpoints/trained"
"""What was trained, where no model is to be written, if it could not be examined."""

Load = Callable[[Any, RowsConfig, Skipped], tuple[list[Example], list[Example]]]


class Session:
    """One start of `mofasgd finetune` on a run folder."""

    def __init__(
        self, config: FinetuneConfig, display: Display, load: Load = load, known: dict[str, Any] | None = None
    ) -> None:
        self.config, self.display, self.settings = config, display, resolve(config)
        self.skipped = Skipped()
        self.tokenizer = load_tokenizer(config.model, config.data.chat_template)
        self.train_rows, self.validation = load(self.tokenizer, config.data, self.skipped)
        if config.exact_match:
            exact_match([""] * len(self.asked(config.exact_match)), self.asked(config.exact_match))
        self.checkpoint = newest(config.out) if config.resume else None
        self.trainer = self._trainer()
        longest = max(len(row.input_ids) for row in (*self.train_rows, *self.validation))
        check_room(self.trainer.model, longest, "data.context", config.data.context)
        # What it refuses is refused before anything is examined or written.
        self.trainer.create_optimizer()
        self.record = self._new_record(known or {})
        # Of the training, once its last step is taken.
        self.costs = {key: value for key, value in self.record.get("trained", {}).items() if key != "folder"}

    def asked(self, count: int) -> list[Example]:
        """Return the first `count` validation rows."""
        return self.validation[:count]

    def _trainer(self) -> Tuner:
        config = self.config
        args = SFTConfig(
            **training_arguments(config, self.settings, config.seed, str(config.out / "checkpoints")),
            packing=config.data.packing,
            # Rows that do not fit have been left out.
            max_length=config.data.context if config.data.packing else None,
            save_total_limit=config.keep_checkpoints,
        )
        if config.checkpoint_every:
            args.save_strategy, args.save_steps = "steps", config.checkpoint_every
        trainer = tuner(config, args, self.settings, self.tokenizer, self.train_rows)
        ready(trainer, config.warmup, config.cooldown)
        if config.profile_memory:
            trainer.add_callback(MemoryProfile(config.profile_memory, config.out, config.method))
        return trainer

    def _new_record(self, known: dict[str, Any]) -> dict[str, Any]:
        """Return the content of run.json; a resumed run keeps its id and what was measured before training.

        Args:
            known: that content in the run to be resumed; {} for a new run.

        Raises:
            ValueError: if the run to be resumed is another one.
        """
        config = self.config
        own = identity(config, self.settings, fingerprint(self.train_rows))
        # Without influence on the weights, but what is measured before and after has to be of the same rows.
        own["data.validation"] = fingerprint(self.validation)
        for key, value in own.items():
            if known and known["identity"].get(key) != value:
                raise ValueError(
                    f"{key}={value!r} was {known['identity'].get(key)!r} in the run to be resumed: put it back, or "
                    "start another run with another --out"
                )
        trained = known.get("trained")
        there = trained is not None and (config.out / trained["folder"]).is_dir()
        return {
            "id": known.get("id", uuid.uuid4().hex[:16]),
            "config": plain(config),
            "identity": own,
            "settings": self.settings,
            "data": {"training_rows": len(self.train_rows), "validation_rows": len(self.validation)}
            | {"training_tokens": sum(len(e.input_ids) for e in self.train_rows), "skipped": dict(self.skipped.counts)},
            "model": sizes(self.trainer.model),
            "before": known.get("before"),
            "sessions": [*known.get("sessions", []), environment(self.trainer.args.device)],
        } | ({"trained": trained} if there else {})

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the precision of evaluations, training's own."""
        if not self.trainer.args.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.trainer.args.device.type, torch.bfloat16)

    def loss(self) -> dict[str, float]:
        """Return the validation loss per answer token; raise Diverged if it is not finite."""
        loss, _ = answer_loss(self.trainer.model, self.validation, self.autocast)
        if not math.isfinite(loss):
            raise Diverged(f"the validation loss is {loss}: lower lr={self.settings['lr']:g}, or raise warmup")
        return {"validation_loss": loss}

    def examine(self) -> tuple[dict[str, float], list[str]]:
        """Return loss, perplexity and exact match, and the answers to the samples."""
        config, found = self.config, self.loss()
        found["perplexity"] = math.exp(min(found["validation_loss"], 700.0))  # below what a float holds
        count = max(config.samples, config.exact_match)
        texts = self._written(self.asked(count)) if count else []
        if config.exact_match:
            right = self.asked(config.exact_match)
            found["exact_match"] = exact_match(texts[: len(right)], right)
        return found, texts[: config.samples]

    def _written(self, examples: list[Example]) -> list[str]:
        return write(self.trainer.model, self.tokenizer, examples, self.config.max_new_tokens, self.autocast)

    def run(self) -> dict[str, Any]:
        """Train to the last step and return the result.

        Raises:
            Stopped: when interrupted or diverged, or nothing more could be written; what was reached is saved if it
                can be.
        """
        config, out, trained = self.config, self.config.out, self.record.get("trained")
        content = plain(dataclasses.replace(config, resume=False))
        write_text(out / "config.yaml", yaml.safe_dump(content, sort_keys=False))
        if self.record["before"] is None:
            before, texts = self.examine()
            self.record["before"] = {**before, "answers": texts}
            self.display.note(f"before training: {_told(before)}")
        self._write_record()
        step = trained["steps"] if trained else step_of(self.checkpoint) if self.checkpoint else 0
        if config.resume:
            where = "resumed at" if step else "there is no checkpoint yet: starting at"
            self.display.note(f"{where} step {step}" + (", the last one" if trained else ""))
        metrics = JsonLines(out / "metrics.jsonl", step)
        try:
            if trained:
                restore(self.trainer.model, out / trained["folder"], config.precision)
                if config.save_model and trained["folder"] == _ASIDE:
                    self._store()
            else:
                self._train(metrics, step)
            return self._finish(metrics)
        except OSError as error:
            raise Stopped(f"{error}; {self._left()}. When that is mended: {resume_command(config)}") from error
        finally:
            metrics.close()

    def _write_record(self) -> None:
        write_json(self.config.out / "run.json", self.record)

    def _left(self) -> str:
        if "trained" in self.record:
            return f"the trained model is in {self.config.out / self.record['trained']['folder']}"
        return left(self.config)

    def _train(self, metrics: JsonLines, step: int) -> None:
        """Take the steps that are left, and put what was trained onto the disk."""
        config, trainer = self.config, self.trainer
        lines = [line["seconds"] for line in read_metrics(metrics.path) if "seconds" in line]
        clock = Clock(lines[-1] if lines else 0.0)
        with catch_signals() as caught:
            progress = Progress(metrics, self.display, clock, self.loss, config.eval_every, caught)
            if self.checkpoint and step == self._steps():
                self._take_over(self.checkpoint)
            else:
                trainer.add_callback(progress)
                if trainer.args.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                with self.display.running(self._steps(), step):
                    trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
                state = trainer.state
                if state.global_step < state.max_steps:
                    again = resume_command(config)
                    raise Stopped(f"{caught[0]} at step {state.global_step}: saved. Go on with: {again}")
            self.costs = self._costs(progress)
            if config.save_model:
                self._store()
        if caught:
            raise self._unexamined(KeyboardInterrupt(caught[0]))

    def _take_over(self, checkpoint: Path) -> None:
        """Load a checkpoint of the last step; transformers' train would take a step more."""
        restore(self.trainer.model, checkpoint, self.config.precision)
        optimizer, device = self.trainer.optimizer, self.trainer.args.device
        assert optimizer is not None
        optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", map_location=device, weights_only=True))

    def _costs(self, progress: Progress) -> dict[str, Any]:
        """Return what the training has cost; speeds are None if this session has taken no step."""
        per_step = progress.clock.per_step()
        peak = progress.peak_mb
        return {
            "steps": self._steps(),
            "tokens_per_second": progress.tokens_per_second,
            "ms_per_step": None if per_step is None else round(1000 * per_step, 2),
            "seconds": round(progress.clock.seconds, 2),
            "peak_mb": round(peak_megabytes(self.trainer.args.device), 1) if peak is None else peak,
            "optimizer_state_mb": round(state_bytes([self.trainer.optimizer]) / 1e6, 3),
        }

    def _steps(self) -> int:
        config = self.config
        per_epoch = math.ceil(len(self.trainer.train_dataset) / config.batch_size)
        return config.steps or math.ceil(config.epochs * per_epoch)

    def _store(self) -> None:
        """Put the trained model onto the disk, of LoRA the adapter, and note that in run.json."""
        config, model = self.config, self.trainer.model
        folder = "adapter" if adapted(model) else "model"
        if not config.save_model:
            folder = _ASIDE
        if folder == "model":
            save(model, self.tokenizer, config.out / folder)
        else:
            keep(model, config.out / folder)
        self.record["trained"] = {"folder": folder, **self.costs}
        self._write_record()

    def _finish(self, metrics: JsonLines) -> dict[str, Any]:
        """Evaluate, write samples.json, the merged model and run.json; return the result.

        Raises:
            Stopped: if that could not be done; the trained model is on the disk then.
        """
        try:
            with raise_at_signals():
                after, texts = self.examine()
                self._write_samples(texts)
                if self.config.save_model and self.record["trained"]["folder"] != "model":
                    save(self.trainer.model, self.tokenizer, self.config.out / "model")
        except (Diverged, OSError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            raise self._unexamined(error) from error
        metrics.write(self.costs["steps"], after)
        result = {**after, **self.costs}
        self.record["result"] = result
        self._write_record()
        return result

    def _write_samples(self, texts: list[str]) -> None:
        before = self.record["before"]["answers"]
        samples = [
            {"prompt": self.tokenizer.decode(e.prompt), "answer": e.answer, "before": b, "after": a}
            for e, b, a in zip(self.asked(self.config.samples), before, texts, strict=False)
        ]
        write_json(self.config.out / "samples.json", samples)

    def _unexamined(self, error: BaseException) -> Stopped:
        """Return what ends a run whose last step is taken, when the trained model is on the disk."""
        if "trained" not in self.record:
            self._store()
        reason = f"{str(error) or 'interrupted'} after the last step"
        if isinstance(error, Exception):
            reason = f"the trained model could not be examined ({type(error).__name__}: {str(error).strip()[:200]})"
        if isinstance(error, RuntimeError) and out_of_memory(error):
            reason += "; lower max_new_tokens, samples or exact_match"
        return Stopped(f"{reason}: {self._left()}. Go on with: {resume_command(self.config)}")


def _told(metrics: dict[str, Any]) -> str:
    names = {"validation_loss": "validation loss {:.4f}", "perplexity": "perplexity {:.3f}"}
    names["exact_match"] = "exact match {:.1%}"
    return ", ".join(form.format(metrics[key]) for key, form in names.items() if key in metrics)


def train(config: FinetuneConfig, display: Display, load: Load = load) -> dict[str, Any]:
    """Run `config` to its end and return the result, which is also in run.json.

    Args:
        config: of the run.
        display: of its progress.
        load: reads the rows, as `encode.load` does.

    Raises:
        ValueError: for a configuration, model or data that cannot be used, or a run folder that does not fit.
        Stopped: when the run ended early.
    """
    known = earlier(config)
    begin_run()
    disable_progress_bars()
    with locked(config.out, "out"):
        session = Session(config, display, load, known)
        if "result" in known:
            display.note(f"{config.out} has already taken its {known['result']['steps']} steps")
            found: dict[str, Any] = known["result"]
            return found
        try:
            result = session.run()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise Stopped(
                f"out of memory: {str(error).splitlines()[0]}. Lower micro_batch_size="
                f"{config.micro_batch_size or config.batch_size} or data.context={config.data.context}, or add "
                "--gradient_checkpointing true"
            ) from error
        display.note(str(session.skipped))
        return result


def finetune(config: FinetuneConfig) -> None:
    """Run `config` and show its result."""
    display = Display()
    result = train(config, display)
    speed = "" if result["tokens_per_second"] is None else f", {result['tokens_per_second']:,.0f} tokens/s"
    display.note(
        f"{_told(result)} after {result['steps']} steps; optimizer state {result['optimizer_state_mb']:,.1f} MB, peak "
        f"{result['peak_mb']:,.0f} MB{speed}; all in {config.out}"
    )
