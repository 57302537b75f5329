"""`mofasgd compare`: the same model and tokens under several optimizers, side by side."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import statistics
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from mofasgd.app.baselines import resolve
from mofasgd.app.config import CompareConfig, PretrainConfig
from mofasgd.app.display import Display
from mofasgd.app.errors import Diverged, Stopped
from mofasgd.app.record import environment, write_json
from mofasgd.app.report import by_loss, draw, reading, table
from mofasgd.app.run import plain, train
from mofasgd.app.trainer import choose_device


@dataclass(frozen=True)
class Job:
    """One run of the comparison."""

    label: str
    lr: float
    seed: int
    config: PretrainConfig

    @property
    def key(self) -> tuple[str, float, int]:
        """What tells a run from the others."""
        return self.label, self.lr, self.seed

    def digest(self) -> str:
        """Return a hash of everything that decides the run's result."""
        content = plain(self.config)
        content["optimizer"] = {"name": self.config.optimizer.name, **resolve(self.config.optimizer)}
        for free in ("out", "resume"):
            content.pop(free)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def check(config: CompareConfig) -> None:
    """Raise ValueError for an empty comparison, an unknown label, or a setting that a method does not have."""
    if not config.methods:
        raise ValueError("methods is empty: name a file such as --config configs/demo.yaml")
    for label in config.lrs:
        if label not in config.methods:
            raise ValueError(f"lrs has the label {label!r}, which methods does not: {', '.join(config.methods)}")
    for optimizer in config.methods.values():
        resolve(optimizer)
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"seeds={config.seeds} should be one or more different whole numbers")
    if config.jobs < 1:
        raise ValueError(f"jobs={config.jobs} should be a whole number of at least 1")


def _job(config: CompareConfig, label: str, lr: float, seed: int) -> Job:
    folder = f"{re.sub(r'[^A-Za-z0-9]+', '-', label).strip('-')}-lr{lr:g}-seed{seed}"
    optimizer = dataclasses.replace(config.methods[label], lr=lr)
    run = dataclasses.replace(config.base, out=config.out / folder, optimizer=optimizer, seed=seed, resume=True)
    return Job(label, lr, seed, run)


def _rates(config: CompareConfig, label: str) -> list[float]:
    return config.lrs.get(label) or [resolve(config.methods[label])["lr"]]


def _execute(job: Job, quiet: bool) -> dict[str, Any]:
    """Run a job; a diverged one has no loss."""
    result: dict[str, Any] = {"validation_loss": None, "optimizer_state_mb": None, "ms_per_step": None}
    try:
        result = train(job.config, Display(quiet=quiet, label=f"{job.label}, lr {job.lr:g}"))
    except Diverged as error:
        result["diverged"] = str(error)
    record = json.loads((job.config.out / "run.json").read_text())
    return {
        "label": job.label,
        "lr": job.lr,
        "seed": job.seed,
        "folder": job.config.out.name,
        "config": job.digest(),
        "settings": record["optimizer_settings"],
        "parameters": record["model"]["parameters"],
        "data": record["data"],
        **result,
    }


class Results:
    """results.json: all finished runs, written after each of them."""

    def __init__(self, config: CompareConfig) -> None:
        self.path = config.out / "results.json"
        self.content: dict[str, Any] = {"runs": []}
        if self.path.exists():
            self.content = json.loads(self.path.read_text())
        config.out.mkdir(parents=True, exist_ok=True)
        self.content["environment"] = environment(choose_device(config.base.device))
        self.content["base"] = plain(config.base)
        self.content["jobs"] = config.jobs

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Return the jobs without a result; ValueError if a result was obtained with other settings."""
        done = {(run["label"], run["lr"], run["seed"]): run for run in self.content["runs"]}
        left = []
        for job in jobs:
            if job.key not in done:
                left.append(job)
            elif done[job.key]["config"] != job.digest():
                raise ValueError(
                    f"{self.path} holds a run of {job.label!r} at lr {job.lr:g} with other settings: name another --out"
                )
        return left

    def add(self, run: dict[str, Any]) -> None:
        """Keep a result."""
        self.content["runs"].append(run)
        write_json(self.path, self.content)

    def runs(self, label: str) -> list[dict[str, Any]]:
        """Return the runs of a row."""
        return [run for run in self.content["runs"] if run["label"] == label]

    def best_lr(self, label: str, seed: int) -> float:
        """Return the learning rate with the lowest loss on `seed`; any if all diverged."""
        runs = [run for run in self.runs(label) if run["seed"] == seed]
        return float(min(runs, key=by_loss)["lr"])


def _child(job: Job, pipe: Connection) -> None:
    try:
        pipe.send(_execute(job, quiet=True))
    except Exception as error:  # for the parent to tell
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _execute_apart(job: Job) -> dict[str, Any] | str:
    """Run a job in a process of its own, which takes a broken GPU context with it; return an error as text."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, sender))
    process.start()
    sender.close()
    try:
        answer: dict[str, Any] | str = receiver.recv()
    except EOFError:
        answer = "killed"
    process.join()
    return answer if process.exitcode == 0 else f"{answer} (exit status {process.exitcode})"


def _sweep(jobs: list[Job], results: Results, workers: int) -> None:
    """Run `jobs` and keep their results; raise Stopped if any failed, after the others have finished."""
    if workers == 1:
        for job in jobs:
            results.add(_execute(job, quiet=False))
        return
    display, failures = Display(), []
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(_execute_apart, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                job, run = futures[future], future.result()
                name = f"{job.label}, lr {job.lr:g}, seed {job.seed}"
                if isinstance(run, str):
                    failures.append(f"{name}: {run}")
                    display.note(failures[-1])
                    continue
                results.add(run)
                loss = run["validation_loss"]
                display.note(f"{name}: {'diverged' if loss is None else f'validation loss {loss:.4f}'}")
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        raise Stopped(f"{len(failures)} of {len(jobs)} runs failed, the first: {failures[0]}")


def _rows(config: CompareConfig, results: Results) -> Iterator[dict[str, Any]]:
    """Yield one row a label: the best learning rate, mean and spread over the seeds."""
    for label in config.methods:
        lr = results.best_lr(label, config.seeds[0])
        runs = [run for run in results.runs(label) if run["lr"] == lr and run["seed"] in config.seeds]
        losses = [run["validation_loss"] for run in runs]
        tried = sorted(set(_rates(config, label)))
        yield {
            **{key: runs[0][key] for key in ("optimizer_state_mb", "ms_per_step", "parameters")},
            "label": label,
            "method": config.methods[label].name,
            "lr": lr,
            # A best value at the end of the grid may not be the best there is.
            "edge": len(tried) > 1 and lr in (tried[0], tried[-1]),
            "validation_loss": None if None in losses else statistics.fmean(losses),
            "std": statistics.stdev(losses) if len(losses) > 1 and None not in losses else None,
            "seeds": len(losses),
            "folder": runs[0]["folder"],
        }


def compare(config: CompareConfig) -> None:
    """Train the same model on the same tokens with several optimizers; report a table and a picture."""
    check(config)
    results = Results(config)
    first, *others = config.seeds
    grid = [_job(config, label, lr, first) for label in config.methods for lr in _rates(config, label)]
    if results.content["runs"]:
        Display().note(f"{results.path} has {len(results.content['runs'])} finished runs: delete it to repeat them")
    try:
        _sweep(results.missing(grid), results, config.jobs)
        best = {label: results.best_lr(label, first) for label in config.methods}
        repeats = [_job(config, label, best[label], seed) for label in config.methods for seed in others]
        _sweep(results.missing(repeats), results, config.jobs)
    except (Stopped, KeyboardInterrupt) as error:
        raise Stopped(
            f"{error or 'interrupted'}. Calling mofasgd compare again repeats unfinished runs only"
        ) from error
    rows = list(_rows(config, results))
    results.content["rows"] = rows
    results.content["reading"] = reading(rows)
    write_json(results.path, results.content)
    picture = config.out / "report.png"
    draw(rows, config.out, picture)
    display = Display()
    display.console.print(table(rows, alone=config.jobs == 1))
    display.note(results.content["reading"])
    display.note(f"{picture} shows it, {results.path} has the numbers")
