"""`mofasgd finetune`: instruction tuning on TRL's SFTTrainer, with evaluation, checkpoints and resume."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shlex
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets.utils import disable_progress_bars
from trl import SFTConfig

from mofasgd.app.baselines import state_bytes
from mofasgd.app.config import Settings
from mofasgd.app.display import Display
from mofasgd.app.errors import Diverged, Stopped
from mofasgd.app.files import locked, read_json, write_json, write_text
from mofasgd.app.identity import plain
from mofasgd.app.record import JsonLines, environment, read_metrics
from mofasgd.app.signals import catch_signals
from mofasgd.app.tune.answers import answer_loss, exact_match, write
from mofasgd.app.tune.callback import Progress
from mofasgd.app.tune.config import FinetuneConfig, RowsConfig
from mofasgd.app.tune.encode import Example, load
from mofasgd.app.tune.methods import resolve
from mofasgd.app.tune.models import load_tokenizer, save
from mofasgd.app.tune.recording import MemoryProfile
from mofasgd.app.tune.rows import Skipped
from mofasgd.app.tune.training import begin_run, ready, sizes, training_arguments
from mofasgd.app.tune.tuner import Tuner, tuner
from mofasgd.app.usage import Clock, out_of_memory

_FREE = {
    *("out", "resume", "eval_every", "log_every", "checkpoint_every", "keep_checkpoints", "samples", "exact_match"),
    *("max_new_tokens", "save_model", "profile_memory"),
}
"""Without influence on the weights."""


Load = Callable[[Any, RowsConfig, Skipped], tuple[list[Example], list[Example]]]


class Session:
    """One start of `mofasgd finetune` on a run folder."""

    def __init__(self, config: FinetuneConfig, display: Display, load: Load = load) -> None:
        self.config, self.display, self.settings = config, display, resolve(config)
        self.skipped = Skipped()
        self.tokenizer = load_tokenizer(config.model, config.data.chat_template)
        self.train_rows, self.validation = load(self.tokenizer, config.data, self.skipped)
        if config.exact_match:
            exact_match([""] * len(self.asked(config.exact_match)), self.asked(config.exact_match))
        self.checkpoint = _newest(config.out / "checkpoints") if config.resume else None
        self.trainer = self._trainer()
        self.record = self._new_record()

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

    def _new_record(self) -> dict[str, Any]:
        """Return the content of run.json; a resumed run keeps its id and what was measured before training.

        Raises:
            ValueError: if the run to be resumed is another one.
        """
        config, path = self.config, self.config.out / "run.json"
        earlier = read_json(path) if config.resume and path.exists() else {}
        own = identity(config, self.settings, _fingerprint(self.train_rows))
        for key, value in own.items():
            if earlier and earlier["identity"].get(key) != value:
                raise ValueError(
                    f"{key}={value!r} was {earlier['identity'].get(key)!r} in the run to be resumed: put it back, or "
                    "start another run with another --out"
                )
        return {
            "id": earlier.get("id", uuid.uuid4().hex[:16]),
            "config": plain(config),
            "identity": own,
            "settings": self.settings,
            "data": {"training_rows": len(self.train_rows), "validation_rows": len(self.validation)}
            | {"training_tokens": sum(len(e.input_ids) for e in self.train_rows), "skipped": dict(self.skipped.counts)},
            "model": sizes(self.trainer.model),
            "before": earlier.get("before"),
            "sessions": [*earlier.get("sessions", []), environment(self.trainer.args.device)],
        }

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
            Stopped: when interrupted or diverged; what was reached is saved if it can be.
        """
        config, out = self.config, self.config.out
        write_text(out / "config.yaml", yaml.safe_dump(plain(config), sort_keys=False))
        if self.record["before"] is None:
            before, texts = self.examine()
            self.record["before"] = {**before, "answers": texts}
            self.display.note(f"before training: {_told(before)}")
        write_json(out / "run.json", self.record)
        step = int(self.checkpoint.name.rsplit("-", 1)[1]) if self.checkpoint else 0
        metrics = JsonLines(out / "metrics.jsonl", step)
        lines = [line["seconds"] for line in read_metrics(out / "metrics.jsonl") if "seconds" in line]
        clock = Clock(lines[-1] if lines else 0.0)
        if self.checkpoint:
            self.display.note(f"resumed at step {step}")
        try:
            with catch_signals() as caught:
                progress = Progress(metrics, self.display, clock, self.loss, config.eval_every, caught)
                self.trainer.add_callback(progress)
                if self.trainer.args.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                with self.display.running(self._steps(), step):
                    self.trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
            state = self.trainer.state
            if state.global_step < state.max_steps:
                raise Stopped(f"{caught[0]} at step {state.global_step}: saved. Go on with: {self.resume_command()}")
            return self._finish(progress, metrics)
        finally:
            metrics.close()

    def _steps(self) -> int:
        config = self.config
        per_epoch = math.ceil(len(self.trainer.train_dataset) / config.batch_size)
        return config.steps or math.ceil(config.epochs * per_epoch)

    def resume_command(self) -> str:
        """Return the command that goes on with this run."""
        return f"mofasgd finetune --config {shlex.quote(str(self.config.out / 'config.yaml'))} --resume true"

    def _finish(self, progress: Progress, metrics: JsonLines) -> dict[str, Any]:
        """Evaluate, write run.json, samples.json and the model; return the result."""
        config, trainer = self.config, self.trainer
        after, texts = self.examine()
        step = trainer.state.global_step
        metrics.write(step, after)
        per_step = progress.clock.per_step()
        self.record["result"] = {
            **after,
            "steps": step,
            "tokens_per_second": progress.tokens_per_second,
            "ms_per_step": None if per_step is None else round(1000 * per_step, 2),
            "seconds": round(progress.clock.seconds, 2),
            "peak_mb": progress.peak_mb,
            "optimizer_state_mb": round(state_bytes([trainer.optimizer]) / 1e6, 3),
        }
        before = self.record["before"]["answers"]
        samples = [
            {"prompt": self.tokenizer.decode(e.prompt), "answer": e.answer, "before": b, "after": a}
            for e, b, a in zip(self.asked(config.samples), before, texts, strict=False)
        ]
        write_json(config.out / "samples.json", samples)
        if config.save_model:
            save(trainer.model, self.tokenizer, config.out)
        write_json(config.out / "run.json", self.record)
        result: dict[str, Any] = self.record["result"]
        return result


def identity(config: FinetuneConfig, settings: Settings, fingerprint: str) -> dict[str, Any]:
    """Return what decides a run's weights: settings with defaults filled in, and a checksum of the training rows."""
    content = {key: value for key, value in plain(config).items() if key not in _FREE | {"data"} | set(settings)}
    found: dict[str, Any] = json.loads(json.dumps({**content, **settings}))
    return {**found, "data.packing": config.data.packing, "data": fingerprint}


def _fingerprint(examples: list[Example]) -> str:
    content = [[example.input_ids, example.labels] for example in examples]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint; trainer_state.json is written last."""
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


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
    out = config.out
    if config.resume and not (out / "run.json").exists():
        raise ValueError(f"resume=true, but out={out} holds no run: correct --out, or leave --resume out")
    if not config.resume and (out / "run.json").exists():
        raise ValueError(f"{out} holds a run already: add --resume true to go on, or name another --out")
    begin_run()
    disable_progress_bars()
    with locked(out, "out"):
        session = Session(config, display, load)
        earlier = read_json(out / "run.json") if config.resume else {}
        if "result" in earlier:
            display.note(f"{out} has already taken its {earlier['result']['steps']} steps")
            found: dict[str, Any] = earlier["result"]
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
