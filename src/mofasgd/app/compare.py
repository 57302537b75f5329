"""`mofasgd compare`: the same model and tokens under several optimizers, side by side."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from mofasgd.app.apart import sweep
from mofasgd.app.baselines import resolve
from mofasgd.app.config import CompareConfig, PretrainConfig
from mofasgd.app.data import load
from mofasgd.app.display import Display
from mofasgd.app.errors import Diverged, Stopped
from mofasgd.app.files import locked, read_json, write_json
from mofasgd.app.identity import digest, plain
from mofasgd.app.ranks import started
from mofasgd.app.report import by_loss, draw, reading, table
from mofasgd.app.run import train


@dataclass(frozen=True)
class Job:
    """One run of the comparison."""

    label: str
    lr: float
    seed: int
    config: PretrainConfig

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.label}, lr {self.lr:g}, seed {self.seed}"


def check(config: CompareConfig) -> None:
    """Raise ValueError for an empty comparison, an unknown label, or a setting that a method does not have."""
    if not config.methods:
        raise ValueError("methods is empty: name a file such as --config configs/demo.yaml")
    for label in config.lrs:
        if label not in config.methods:
            raise ValueError(f"lrs has the label {label!r}, which methods does not: {', '.join(config.methods)}")
    neutral = PretrainConfig()
    for key in ("out", "seed", "resume", "optimizer", "gpus"):
        if getattr(config.base, key) != getattr(neutral, key):
            raise ValueError(f"base.{key} has no effect: use out, seeds, methods and lrs of the comparison")
    for label, optimizer in config.methods.items():
        rates = _rates(config, label)
        if len(set(rates)) < len(rates):
            raise ValueError(f"lrs of {label!r} names a rate twice: {rates}")
        for lr in rates:
            resolve(dataclasses.replace(optimizer, lr=lr))
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"seeds={config.seeds} should be one or more different whole numbers")
    if config.jobs < 1:
        raise ValueError(f"jobs={config.jobs} should be a whole number of at least 1")


def _job(config: CompareConfig, label: str, lr: float, seed: int) -> Job:
    optimizer = dataclasses.replace(config.methods[label], lr=lr)
    run = dataclasses.replace(config.base, optimizer=optimizer, seed=seed)
    # The digest tells labels apart that differ in signs only.
    unique = hashlib.sha256(f"{label} {lr!r} {digest(run)}".encode()).hexdigest()[:6]
    folder = config.out / f"{re.sub(r'[^A-Za-z0-9]+', '-', label).strip('-')}-lr{lr:g}-seed{seed}-{unique}"
    return Job(label, lr, seed, dataclasses.replace(run, out=folder, resume=(folder / "run.json").exists()))


def _rates(config: CompareConfig, label: str) -> list[float]:
    return config.lrs.get(label) or [resolve(config.methods[label])["lr"]]


def _execute(job: Job, workers: int) -> dict[str, Any]:
    """Run a job, as one of `workers` at a time; a diverged one has no loss."""
    result: dict[str, Any] = dict.fromkeys(("validation_loss", "optimizer_state_mb", "gradients_mb", "ms_per_step"))
    try:
        result = train(job.config, Display(quiet=workers > 1, label=f"{job.label}, lr {job.lr:g}"))
    except Diverged as error:
        result["diverged"] = str(error)
    record = read_json(job.config.out / "run.json")
    return {
        "label": job.label,
        "lr": job.lr,
        "seed": job.seed,
        "folder": job.config.out.name,
        "config": digest(job.config),
        "jobs": workers,
        "environment": record["sessions"][-1],
        "settings": record["optimizer_settings"],
        "weights_mb": record["model"]["megabytes"],
        "data": record["data"],
        **result,
    }


class Results:
    """results.json: all finished runs, written after each of them."""

    def __init__(self, config: CompareConfig) -> None:
        self.path = config.out / "results.json"
        self.content: dict[str, Any] = {"runs": []}
        if self.path.exists():
            self.content = read_json(self.path)
        self.content["base"] = plain(config.base)

    def find(self, job: Job) -> dict[str, Any] | None:
        """Return the job's result, or None; what was obtained with other settings does not count."""
        wanted = (job.label, job.lr, job.seed, digest(job.config))
        runs = (run for run in self.content["runs"] if (run["label"], run["lr"], run["seed"], run["config"]) == wanted)
        return next(runs, None)

    def of(self, jobs: Iterable[Job]) -> list[dict[str, Any]]:
        """Return the results of `jobs`, which all have one."""
        found = [self.find(job) for job in jobs]
        return [run for run in found if run is not None]

    def add(self, run: dict[str, Any]) -> None:
        """Keep a result."""
        self.content["runs"].append(run)
        write_json(self.path, self.content)


def check_same_data(runs: Iterable[dict[str, Any]]) -> None:
    """Raise ValueError if the runs were not all trained on the same tokens."""
    labels = {run["data"]["sha256"]: run["label"] for run in runs}
    if len(labels) > 1:
        first, second = list(labels.values())[:2]
        raise ValueError(f"the data changed between the runs of {first!r} and {second!r}: name another --out")


def check_data_of(config: CompareConfig, runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Raise ValueError if the data is not that of the results `runs` in `path`: names are no part of their settings."""
    if not runs:
        return
    corpus, _ = load(config.base.data)
    for run in runs:
        if run["data"]["sha256"] != corpus.fingerprint:
            raise ValueError(
                f"the data is not that of {run['label']!r} in {path} (its checksum differs): put it back, or name "
                "another --out"
            )


def _sweep(jobs: list[Job], results: Results, workers: int) -> None:
    """Run `jobs` and keep their results; raise Stopped if any failed, after the others have finished."""

    def told(run: dict[str, Any]) -> str:
        loss = run["validation_loss"]
        return "diverged" if loss is None else f"validation loss {loss:.4f}"

    sweep(jobs, partial(_execute, workers=workers), workers, results.add, lambda job: job.name, told)


def _row(config: CompareConfig, label: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what is reported of a label: the best learning rate `runs` were made with, mean and spread over seeds."""
    losses, tried, first = [run["validation_loss"] for run in runs], sorted(_rates(config, label)), runs[0]
    return {
        **{key: first[key] for key in ("label", "lr", "folder", "optimizer_state_mb", "gradients_mb", "weights_mb")},
        "method": config.methods[label].name,
        # A best value at the end of the grid may not be the best there is.
        "edge": len(tried) > 1 and first["lr"] in (tried[0], tried[-1]),
        "validation_loss": None if None in losses else statistics.fmean(losses),
        "std": statistics.stdev(losses) if len(losses) > 1 and None not in losses else None,
        "seeds": len(losses),
        # Runs beside others slow each other down.
        "ms_per_step": first["ms_per_step"] if first["jobs"] == 1 else None,
    }


def _measure(config: CompareConfig, results: Results) -> list[dict[str, Any]]:
    """Make the runs that are missing; return one row a label."""
    first, *others = config.seeds
    grid = {label: [_job(config, label, lr, first) for lr in _rates(config, label)] for label in config.methods}
    found = results.of(chain(*grid.values()))
    check_data_of(config, found, results.path)
    if found:
        Display().note(f"{results.path} has {len(found)} of these runs already: delete the folder to repeat them")
    _sweep([job for job in chain(*grid.values()) if results.find(job) is None], results, config.jobs)
    best = {label: min(results.of(jobs), key=by_loss)["lr"] for label, jobs in grid.items()}
    repeats = {label: [_job(config, label, lr, seed) for seed in others] for label, lr in best.items()}
    _sweep([job for job in chain(*repeats.values()) if results.find(job) is None], results, config.jobs)
    check_same_data(results.of(chain(*grid.values(), *repeats.values())))
    chosen = {label: [_job(config, label, lr, first), *repeats[label]] for label, lr in best.items()}
    return [_row(config, label, results.of(jobs)) for label, jobs in chosen.items()]


def compare(config: CompareConfig) -> None:
    """Train the same model on the same tokens with several optimizers; report a table and a picture."""
    check(config)
    if started():
        raise ValueError("compare is one process: start it without torchrun (jobs=N makes N runs at a time)")
    with locked(config.out, "out"):
        results = Results(config)
        try:
            rows = _measure(config, results)
        except (Stopped, KeyboardInterrupt) as error:
            reason = str(error).split(" Go on with")[0] or "interrupted"
            raise Stopped(f"{reason} Calling mofasgd compare again repeats unfinished runs only") from error
        results.content |= {"rows": rows, "reading": reading(rows)}
        write_json(results.path, results.content)
        picture = config.out / "report.png"
        drawn = draw(rows, config.out, picture)
    display = Display()
    display.console.print(table(rows))
    display.note(results.content["reading"])
    display.note((f"{picture} shows it, " if drawn else "") + f"{results.path} has the numbers")
