"""`mofasgd glue`: an encoder on GLUE tasks, with several methods, learning rates and seeds."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import re
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from mofasgd.app.baselines import state_bytes
from mofasgd.app.config import Settings
from mofasgd.app.files import locked
from mofasgd.app.record import environment
from mofasgd.app.tune.answers import evaluating
from mofasgd.app.tune.config import GlueConfig, MethodConfig
from mofasgd.app.tune.grid import Grid, Spec
from mofasgd.app.tune.methods import kwargs_for_trainer, resolve
from mofasgd.app.tune.metrics import scores
from mofasgd.app.tune.models import check_room, load_model, load_tokenizer, prepare
from mofasgd.app.tune.recording import MemoryProfile
from mofasgd.app.tune.rows import Skipped
from mofasgd.app.tune.tasks import TASKS, encode, fingerprint, load, names
from mofasgd.app.tune.training import Scheduled, begin_run, ready, sizes, training_arguments
from mofasgd.app.usage import peak_megabytes
from mofasgd.options import check_choice


class Classifier(Scheduled, Trainer):
    """transformers' Trainer with the schedule of `mofasgd pretrain`."""


class _Finite(TrainerCallback):
    """Ends a run whose loss is not finite."""

    diverged = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and not math.isfinite(float(logs.get("loss", 0.0))):
            self.diverged = control.should_training_stop = True


@dataclass(frozen=True)
class Run:
    """One run: a task with one method, rate and seed."""

    config: GlueConfig
    task: str
    method: MethodConfig
    seed: int


def predict(model: Any, tokenizer: Any, rows: list[dict[str, Any]], autocast: Any) -> torch.Tensor:
    """Return the outputs (rows, classes) in the order of `rows`, in float32 on the CPU."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    collate, device = DataCollatorWithPadding(tokenizer), next(model.parameters()).device
    parts = []
    with evaluating(model):
        for begin in range(0, len(order), 128):
            batch = collate([{k: v for k, v in rows[i].items() if k != "labels"} for i in order[begin : begin + 128]])
            with autocast():
                parts.append(model(**batch.to(device)).logits.float().cpu())
    outputs = torch.cat(parts)
    return outputs[torch.tensor(order).argsort()]


def _rows(run: Run, tokenizer: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Return training and validation rows in tokens, and what was done to them."""
    config, skipped = run.config, Skipped()
    train, validation = load(config.data, run.task, skipped)
    if run.task in config.rows:
        # By the first seed, whatever the run's: seeds are to differ in training, not in data.
        train = random.Random(config.seeds[0]).sample(train, min(config.rows[run.task], len(train)))
    (encoded, cut), (held_out, cut_too) = (encode(tokenizer, rows, config.context) for rows in (train, validation))
    counts = {"rows": [len(encoded), len(held_out)], "cut": cut + cut_too, "skipped": dict(skipped.counts)}
    return encoded, held_out, {**counts, "data": fingerprint(encoded, held_out)}


def _trainer(run: Run, settings: Settings, tokenizer: Any, rows: list[dict[str, Any]]) -> Classifier:
    """Return a trainer of the model with a head for the task."""
    config, method = run.config, run.method.method
    set_seed(run.seed)
    # A saved model may have a head for another task.
    options: dict[str, Any] = {"num_labels": TASKS[run.task].classes, "ignore_mismatched_sizes": True}
    model: Any = load_model(config.model, AutoModelForSequenceClassification, config.precision, **options)
    model.config.pad_token_id = tokenizer.pad_token_id
    model = prepare(model, method, settings, "SEQ_CLS")
    # Nothing is written into its folder.
    args = TrainingArguments(**training_arguments(config, settings, run.seed, str(config.out / "trainer")))
    kwargs = kwargs_for_trainer(args, method, settings)
    collator = DataCollatorWithPadding(tokenizer)
    trainer = Classifier(model=model, args=args, train_dataset=rows, data_collator=collator, **kwargs)
    ready(trainer, config.warmup, config.cooldown)
    if config.profile_memory:
        title = f"{run.task}, {method} rank {settings.get('rank', '-')} lr {settings['lr']:g} seed {run.seed}"
        place = config.out / re.sub(r"[^a-z0-9.-]+", "-", f"memory {title}")
        trainer.add_callback(MemoryProfile(config.profile_memory, place, title))
    return trainer


def execute(run: Run) -> dict[str, Any]:
    """Train and validate; return scores and costs. A diverged run has the score None."""
    begin_run()
    settings, tokenizer, finite = resolve(run.method), load_tokenizer(run.config.model), _Finite()
    train_rows, validation_rows, counts = _rows(run, tokenizer)
    trainer = _trainer(run, settings, tokenizer, train_rows)
    longest = max(len(row["input_ids"]) for row in (*train_rows, *validation_rows))
    check_room(trainer.model, longest, "context", run.config.context)
    trainer.add_callback(finite)
    args = trainer.args
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    trainer.train()
    if args.device.type == "cuda":
        torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - begin, peak_megabytes(args.device)

    def autocast() -> Any:
        return torch.autocast(args.device.type, torch.bfloat16) if args.bf16 else contextlib.nullcontext()

    outputs = predict(trainer.model, tokenizer, validation_rows, autocast)
    found: dict[str, Any] = {"score": None}
    if not finite.diverged and outputs.isfinite().all():
        labels = torch.tensor([row["labels"] for row in validation_rows])
        found = scores(TASKS[run.task].metrics, outputs, labels)
    return {
        **found,
        **counts,
        "settings": settings,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 2),
        "peak_mb": round(peak, 1),
        "optimizer_state_mb": round(state_bytes([trainer.optimizer]) / 1e6, 3),
        "model": sizes(trainer.model),
        "environment": environment(args.device),
    }


def specs(config: GlueConfig) -> list[Spec]:
    """Return the rows and columns of the table.

    Raises:
        ValueError: for an unknown task or label, or a setting that a method does not have.
    """
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(MethodConfig)}
    methods = config.methods or {config.method: MethodConfig(**own)}
    if config.methods and MethodConfig(**own) != MethodConfig():
        raise ValueError("method and its settings have no effect beside methods: put them into its entries")
    for label in config.lrs:
        if label not in methods:
            raise ValueError(f"lrs has the label {label!r}, which methods does not: {', '.join(methods)}")
    for task in config.rows:
        check_choice("rows", task, tuple(TASKS))
    found = []
    for task in names(config.task):
        for label, method in methods.items():
            rates = config.lrs.get(label) or [resolve(method)["lr"]]
            if len(set(rates)) < len(rates):
                raise ValueError(f"lrs of {label!r} names a rate twice: {rates}")
            found.append(Spec(task, label, {lr: dataclasses.replace(method, lr=lr) for lr in rates}))
    for spec in found:
        for method in spec.rates.values():
            resolve(method)
    return found


def identity(run: Run) -> dict[str, Any]:
    """Return what decides a run's scores beside its task, method and seed."""
    kept = ("model", "batch_size", "micro_batch_size", "epochs", "steps", "warmup", "cooldown", "precision")
    found = {key: getattr(run.config, key) for key in (*kept, "data", "context")}
    limit = run.config.rows.get(run.task)
    return {**found, "rows": limit and [limit, run.config.seeds[0]]}


def grid(config: GlueConfig, found: list[Spec]) -> Grid:
    """Return the table of cells `found`."""
    return Grid(
        config.out,
        found,
        config.seeds,
        config.jobs,
        score="score",
        highest=True,
        make=lambda task, method, seed: Run(config, task, method, seed),
        identity=identity,
    )


def check_data(config: GlueConfig, task: str, tokenizer: Any, found: list[dict[str, Any]]) -> None:
    """Raise ValueError for rows that cannot be read, or that are not those of the results `found`."""
    if not found:
        load(config.data, task, Skipped())
        return
    _, _, counts = _rows(Run(config, task, config, config.seeds[0]), tokenizer)
    for run in found:
        if run["data"] != counts["data"]:
            raise ValueError(
                f"the rows of {task} in data={config.data} are not those of {run['label']!r} in "
                f"{config.out / 'results.json'} (their checksum differs): put them back, or name another --out"
            )


def glue(config: GlueConfig) -> None:
    """Make the runs of `config` that are missing and show the table."""
    found = specs(config)
    with locked(config.out, "out"):
        # A model or data that cannot be had is an error before the first run.
        tokenizer, table = load_tokenizer(config.model), grid(config, found)
        for task in names(config.task):
            check_data(config, task, tokenizer, table.found(task))
        table.run(execute)
